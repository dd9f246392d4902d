"""Captured features: the same as those computed online, resumable, and refused where they do not belong."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from types import SimpleNamespace

import factory
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import corpus_of_rows
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert import hf
from convert.folders import convert_folder
from convert.identity import model_fingerprint
from domino_jax import target
from domino_jax.config import DraftConfig
from domino_jax.errors import DominoError
from domino_jax.runtime.files import lock_folder
from domino_jax.weights import init_weights
from train.features import capture, shards
from train.features.store import Features

LENGTH, ROWS, TARGET_LAYER_IDS = 12, 7, (0, 1)
CONFIG = replace(factory.BYTE_TARGET, num_hidden_layers=3)  # TAPS are below its last layer
SHARD_BYTES = 3600  # three shards, with the final states


def make_corpus(seed: int = 0, packed: bool = False) -> SimpleNamespace:
    """Rows of different lengths; with `packed`, some hold two conversations."""
    rng = np.random.default_rng(seed)
    lengths = np.array([12, 5, 9, 2, 12, 7, 3])
    places = np.arange(LENGTH)
    ids = np.where(places < lengths[:, None], rng.integers(4, 260, (ROWS, LENGTH)), 0).astype(np.int32)
    starts = np.zeros((ROWS, LENGTH), np.int32)
    if packed:
        starts[0, 4:], starts[2, 6:] = 4, 6
    starts = np.where(places < lengths[:, None], starts, places).astype(np.int32)
    mask = (places < lengths[:, None]) & (places > 0)
    corpus = corpus_of_rows(ids, mask, starts)
    taken = corpus.take(range(ROWS))
    assert (taken.ids == ids).all() and (taken.starts == starts).all() and (corpus.lengths == lengths).all()
    return SimpleNamespace(corpus=corpus, ids=ids, mask=mask, lengths=lengths, fingerprint=corpus.fingerprint)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("capture") / "target"
    factory.make_target(folder, tokenizer=False, num_hidden_layers=CONFIG.num_hidden_layers)
    return folder


@pytest.fixture
def corpus(monkeypatch):
    """What the command reads in place of a file."""
    made = make_corpus()
    monkeypatch.setattr(capture, "corpus_to_capture", lambda *_: made.corpus)
    monkeypatch.setattr(shards.plan_shards, "__kwdefaults__", {"shard_bytes": SHARD_BYTES})
    return made


def words(folder, out, *more: str) -> list[str]:
    given = ["--target", str(folder), "--data", "data.jsonl", "--out", str(out), "--length", str(LENGTH)]
    return [*given, "--taps", *map(str, TARGET_LAYER_IDS), "--batch", "2", *more]


@pytest.fixture
def captured(folder, corpus, tmp_path):
    """A finished capture in float32, with the final states."""
    assert capture.main(words(folder, tmp_path / "features", "--hidden")) == 0
    return tmp_path / "features"


def online(folder, corpus, dtype, rows) -> tuple[np.ndarray, np.ndarray]:
    """Features and final states as a training step computes them from a batch."""
    config = CONFIG
    frozen = hf.load_hf(folder, config, dtype)
    forward = jax.jit(lambda frozen, ids: target.forward(frozen, config, ids, target_layer_ids=TARGET_LAYER_IDS)[:2])
    states, tapped = forward(frozen, jnp.asarray(corpus.ids[rows]))
    return np.asarray(tapped), np.asarray(states)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_features_are_those_of_the_online_path(folder, corpus, tmp_path, dtype):
    """Bit for bit where the target computes in bfloat16; in float32 they are rounded to it once."""
    out = tmp_path / "features"
    assert capture.main(words(folder, out, "--hidden", "--dtype", dtype)) == 0
    read = Features.open(out)
    rows = [4, 0, 3]
    found = read.rows(rows)
    assert found.features.shape == (3, LENGTH, 64) and found.features.dtype == jnp.bfloat16
    assert found.hidden is not None and found.hidden.shape == (3, LENGTH, 32)
    for ours, theirs in zip((found.features, found.hidden), online(folder, corpus, dtype, rows), strict=True):
        real = np.arange(LENGTH) < corpus.lengths[rows][:, None]
        assert theirs.dtype == dtype
        expected = np.where(real[..., None], theirs, 0)
        if dtype == "bfloat16":
            assert (ours.view(np.uint16) == expected.view(np.uint16)).all()
        else:
            np.testing.assert_allclose(ours.astype(np.float32), expected, rtol=2**-8)
            assert (ours[real] != expected[real]).any(), "the case does not tell"
    assert len(read) == ROWS


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.embed_tokens.weight", "from the embedding on, first at token 3 (id "),
        ("model.layers.1.mlp.down_proj.weight", "from layer 1 on (of 3, counted from 0), first at token 0 "),
        ("model.norm.weight", "from the final norm on"),
    ],
)
def test_features_that_are_not_finite_are_refused(folder, corpus, tmp_path, capsys, name, says):
    """Whole shards before stay: here a NaN in the embedding of a token that only the last row has."""
    shutil.copytree(folder, tmp_path / "target")
    tensors = load_file(folder / "model.safetensors")
    row = int(corpus.ids[5, 3])
    assert row not in corpus.ids[:5]
    tensors[name][(row if "embed" in name else ..., 0) if tensors[name].ndim > 1 else 0] = np.nan
    save_file(tensors, tmp_path / "target" / "model.safetensors", metadata={"format": "pt"})
    assert capture.main(words(tmp_path / "target", tmp_path / "features", "--hidden")) == 1
    err = capsys.readouterr().err
    assert says in err and f"{name} holds such values" in err
    finished = sorted(file.name for file in (tmp_path / "features").glob("features-*.safetensors"))
    assert bool(finished) == ("embed" in name) and not list((tmp_path / "features").glob("*.tmp"))


def test_shards_are_plain_safetensors_without_the_padding(captured, corpus):
    files = sorted(captured.glob("*.safetensors"))
    assert len(files) > 2
    found = []
    for file in files:
        with safe_open(file, framework="numpy") as tensors:
            assert tensors.get_slice("features").get_dtype() == "BF16"
            found += tensors.get_tensor("lengths").tolist()
            assert tensors.get_slice("features").get_shape() == [tensors.get_tensor("lengths").sum(), 64 + 32]
    assert found == corpus.lengths.tolist()
    sizes = sum(file.stat().st_size for file in files)
    assert sizes == shards.read_header(captured).size < corpus.lengths.sum() * 96 * 2 + 400 * len(files)


def test_a_conversation_of_a_packed_row_does_not_see_the_one_before(folder, corpus, tmp_path, monkeypatch):
    made = make_corpus(packed=True)
    monkeypatch.setattr(capture, "corpus_to_capture", lambda *_: made.corpus)
    assert capture.main(words(folder, tmp_path / "features")) == 0
    read = Features.open(tmp_path / "features").rows([0, 2]).features.astype(np.float32)
    for place, (row, cut) in enumerate([(0, 4), (2, 6)]):
        end = made.lengths[row]
        for piece in (slice(0, cut), slice(cut, end)):  # RoPE is relative, so positions from 0 do as well
            alone = SimpleNamespace(ids=made.ids[:, piece])
            expected = online(folder, alone, "float32", [row])[0][0]
            np.testing.assert_allclose(read[place, piece], expected, rtol=2**-7, atol=1e-4)


def test_a_mesh_captures_the_same(folder, captured, corpus, tmp_path):
    assert capture.main(words(folder, tmp_path / "mesh", "--hidden", "--mesh", "data=2,model=2")) == 0
    ours, theirs = (Features.open(f).rows(range(ROWS)) for f in (tmp_path / "mesh", captured))
    np.testing.assert_allclose(
        ours.features.astype(np.float32), theirs.features.astype(np.float32), rtol=2**-7, atol=1e-5
    )


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.e2e
@pytest.mark.parametrize("stop", ["killed", "interrupted", "full disk"])
def test_a_capture_that_stopped_goes_on_to_the_same_files(
    folder, captured, corpus, tmp_path, monkeypatch, capsys, stop
):
    out, real, written = tmp_path / "again", shards.write_shard, []

    class Killed(BaseException):
        pass

    def failing(folder, plan, shard, rows):
        if len(written) < 2:
            written.append(shard)
            return real(folder, plan, shard, rows)
        if stop == "killed":
            (folder / "features-00002-of-00003.tmp").write_bytes(b"half of it")
            raise Killed

        def some():
            yield next(iter(rows))
            raise KeyboardInterrupt if stop == "interrupted" else OSError(28, "No space left on device")

        return real(folder, plan, shard, some())

    monkeypatch.setattr(shards, "write_shard", failing)
    capsys.readouterr()
    if stop == "killed":
        with pytest.raises(Killed):
            capture.main(words(folder, out, "--hidden"))
    else:
        assert capture.main(words(folder, out, "--hidden")) == (130 if stop == "interrupted" else 1)
        error = capsys.readouterr().err
        assert "2 of 3 shards are finished" in error and "same command" in error and error.count("\n") == 1
        assert not list(out.glob("*.tmp"))
    with pytest.raises(DominoError, match="2 of 3 shards are written"):
        Features.open(out)
    again = []
    monkeypatch.setattr(shards, "write_shard", lambda *a: again.append(a[2]) or real(*a))
    assert capture.main(words(folder, out, "--hidden")) == 0
    assert again == [2]
    assert contents(out) == contents(captured)
    assert capture.main(words(folder, out, "--hidden")) == 0 and again == [2], "complete: nothing is written"
    assert "is complete" in capsys.readouterr().out


def test_a_finished_shard_that_was_altered_is_captured_again(folder, captured, corpus):
    before, plan = contents(captured), shards.read_header(captured)
    shards.write_header(captured, replace(plan, checksums=(*plan.checksums[:2], None)))
    flip(captured / plan.name(0), -200)
    assert capture.main(words(folder, captured, "--hidden")) == 0
    assert contents(captured) == before


def test_batches_come_with_their_features_and_the_next_is_read_ahead(captured):
    read, taken = Features.open(captured), []

    def batches():
        for rows in ([0, 3], [5, 1], [2, 6], [4, 4]):
            taken.append(rows)
            yield SimpleNamespace(rows=np.array(rows))

    following = read.read_ahead(batches())
    batch, found = next(following)
    assert taken == [[0, 3], [5, 1]]
    assert batch.rows.tolist() == [0, 3] and (found.features == read.rows([0, 3]).features).all()
    assert [batch.rows.tolist() for batch, _ in following] == [[5, 1], [2, 6], [4, 4]]
    next(started := read.read_ahead(batches()))
    started.close()
    flip(captured / read.plan.name(0), len(read.plan.head(0)) + 5)
    with pytest.raises(DominoError, match="was altered"):
        list(Features.open(captured).read_ahead(batches()))


def flip(file, place: int) -> None:
    held = bytearray(file.read_bytes())
    held[place] ^= 1
    file.write_bytes(held)


def test_what_was_altered_is_noticed(captured, tmp_path):
    plan = shards.read_header(captured)
    first = captured / plan.name(0)
    good = first.read_bytes()
    flip(first, len(plan.head(0)) + 5)
    read = Features.open(captured)
    assert read.rows([1, 2]).features.any(), "rows beside it are good"
    with pytest.raises(DominoError, match="checksum of its row 0"):
        read.rows([3, 0])
    with pytest.raises(DominoError, match="checksum of its row 0"):
        list(read.verify())
    for place in (-1, 12):  # the tables, and the head
        first.write_bytes(good)
        flip(first, place)
        with pytest.raises(DominoError, match="was altered"):
            Features.open(captured)
    first.write_bytes(good[:-1])
    with pytest.raises(DominoError, match=r"bytes, expected .* truncated"):
        Features.open(captured)
    first.unlink()
    with pytest.raises(DominoError, match="can't be read"):
        Features.open(captured)
    values = json.loads((captured / "features.json").read_text())
    (captured / "features.json").write_text(json.dumps(values | {"target_layer_ids": [1, 0]}))
    with pytest.raises(DominoError, match="checksum is wrong"):
        Features.open(captured)
    (captured / "features.json").write_text(json.dumps(values | {"version": 9}))
    with pytest.raises(DominoError, match="version 9, expected 2"):
        Features.open(captured)
    with pytest.raises(DominoError, match="holds no captured features"):
        Features.open(tmp_path)


def test_features_of_something_else_are_refused(folder, captured, corpus, tmp_path):
    identity = model_fingerprint(folder)
    read = Features.open(captured)
    read.check(identity, corpus.fingerprint, TARGET_LAYER_IDS, True)
    with pytest.raises(DominoError, match="another target"):
        read.check("other", corpus.fingerprint, TARGET_LAYER_IDS, True)
    with pytest.raises(DominoError, match="other data"):
        read.check(identity, "other", TARGET_LAYER_IDS, True)
    with pytest.raises(DominoError, match=r"the target's layers \[0, 1\], the drafter reads \[0, 2\]"):
        read.check(identity, corpus.fingerprint, (0, 2), True)
    assert capture.main(words(folder, tmp_path / "plain")) == 0
    plain = Features.open(tmp_path / "plain")
    plain.check(identity, corpus.fingerprint, TARGET_LAYER_IDS, False)
    assert plain.rows([0]).hidden is None
    with pytest.raises(DominoError, match="--hidden"):
        plain.check(identity, corpus.fingerprint, TARGET_LAYER_IDS, True)


def test_the_identity_is_the_weights_and_not_their_files(folder, tmp_path, monkeypatch):
    identity = model_fingerprint(folder)
    config = CONFIG
    module = init_weights(config, jax.random.key(0), std=0.2)
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    hf.save_hf(tmp_path / "sharded", module, config, config.to_hf())
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert model_fingerprint(tmp_path / "sharded") == identity
    module.layers[1].q_norm = module.layers[1].q_norm.at[3].add(1e-3)
    hf.save_hf(tmp_path / "norm", module, config, config.to_hf())
    factory.make_target(tmp_path / "seed", seed=5, tokenizer=False)
    shutil.copytree(folder, tmp_path / "theta")
    hf.write_json(tmp_path / "theta" / "config.json", config.to_hf() | {"rope_theta": 2e4})
    assert len({identity, *(model_fingerprint(tmp_path / f) for f in ("norm", "seed", "theta"))}) == 4


def test_an_orbax_target_is_captured_and_has_an_identity(folder, captured, corpus, tmp_path):
    target = tmp_path / "orbax"
    convert_folder(folder, target)
    assert capture.main(words(target, tmp_path / "same", "--hidden")) == 0
    ours, theirs = (Features.open(f).rows(range(ROWS)).features for f in (tmp_path / "same", captured))
    assert (ours.view(np.uint16) == theirs.view(np.uint16)).all()
    fingerprint = model_fingerprint(target)
    shutil.copytree(target, tmp_path / "copy")
    assert fingerprint == model_fingerprint(tmp_path / "copy") != model_fingerprint(folder)
    file = max((target / "weights").rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    flip(file, file.stat().st_size // 2)
    assert model_fingerprint(target) != fingerprint
    hf.write_json(tmp_path / "copy" / "config.json", hf.read_json(folder / "config.json") | {"rope_theta": 2e4})
    assert model_fingerprint(tmp_path / "copy") != fingerprint


def test_another_capture_in_the_same_folder_is_refused(folder, captured, corpus, monkeypatch, capsys):
    for more, word in (([], "final states"), (["--hidden", "--dtype", "bfloat16"], "--dtype")):
        assert capture.main(words(folder, captured, *more)) == 1
        error = capsys.readouterr().err
        assert f"differ in the {word if word[0] == '-' else 'choice of ' + word}" in error and error.count("\n") == 1
    monkeypatch.setattr(capture, "corpus_to_capture", lambda *_: make_corpus(1).corpus)
    assert capture.main(words(folder, captured, "--hidden")) == 1
    assert "differ in the data" in capsys.readouterr().err


def test_too_little_disk_is_refused_before_anything_is_written(folder, corpus, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "features"
    usage = namedtuple("usage", "total used free")
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda place: asked.append(place) or usage(10**9, 0, 9000))
    assert capture.main(words(folder, out)) == 1
    error = capsys.readouterr().err
    assert "the disk is too small: 50 tokens of 128 bytes need" in error and error.count("\n") == 1
    assert asked == [tmp_path] and not out.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 0, 2 * 10**6))
    assert capture.main(words(folder, out)) == 0
    assert "need 6.7 KiB; 1.9 MiB are free" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch", "0"], "--batch must be at least 1, found 0"),
        (["--layers", "-2"], "--layers must be at least 1, found -2"),
        (["--taps", "-1"], "--target-layer-ids must be at least 0, found -1"),
        (["--mesh", "four"], "data=2,model=4"),
        (["--length", "500"], "500 is beyond the target's 256 positions"),
        (["--taps", "0", "3"], "layers 0 to 2, found [0, 3]"),
        (["--mesh", "data=4"], "data=4 does not divide --batch 2"),
        (["--target", "missing"], "neither a name"),
    ],
)
def test_refusals(folder, corpus, tmp_path, capsys, more, message):
    assert capture.main(words(folder, tmp_path / "features", *more)) == (1 if more[0] == "--target" else 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "features").exists()


def test_a_drafter_is_no_target_and_wrong_words_are_2(folder, tmp_path, capsys):
    assert isinstance(factory.make_draft(tmp_path / "draft"), DraftConfig)
    assert capture.main(words(tmp_path / "draft", tmp_path / "features")) == 1
    assert "is a drafter" in capsys.readouterr().err
    assert capture.main(["--what"]) == 2


def test_rows_are_divided_whole():
    lengths = np.array([1, 1, 9, 1, 1, 1])
    made = shards.plan_shards(
        lengths, target="", corpus="", target_layer_ids=(0,), width=4, hidden=0, dtype="", length=9, shard_bytes=3 * 8
    )
    assert sum(made.rows) == 6 and sum(made.tokens) == 14 and min(made.rows) > 0
    assert made.missing == list(range(len(made.rows)))


def test_two_captures_do_not_write_into_one_folder(folder, corpus, tmp_path, capsys):
    out = tmp_path / "features"
    with lock_folder(out):
        assert capture.main(words(folder, out)) == 1
    assert f"error: {out} is being written by another process" in capsys.readouterr().err
    assert not out.exists()
    assert capture.main(words(folder, out)) == 0
