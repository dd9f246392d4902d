"""The trainer: loss and gradients against a plain restatement, anchors, resuming, refusals."""

import dataclasses
import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import hf
from convert.folders import convert
from convert.names import entries
from domino_jax.config import DraftConfig, HeadConfig, TargetConfig
from domino_jax.errors import DominoError
from domino_jax.weights import flatten, init, unflatten
from tests import reference
from train import anchors, curves, data
from train.__main__ import Train, main
from train.loss import _cross_entropies, curriculum
from train.step import LOOPED, Recipe, lambda_base, start, train_step
from train.warm import from_drafter

TARGET = TargetConfig(23, 16, 3, 4, 2, 8, 24, 1e-6, 1e4, 64, True)
LENGTH = 19


def make_draft(shift: bool, prefix: int | None, block: int = 4, window: int | None = None) -> DraftConfig:
    head = None if prefix is None else HeadConfig(6, 5, prefix)
    return DraftConfig(
        23, 16, 2, 2, 1, 8, 20, 1e-6, 1e4, 64, block, 22, (0, 2), 3, shift, head, (None, window) if window else ()
    )


def named(config, module) -> dict[str, np.ndarray]:
    """A module as tensors under Hugging Face's names."""
    leaves = flatten(module)
    return {
        n: np.asarray(t) for e in entries(config) for n, t in e.tensors(np.asarray(e.to_hf(leaves[e.path]))).items()
    }


def sequences(seed: int = 0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 22, (3, LENGTH)).astype(np.int32)
    mask = rng.random((3, LENGTH)) < 0.8
    ids[1, 5:] = 0
    mask[1, 5:] = False  # a short, padded sequence
    mask[2] = False  # one without any anchor
    places = [[0, 3, 7, 15, 17], [0, 1, 2, 3, 0], [0, 1, 2, 3, 4]]
    valid = np.array([[True] * 5, [True, True, True, False, False], [False] * 5])
    return ids, mask, np.array(places, np.int32), valid


CASES = [
    pytest.param(make_draft(True, 1), 0.3, id="domino"),
    pytest.param(make_draft(True, 0), 0.0, id="corrected from the first"),
    pytest.param(make_draft(False, 2), 0.7, id="unshifted labels, longer prefix"),
    pytest.param(make_draft(True, 1, block=6, window=3), 1.0, id="sliding layer, base only"),
    pytest.param(make_draft(False, None), 0.5, id="plain DFlash"),
]


@pytest.mark.parametrize(("draft", "lam"), CASES)
@pytest.mark.parametrize("chunk", [1000, 7])
def test_loss_and_report_equal_the_restatement(draft, lam, chunk):
    frozen = init(TARGET, jax.random.key(1), std=0.3)
    drafter = init(draft, jax.random.key(2), std=0.3)
    ids, mask, places, valid = sequences()
    loss, report = jax.jit(
        lambda d: curriculum(
            d,
            frozen,
            (TARGET, draft),
            jnp.asarray(ids),
            jnp.asarray(mask),
            jnp.asarray(places),
            jnp.asarray(valid),
            lam=jnp.float32(lam),
            gamma=3.0,
            chunk=chunk,
        )
    )(drafter)
    target_raw, draft_raw = TARGET.to_hf(), draft.to_hf()
    parts = [
        reference.training_loss(
            named(TARGET, frozen),
            target_raw,
            named(draft, drafter),
            draft_raw,
            list(ids[b]),
            list(mask[b]),
            [int(a) for a, v in zip(places[b], valid[b], strict=True) if v],
            3.0,
            lam,
        )
        for b in range(3)
    ]
    expected = reference.combine_training(parts, lam)
    found = {
        "loss": loss,
        "final_ce": report.final.loss,
        "base_ce": report.base.loss,
        "final_accuracy": report.final.accuracy,
        "base_accuracy": report.base.accuracy,
        "final_accept": report.final.acceptance,
        "base_accept": report.base.acceptance,
    }
    for key, value in found.items():
        assert float(value) == pytest.approx(float(expected[key]), abs=2e-5), key


