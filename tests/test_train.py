"""Training runs: what they leave, how they resume after anything, and what they refuse."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import hf
from convert.folders import convert
from domino_jax.config import DraftConfig, HeadConfig, TargetConfig
from domino_jax.errors import DominoError
from domino_jax.weights import flatten, init
from train import curves
from train.__main__ import main
from train.warm import from_drafter

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def promotion():
    """optax mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


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
    assert main(words(folder, folder / "run")) == 0
    return folder / "run"


def test_a_run_leaves_what_it_promises(finished):
    rows = curves.read(finished / "metrics.jsonl")
    assert [r["step"] for r in rows] == [5, 10, 15, 20]
    assert rows[-1]["final_loss"] < rows[0]["final_loss"]
    assert rows[0]["lambda"] > rows[-1]["lambda"] > 0
    assert len(rows[0]["final_accuracy_by_position"]) == 4
    assert (finished / "curves.png").stat().st_size > 10_000
    assert "Step 20 of 20 (100%): finished" in (finished / "report.md").read_text()
    assert list((finished / "tensorboard").iterdir())
    settings = config.flat(config.read(finished / "settings.toml"))
    assert (settings["steps"], settings["dtype"], settings["mask_token_id"]) == (20, "float32", 39)
    raw = hf.read_json(finished / "drafter" / "config.json")
    draft = hf.parse_config(raw)
    assert isinstance(draft, DraftConfig) and draft.head == HeadConfig(8, 6, 1)
    assert raw["architectures"] == ["DominoDraftModel"] and raw["torch_dtype"] == "bfloat16"
    assert np.any(np.asarray(hf.load(finished / "drafter", draft, jnp.float32).head.proj_out))


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
    assert main(words(folder, tmp_path / "run", "--begin-as", str(tmp_path / "dflash"), "--steps", "5")) == 0
    shutil.rmtree(tmp_path / "dflash")
    assert main(["--resume", "--out", str(tmp_path / "run")]) == 0, "what it began as is needed no more"
    assert main(words(folder, tmp_path / "both", "--begin-as", str(tmp_path / "dflash"), "--warm")) == 1


def test_resuming_is_bit_equal(finished, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    shutil.rmtree(again / "checkpoints" / "20")
    shutil.rmtree(again / "drafter")
    assert main(["--resume", "--out", str(again)]) == 0
    for name in ("config.json", "model.safetensors"):
        assert (again / "drafter" / name).read_bytes() == (finished / "drafter" / name).read_bytes()
    rows, before = curves.read(again / "metrics.jsonl"), curves.read(finished / "metrics.jsonl")
    speed = "tokens_per_second"
    assert [{**r, speed: 0} for r in rows] == [{**r, speed: 0} for r in before]


def test_an_interrupted_run_saves_and_continues(folder, finished, tmp_path, monkeypatch):
    """Ctrl-C within a step: the step ends, its state is saved, and the continued run ends like an undisturbed one."""
    import train.run as module

    real, calls = module.train_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    out = tmp_path / "run"
    monkeypatch.setattr(module, "train_step", interrupted)
    assert main(words(folder, out)) == 130
    assert [f.name for f in (out / "checkpoints").iterdir()] == ["7"]
    monkeypatch.setattr(module, "train_step", real)
    assert main(["--resume", "--out", str(out)]) == 0
    ours, theirs = ((f / "drafter" / "model.safetensors").read_bytes() for f in (out, finished))
    assert ours == theirs


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(folder, tmp_path, capsys, monkeypatch):
    import train.run as module

    real = module.train_step

    def poisoned(*given):
        state, metrics = real(*given)
        bad = int(state.step) == 13
        return state, metrics._replace(finite=jnp.asarray(False)) if bad else metrics

    monkeypatch.setattr(module, "train_step", poisoned)
    assert main(words(folder, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert "not finite at step 13" in error and "good checkpoint of step 10" in error
    assert (tmp_path / "run" / "checkpoints" / "10").is_dir()


REFUSED = [
    pytest.param(["--data", "missing.jsonl"], "missing.jsonl", id="no data"),
    pytest.param(["--target", "missing"], "neither a name", id="no target"),
    pytest.param(["--length", "65"], "65 is beyond the target's 64 positions", id="too long"),
    pytest.param(["--mask-token-id", "40"], "outside the vocabulary", id="mask token"),
    pytest.param(["--taps", "0", "3"], "must name layers 0 to 2", id="taps"),
    pytest.param(["--pure-draft-prefix-len", "4"], "pure_draft_prefix_len", id="prefix"),
    pytest.param(["--batch", "0"], "--batch can't be 0", id="batch"),
    pytest.param(["--mesh", "data=3"], "--batch 4 can't be divided", id="batch over the mesh"),
    pytest.param(["--mesh", "model=4"], "does not divide num_key_value_heads 2", id="heads over the mesh"),
    pytest.param(["--mesh", "data=16"], "needs 16 devices; found 8", id="devices"),
    pytest.param(["--features", "missing"], "missing", id="features"),
    pytest.param(["--validation", "missing"], "missing", id="validation"),
    pytest.param(["--begin-as", "missing"], "missing is not a folder", id="begin as"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_refusals(folder, tmp_path, capsys, more, message):
    assert main(words(folder, tmp_path / "run", *more)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


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
    assert main(["--resume", "--out", str(out)]) == 0
    ours, theirs = ((f / "drafter" / "model.safetensors").read_bytes() for f in (out, finished))
    assert ours == theirs
    assert [r["step"] for r in curves.read(out / "metrics.jsonl")] == [5, 10, 15, 20]


def test_a_resumed_run_may_go_on_more_gently_but_not_on_other_data(folder, finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints" / "20")
    assert main(["--resume", "--out", str(out), "--lr", "1e-3"]) == 0
    before, after = (curves.read(f / "metrics.jsonl")[2]["lr"] for f in (finished, out))
    assert after == pytest.approx(before / 10)
    settings = hf.read_json(out / "settings.json")
    other = tmp_path / "other.jsonl"
    other.write_text((folder / "data.jsonl").read_text() + '{"input_ids": [1, 2], "tokens": [3, 4]}\n')
    hf.write_json(out / "settings.json", settings | {"data": str(other)})
    assert main(["--resume", "--out", str(out)]) == 1
    assert "is not what this run began with" in capsys.readouterr().err