@pytest.mark.parametrize(("draft", "lam"), [CASES[0].values, CASES[2].values], ids=["domino", "unshifted"])
def test_gradients_equal_differences_of_the_restatement(draft, lam):
    """Central differences of the float64 restatement, along a few random directions."""
    frozen = init(TARGET, jax.random.key(1), std=0.3)
    drafter = init(draft, jax.random.key(2), std=0.3)
    ids, mask, places, valid = (jnp.asarray(x) for x in sequences())

    def loss(d):
        return curriculum(
            d, frozen, (TARGET, draft), ids, mask, places, valid, lam=jnp.float32(lam), gamma=3.0, chunk=11
        )[0]

    gradient = named(draft, jax.jit(jax.grad(loss))(drafter))
    weights = {name: tensor.astype(np.float64) for name, tensor in named(draft, drafter).items()}
    frozen_weights = named(TARGET, frozen)

    def restated(shifted):
        parts = [
            reference.training_loss(
                frozen_weights,
                TARGET.to_hf(),
                shifted,
                draft.to_hf(),
                [int(t) for t in ids[b]],
                [bool(m) for m in mask[b]],
                [int(a) for a, v in zip(places[b], valid[b], strict=True) if v],
                3.0,
                lam,
            )
            for b in range(3)
        ]
        return float(reference.combine_training(parts, lam)["loss"])

    rng = np.random.default_rng(0)
    groups = [
        ["fc.weight", "hidden_norm.weight"],
        [n for n in weights if n.startswith("layers.")],
        ["norm.weight"],
        [n for n in weights if n.startswith(("prefix_gru", "embed_proj"))],
    ]
    for names in groups:
        direction = {n: rng.normal(size=weights[n].shape) for n in names}
        step = 1e-5
        ends = [restated({**weights, **{n: weights[n] + s * step * direction[n] for n in names}}) for s in (1, -1)]
        expected = (ends[0] - ends[1]) / (2 * step)
        found = sum((gradient[n] * direction[n]).sum() for n in names)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), names


def test_the_target_gets_no_gradient():
    draft = make_draft(True, 1)
    frozen, drafter = init(TARGET, jax.random.key(1), std=0.3), init(draft, jax.random.key(2), std=0.3)
    batch = [jnp.asarray(x) for x in sequences()]
    moved = init(TARGET, jax.random.key(3), std=0.3)

    def loss(frozen):
        return curriculum(drafter, frozen, (TARGET, draft), *batch, lam=jnp.float32(0), gamma=3.0, chunk=99)[0]

    value = jax.jit(loss)
    assert float(value(frozen)) != float(value(moved))  # it does depend on the target
    gradient = jax.jit(jax.grad(loss))(frozen)
    for path, leaf in flatten(gradient).items():
        if path.startswith("layers."):
            assert not np.any(leaf), path


def test_no_full_set_of_logits_exists():
    """With chunks, no buffer of the compiled step is as large as all logits."""
    config = TargetConfig(4001, 16, 2, 2, 1, 8, 16, 1e-6, 1e4, 64, True)
    draft = DraftConfig(4001, 16, 1, 2, 1, 8, 16, 1e-6, 1e4, 64, 8, 3, (0,), 2, True, HeadConfig(8, 4, 1))
    frozen, drafter = init(config, jax.random.key(0)), init(draft, jax.random.key(1))
    ids, mask = jnp.zeros((4, 64), jnp.int32), jnp.ones((4, 64), bool)
    places, valid = jnp.zeros((4, 16), jnp.int32), jnp.ones((4, 16), bool)

    def temporary_bytes(chunk):
        def loss(d):
            lam = jnp.float32(0.5)
            return curriculum(d, frozen, (config, draft), ids, mask, places, valid, lam=lam, gamma=7.0, chunk=chunk)[0]

        analysis = jax.jit(jax.grad(loss)).lower(drafter).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    whole = 4 * 16 * 8 * 4001 * 4
    assert temporary_bytes(32) < whole < temporary_bytes(4 * 16 * 8)


def test_anchors_are_a_uniform_draw_without_replacement():
    mask = jnp.asarray([[True, True, False, True, True, True, False], [False] * 7])
    counts = np.zeros(7)
    drawn, valid = jax.jit(jax.vmap(lambda k: anchors.draw(k, mask, 2)))(jax.random.split(jax.random.key(0), 3000))
    drawn, valid = np.asarray(drawn), np.asarray(valid)
    assert not valid[:, 1].any()  # a sequence with no legal place has no anchor
    assert valid[:, 0].all()
    assert (drawn[:, 0, 0] != drawn[:, 0, 1]).all()
    np.add.at(counts, drawn[:, 0].ravel(), 1)
    assert set(np.flatnonzero(counts)) == {0, 3, 4}  # on at a and at a + 1
    assert np.ptp(counts[[0, 3, 4]]) < 250  # 2000 each; the standard deviation is 26


RECIPE = Recipe(
    target=TARGET,
    draft=make_draft(True, 1),
    steps=20,
    optimizer="adamw",
    lr=1e-2,
    muon_lr=0.02,
    warmup=0.1,
    weight_decay=0.0,
    clip=1.0,
    gamma=4.0,
    anchors=4,
    lambda_base_start=1.0,
    lambda_base_decay_ratio=0.5,
    chunk=64,
    dtype="float32",
)


def test_lambda_falls_linearly_and_stays_at_zero():
    steps = [0, 5, 10, 15]
    assert [float(lambda_base(RECIPE, jnp.int32(s))) for s in steps] == [1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_only_the_branch_that_counts_learns(lam):
    """At λ = 1 the head gets no gradient; at λ = 0 it does."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        made = RECIPE._replace(lambda_base_start=lam, lambda_base_decay_ratio=float("inf"), warmup=0.0)
        frozen = init(TARGET, jax.random.key(1), std=0.3)
        weights = flatten(init(made.draft, jax.random.key(2), std=0.3))
        before = {k: np.asarray(v) for k, v in weights.items()}
        state = start(made, weights, 0)
        for _ in range(2):  # the first step's learning rate is 0
            ids = jax.random.randint(jax.random.key(5), (2, LENGTH), 0, 22)
            state, _ = train_step(made, state, frozen, ids, jnp.ones((2, LENGTH), bool))
        moved = {k for k, v in state.weights.items() if np.abs(np.asarray(v) - before[k]).max() > 1e-6}
    head = {k for k in before if k.startswith("head.")}
    assert ("fc" in moved) and (head <= moved if lam == 0 else not head & moved)


def test_a_step_that_is_not_finite_changes_nothing():
    with jax.numpy_dtype_promotion("standard"):
        made = RECIPE
        frozen = init(TARGET, jax.random.key(1), std=0.3)
        frozen.embed = frozen.embed.at[3].set(jnp.nan)
        state = start(made, flatten(init(made.draft, jax.random.key(2), std=0.3)), 0)
        before = {k: np.asarray(v) for k, v in state.weights.items()}
        state, metrics = train_step(made, state, frozen, jnp.full((1, LENGTH), 3), jnp.ones((1, LENGTH), bool))
    assert not metrics.finite
    assert all((np.asarray(v) == before[k]).all() for k, v in state.weights.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny target with random weights, and sequences that are easy to learn."""
    base = tmp_path_factory.mktemp("train")
    config = TargetConfig(40, 32, 3, 4, 2, 8, 48, 1e-6, 1e4, 64, True)
    hf.save(base / "target", init(config, jax.random.key(0), std=0.2), config, config.to_hf())
    rows = []
    for i in range(24):
        prompt = [i % 39, (3 * i) % 39, (5 * i) % 39]
        rows.append({"input_ids": prompt, "tokens": [(prompt[-1] + 2 * k) % 39 for k in range(1, 22)]})
    (base / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return base


def words(folder, out, *more) -> list[str]:
    sizes = "--layers 1 --block-size 4 --taps 0 2 --gru-hidden-dim 8 --emb-dim 6 --mask-token-id 39"
    run = "--steps 20 --batch 4 --length 24 --anchors 4 --save-every 10 --log-every 5 --lr 1e-2"
    given = ["--target", str(folder / "target"), "--data", str(folder / "data.jsonl"), "--out", str(out)]
    return [*given, *sizes.split(), *run.split(), *more]


@pytest.fixture(scope="module")
def finished(folder):
    with jax.numpy_dtype_promotion("standard"):
        assert main(words(folder, folder / "run")) == 0
    return folder / "run"


def test_a_run_leaves_what_it_promises(finished):
    rows = curves.read(finished / "metrics.jsonl")
    assert [r["step"] for r in rows] == [5, 10, 15, 20]
    assert rows[-1]["final_loss"] < rows[0]["final_loss"]
    assert rows[0]["lambda"] > rows[-1]["lambda"] > 0
    assert (finished / "curves.png").stat().st_size > 10_000
    raw = hf.read_json(finished / "drafter" / "config.json")
    config = hf.parse_config(raw)
    assert isinstance(config, DraftConfig) and config.head == HeadConfig(8, 6, 1)
    assert raw["architectures"] == ["DominoDraftModel"] and raw["torch_dtype"] == "bfloat16"
    assert np.any(np.asarray(hf.load(finished / "drafter", config, jnp.float32).head.proj_out))


def test_the_newest_state_of_a_run_becomes_a_drafter(finished, tmp_path):
    assert convert(finished, tmp_path / "drafter") == ("training run", "Hugging Face")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "drafter" / name).read_bytes() == (finished / "drafter" / name).read_bytes()
    shutil.copytree(finished, tmp_path / "earlier")
    shutil.rmtree(tmp_path / "earlier" / "checkpoints" / "20")
    convert(tmp_path / "earlier", tmp_path / "half")
    config = hf.parse_config(hf.read_json(tmp_path / "half" / "config.json"))
    half, whole = hf.load(tmp_path / "half", config), hf.load(tmp_path / "drafter", config)
    assert not np.array_equal(half.fc, whole.fc)
    shutil.rmtree(tmp_path / "earlier" / "checkpoints" / "10")
    with pytest.raises(DominoError, match="no checkpoint yet"):
        convert(tmp_path / "earlier", tmp_path / "none")


def test_a_run_begins_as_another_drafter_which_may_have_no_head(folder, finished, tmp_path):
    raw = hf.read_json(finished / "drafter" / "config.json")
    config = hf.parse_config(raw)
    assert isinstance(config, DraftConfig)
    theirs = flatten(hf.load(finished / "drafter", config, jnp.float32))
    ours = flatten(init(config, jax.random.key(5)))
    begun = from_drafter(ours, config, finished / "drafter")
    assert all(np.array_equal(begun[path], theirs[path]) for path in ours)
    plain = dataclasses.replace(config, head=None)
    hf.save(tmp_path / "dflash", init(plain, jax.random.key(6)), plain, plain.to_hf())
    begun = from_drafter(ours, config, tmp_path / "dflash")
    assert np.array_equal(begun["head.proj_in"], ours["head.proj_in"]) and not np.array_equal(begun["fc"], ours["fc"])
    with pytest.raises(DominoError, match="has block_size 4, this one 5"):
        from_drafter(ours, dataclasses.replace(config, block_size=5), finished / "drafter")
    with jax.numpy_dtype_promotion("standard"):
        assert main(words(folder, tmp_path / "run", "--begin-as", str(tmp_path / "dflash"), "--steps", "5")) == 0
        shutil.rmtree(tmp_path / "dflash")
        assert main(["--resume", "--out", str(tmp_path / "run")]) == 0, "what it began as is needed no more"
        assert main(words(folder, tmp_path / "both", "--begin-as", str(tmp_path / "dflash"), "--warm")) == 1


def test_resuming_is_bit_equal(finished, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    shutil.rmtree(again / "checkpoints" / "20")
    shutil.rmtree(again / "drafter")
    with jax.numpy_dtype_promotion("standard"):
        assert main(["--resume", "--out", str(again)]) == 0
    for name in ("config.json", "model.safetensors"):
        assert (again / "drafter" / name).read_bytes() == (finished / "drafter" / name).read_bytes()
    rows, before = curves.read(again / "metrics.jsonl"), curves.read(finished / "metrics.jsonl")
    speed = "tokens_per_second"
    assert [{**r, speed: 0} for r in rows] == [{**r, speed: 0} for r in before]


def test_an_interrupted_run_saves_and_continues(folder, finished, tmp_path, monkeypatch):
    """Ctrl-C within a step: the step ends, its state is saved, and the continued run ends like an undisturbed one."""
    import train.__main__ as module

    real, calls = module.train_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    out = tmp_path / "run"
    with jax.numpy_dtype_promotion("standard"):
        monkeypatch.setattr(module, "train_step", interrupted)
        assert main(words(folder, out)) == 130
        assert [f.name for f in (out / "checkpoints").iterdir()] == ["7"]
        monkeypatch.setattr(module, "train_step", real)
        assert main(["--resume", "--out", str(out)]) == 0
    ours, theirs = ((f / "drafter" / "model.safetensors").read_bytes() for f in (out, finished))
    assert ours == theirs


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(folder, tmp_path, capsys, monkeypatch):
    import train.__main__ as module

    real = module.train_step

    def poisoned(recipe, state, frozen, ids, mask):
        state, metrics = real(recipe, state, frozen, ids, mask)
        bad = int(state.step) == 13
        return state, metrics._replace(finite=jnp.asarray(False)) if bad else metrics

    monkeypatch.setattr(module, "train_step", poisoned)
    with jax.numpy_dtype_promotion("standard"):
        assert main(words(folder, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert "not finite at step 13" in error and "good checkpoint of step 10" in error
    assert (tmp_path / "run" / "checkpoints" / "10").is_dir()


def test_batches_are_a_function_of_the_step():
    ids = np.arange(10, dtype=np.int32)[:, None].repeat(3, axis=1)
    made = data.Dataset(ids, np.ones_like(ids, bool), seed=3)
    seen = np.concatenate([made.batch(step, 4).ids[:, 0] for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))  # each epoch, every sequence once
    assert list(seen[:10]) != list(seen[10:])
    assert (made.batch(2, 4).ids[:, 0] == seen[8:12]).all()


REFUSED = [
    pytest.param(["--data", "missing.jsonl"], "can't be read", id="no data"),
    pytest.param(["--target", "missing"], "config.json", id="no target"),
    pytest.param(["--length", "65"], "65 is beyond the target's 64 positions", id="too long"),
    pytest.param(["--mask-token-id", "40"], "outside the vocabulary", id="mask token"),
    pytest.param(["--taps", "0", "3"], "must name layers 0 to 2", id="taps"),
    pytest.param(["--pure-draft-prefix-len", "4"], "pure_draft_prefix_len", id="prefix"),
    pytest.param(["--batch", "0"], "--batch can't be 0", id="batch"),
    pytest.param(["--gamma", "0"], "--gamma can't be 0", id="gamma"),
    pytest.param(["--clip", "nan"], "--clip can't be nan", id="clip"),
    pytest.param(["--lambda-base-start", "2"], "--lambda-base-start can't be 2", id="lambda"),
    pytest.param(["--intermediate-size", "0"], "--intermediate-size can't be 0", id="width"),
    pytest.param(["--dtype", "float16"], "float32 or bfloat16", id="dtype"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_refusals(folder, tmp_path, capsys, more, message):
    assert main(words(folder, tmp_path / "run", *more)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1"),
        ('{"input_ids": [1, 2]}', "loss_mask"),
        ('{"input_ids": [1, 2], "loss_mask": [1]}', "1 entries for 2 ids"),
        ('{"input_ids": [1, 2], "tokens": [99]}', "outside the target's vocabulary"),
        ('{"text": "a"}', "no tokenizer"),
        ('{"words": "a"}', "expected input_ids"),
        ('{"input_ids": [1, 2], "tokens": [3]}', "no sequence with two neighbouring tokens"),
    ],
)
def test_refused_data(folder, tmp_path, capsys, line, message):
    (tmp_path / "data.jsonl").write_text(line + "\n")
    assert main(words(folder, tmp_path / "run", "--data", str(tmp_path / "data.jsonl"))) == 1
    assert message in capsys.readouterr().err


def test_a_run_is_not_overwritten_and_its_settings_stay(folder, finished, capsys):
    assert main(words(folder, finished)) == 1
    assert "--resume" in capsys.readouterr().err
    assert main(["--resume", "--out", str(finished), "--gamma", "1.0"]) == 1
    assert "leave out --gamma" in capsys.readouterr().err


def test_a_run_that_broke_off_before_its_first_checkpoint_resumes_from_the_beginning(folder, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints")
    shutil.rmtree(out / "drafter")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "lo')  # the disk was full
    with jax.numpy_dtype_promotion("standard"):
        assert main(["--resume", "--out", str(out)]) == 0
    ours, theirs = ((f / "drafter" / "model.safetensors").read_bytes() for f in (out, finished))
    assert ours == theirs
    assert [r["step"] for r in curves.read(out / "metrics.jsonl")] == [5, 10, 15, 20]


def test_a_resumed_run_may_go_on_more_gently_but_not_on_other_data(folder, finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints" / "20")
    with jax.numpy_dtype_promotion("standard"):
        assert main(["--resume", "--out", str(out), "--lr", "1e-3"]) == 0
    before, after = (curves.read(f / "metrics.jsonl")[2]["lr"] for f in (finished, out))
    assert after == pytest.approx(before / 10)
    settings = hf.read_json(out / "settings.json")
    other = tmp_path / "other.jsonl"
    other.write_text((folder / "data.jsonl").read_text() + '{"input_ids": [1, 2], "tokens": [3, 4]}\n')
    hf.write_json(out / "settings.json", settings | {"data": str(other)})
    assert main(["--resume", "--out", str(out)]) == 1
    assert "is not what this run began with" in capsys.readouterr().err


def test_the_chunks_gradients_are_summed_in_float32():
    """Computing in bfloat16, many small chunks must not lose the gradient of the head's projection."""
    config = make_draft(True, 0)
    rows, rng = 600, np.random.default_rng(0)
    z, rank = (jnp.asarray(rng.normal(size=(rows, n)).astype(np.float32)) for n in (16, 5))
    labels = jnp.asarray(rng.integers(0, 23, rows).astype(np.int32))
    leaves = flatten(init(config, jax.random.key(0), std=0.3))
    output = init(TARGET, jax.random.key(1), std=0.3).embed

    def gradient(dtype, kept: bool) -> np.ndarray:
        def loss(proj_out):
            given = leaves | {"head.proj_out": proj_out if kept else proj_out.astype(dtype)}
            (final, _), _ = _cross_entropies(unflatten(config, given), output.astype(dtype), *cast, 1)
            return final.sum()

        cast = z.astype(dtype), rank.astype(dtype), labels
        return np.asarray(jax.jit(jax.grad(loss))(leaves["head.proj_out"]))

    exact = gradient(jnp.float32, True)
    error, rounded = (np.linalg.norm(gradient(jnp.bfloat16, kept) - exact) for kept in (True, False))
    assert error < 0.01 * np.linalg.norm(exact)
    assert rounded > 3 * error, "the case does not tell"
    assert set(LOOPED) <= set(leaves)


def test_the_weights_tree_round_trips():
    config = make_draft(True, 1)
    module = init(config, jax.random.key(0))
    again = unflatten(config, flatten(module))
    assert jax.tree.structure(module) == jax.tree.structure(again)
    assert Train().lambda_base_decay_ratio == 1.0  # the public recipe
