"""Training runs: what they leave, how they resume after anything, and what they refuse."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from convert import hf
from convert.folders import convert_folder
from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.errors import DominoError
from domino_jax.runtime.files import lock_folder
from domino_jax.weights import flatten, init_weights
from train import config, options
from train.__main__ import main
from train.checkpoint import Checkpoints
from train.features import capture
from train.init import from_drafter
from train.monitor import curves
from train.monitor.divergence import DivergenceMonitor

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("quick_compilation")


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
    hf.save_hf(base / "target", init_weights(config, jax.random.key(0), std=0.2), config, config.to_hf())
    rows = []
    for i in range(24):
        prompt = [i % 39, (3 * i) % 39, (5 * i) % 39]
        rows.append({"input_ids": prompt, "tokens": [(prompt[-1] + 2 * k) % 39 for k in range(1, 22)]})
    (base / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return base


def words(folder, out, *more) -> list[str]:
    sizes = "--layers 1 --block-size 4 --target-layer-ids 0 1 --gru-hidden-dim 8 --emb-dim 6 --mask-token-id 39"
    run = "--steps 20 --batch 4 --length 24 --anchors 4 --save-every 10 --log-every 5 --lr 1e-2"
    given = ["--target", str(folder / "target"), "--data", str(folder / "data.jsonl"), "--out", str(out)]
    return [*given, *sizes.split(), *run.split(), *more]


@pytest.fixture(scope="module")
def finished(folder):
    assert main(words(folder, folder / "run")) == 0
    return folder / "run"


def test_a_run_leaves_what_it_promises(finished):
    rows = curves.read_metrics(finished / "metrics.jsonl")
    assert [r["step"] for r in rows] == [5, 10, 15, 20]
    assert rows[-1]["final_loss"] < rows[0]["final_loss"]
    assert rows[0]["lambda"] > rows[-1]["lambda"] > 0
    assert len(rows[0]["final_accuracy_by_position"]) == 4
    assert (finished / "curves.png").stat().st_size > 10_000
    assert "Step 20 of 20 (100%): finished" in (finished / "report.md").read_text()
    assert list((finished / "tensorboard").iterdir())
    settings = config.flat(options.read_recipe(finished / "settings.toml"))
    assert (settings["steps"], settings["dtype"], settings["mask_token_id"]) == (20, "float32", 39)
    raw = hf.read_json(finished / "drafter" / "config.json")
    draft = hf.parse_config(raw)
    assert isinstance(draft, DraftConfig) and draft.head == DominoHead(8, 6, 1)
    assert raw["architectures"] == ["DFlashDraftModel"] and raw["torch_dtype"] == "bfloat16"
    assert np.any(np.asarray(hf.load_hf(finished / "drafter", draft, jnp.float32).head.proj_out))


def test_the_newest_state_of_a_run_becomes_a_drafter(finished, tmp_path):
    assert convert_folder(finished, tmp_path / "drafter") == ("training run", "Hugging Face")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "drafter" / name).read_bytes() == (finished / "drafter" / name).read_bytes()
    shutil.copytree(finished, tmp_path / "earlier")
    shutil.rmtree(tmp_path / "earlier" / "checkpoints" / "20")
    convert_folder(tmp_path / "earlier", tmp_path / "half")
    draft = hf.parse_config(hf.read_json(tmp_path / "half" / "config.json"))
    half, whole = hf.load_hf(tmp_path / "half", draft), hf.load_hf(tmp_path / "drafter", draft)
    assert not np.array_equal(half.fc, whole.fc)
    shutil.rmtree(tmp_path / "earlier" / "checkpoints" / "10")
    with pytest.raises(DominoError, match="no checkpoint yet"):
        convert_folder(tmp_path / "earlier", tmp_path / "none")


@pytest.mark.slow
def test_a_run_begins_as_another_drafter_which_may_have_no_head(folder, finished, tmp_path):
    raw = hf.read_json(finished / "drafter" / "config.json")
    draft = hf.parse_config(raw)
    assert isinstance(draft, DraftConfig)
    theirs = flatten(hf.load_hf(finished / "drafter", draft, jnp.float32))
    ours = flatten(init_weights(draft, jax.random.key(5)))
    begun = from_drafter(ours, draft, finished / "drafter")
    assert all(np.array_equal(begun[path], theirs[path]) for path in ours)
    plain = dataclasses.replace(draft, head=None)
    hf.save_hf(tmp_path / "dflash", init_weights(plain, jax.random.key(6)), plain, plain.to_hf())
    begun = from_drafter(ours, draft, tmp_path / "dflash")
    assert np.array_equal(begun["head.proj_block"], ours["head.proj_block"]) and not np.array_equal(
        begun["fc"], ours["fc"]
    )
    with pytest.raises(DominoError, match="has block_size 4, this one 5"):
        from_drafter(ours, dataclasses.replace(draft, block_size=5), finished / "drafter")
    assert main(words(folder, tmp_path / "run", "--init-from", str(tmp_path / "dflash"))) == 0
    shutil.rmtree(tmp_path / "dflash")
    assert main(["--resume", "--out", str(tmp_path / "run")]) == 0, "what it began as is needed no more"
    assert (
        main(words(folder, tmp_path / "both", "--init-from", str(tmp_path / "dflash"), "--init", "target-layers")) == 2
    )


def test_resuming_is_bit_equal(finished, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    shutil.rmtree(again / "checkpoints" / "20")
    shutil.rmtree(again / "drafter")
    assert main(["--resume", "--out", str(again)]) == 0
    for name in ("config.json", "model.safetensors"):
        assert (again / "drafter" / name).read_bytes() == (finished / "drafter" / name).read_bytes()
    rows, before = curves.read_metrics(again / "metrics.jsonl"), curves.read_metrics(finished / "metrics.jsonl")
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
    assert "is not finite (loss" in error and "at step 13" in error and "good checkpoint of step 10" in error
    assert (tmp_path / "run" / "checkpoints" / "10").is_dir()


REFUSED = [
    pytest.param(["--data", "missing.jsonl"], "missing.jsonl", id="no data"),
    pytest.param(["--target", "missing"], "neither a name", id="no target"),
    pytest.param(["--length", "65"], "65 is beyond the target's 64 positions", id="too long"),
    pytest.param(["--mask-token-id", "40"], "outside the vocabulary", id="mask token"),
    pytest.param(["--target-layer-ids", "0", "3"], "must name layers 0 to 2", id="target layers"),
    pytest.param(["--pure-draft-prefix-len", "4"], "pure_draft_prefix_len", id="prefix"),
    pytest.param(["--batch", "0"], "--batch must be at least 1", id="batch"),
    pytest.param(["--mesh", "data"], "a mesh is given as data=1,fsdp=4,model=2, found 'data'", id="mesh"),
    pytest.param(["--mesh", "data=3"], "--batch 4 can't be divided", id="batch over the mesh"),
    pytest.param(["--mesh", "model=4"], "does not divide num_key_value_heads 2", id="heads over the mesh"),
    pytest.param(["--mesh", "data=16"], "needs 16 devices; found 8", id="devices"),
    pytest.param(["--features", "missing"], "missing", id="features"),
    pytest.param(["--validation", "missing"], "missing", id="validation"),
    pytest.param(["--init-from", "missing"], "missing is not a folder", id="init from"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_refusals(folder, tmp_path, capsys, more, message):
    failed = "missing" in " ".join(more) or "model=4" in more or "data=16" in more  # not to be seen in the words alone
    assert main(words(folder, tmp_path / "run", *more)) == (1 if failed else 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_run_is_not_overwritten_and_its_settings_stay(folder, finished, capsys):
    assert main(words(folder, finished)) == 1
    assert "--resume" in capsys.readouterr().err
    assert main(["--resume", "--out", str(finished), "--gamma", "1.0"]) == 2
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
    assert [r["step"] for r in curves.read_metrics(out / "metrics.jsonl")] == [5, 10, 15, 20]


def test_a_resumed_run_may_go_on_more_gently_but_not_on_other_data(folder, finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints" / "20")
    assert main(["--resume", "--out", str(out), "--lr", "1e-3"]) == 0
    before, after = (curves.read_metrics(f / "metrics.jsonl")[2]["lr"] for f in (finished, out))
    assert after == pytest.approx(before / 10)
    other = tmp_path / "other.jsonl"
    other.write_text((folder / "data.jsonl").read_text() + '{"input_ids": [1, 2], "tokens": [3, 4]}\n')
    assert main(["--resume", "--out", str(out), "--data", str(other)]) == 1
    assert "is not what this run began with" in capsys.readouterr().err


def test_a_gradient_that_explodes_stops_with_the_last_good_checkpoint(folder, tmp_path, capsys, monkeypatch):
    import train.run as module
    from train.monitor import divergence

    real = module.train_step

    def exploding(*given):
        state, metrics = real(*given)
        norm = metrics.gradient_norm * jnp.where(state.step == 17, 1e6, 1.0)
        return state, metrics._replace(gradient_norm=norm)

    monkeypatch.setattr(module, "train_step", exploding)
    monkeypatch.setattr(divergence, "LEAST", 5)
    assert main(words(folder, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert "the gradient has exploded" in error and "at step 17; --resume from the good checkpoint of step 10" in error
    assert "diverged" in (tmp_path / "run" / "report.md").read_text()


def test_only_what_is_far_from_usual_is_an_explosion():
    watch = DivergenceMonitor(10.0)
    assert watch.problem(True, 1.0, 500.0) is None  # the first steps say what is usual
    assert all(watch.problem(True, 1.0, 1.0 + i / 100) is None for i in range(30))
    assert watch.problem(True, 1.0, 9.0) is None
    assert "exploded (norm 15, usually 1.15" in str(watch.problem(True, 2.0, 15.0))
    assert "not finite (loss nan" in str(watch.problem(False, float("nan"), 1.0))


@pytest.fixture(scope="module")
def validated(folder):
    """A run that validates at 10, 15 and 20, and keeps one checkpoint besides the best."""
    rows = [{"input_ids": [i, 3 * i, 5 * i]} for i in range(1, 7)]
    (folder / "held.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    more = [
        "--validate-every",
        "5",
        "--keep",
        "1",
        "--validation-tokens",
        "12",
        "--validation-prompts",
        "4",
        "--ema",
        "0.5",
    ]
    assert main(words(folder, folder / "validated", "--validation", str(folder / "held.jsonl"), *more)) == 0
    return folder / "validated"


def test_validation_decodes_and_the_best_is_kept(validated):
    rows = {r["step"]: r for r in curves.read_metrics(validated / "metrics.jsonl") if "validation_tau" in r}
    assert list(rows) == [5, 10, 15, 20]
    assert all(1 <= r["validation_tau"] <= 5 and 1 <= r["validation_tau_base"] <= 5 for r in rows.values())
    best = max(rows, key=lambda step: rows[step]["validation_tau"])
    checkpoints = Checkpoints(validated / "checkpoints")
    assert checkpoints.best() == (best, rows[best]["validation_tau"])
    assert {int(f.name) for f in (validated / "checkpoints").iterdir()} == {best, 20}
    assert (validated / "best" / "model.safetensors").exists()
    assert f"Best: τ {rows[best]['validation_tau']:.3f} at step {best}" in (validated / "report.md").read_text()


def test_the_drafter_of_a_run_with_an_average_is_the_average(validated, tmp_path):
    convert_folder(validated, tmp_path / "drafter")
    ours, theirs = ((f / "model.safetensors").read_bytes() for f in (validated / "drafter", tmp_path / "drafter"))
    assert ours == theirs
    draft = hf.parse_config(hf.read_json(validated / "drafter" / "config.json"))
    tree = ocp.StandardCheckpointer().restore((validated / "checkpoints" / "20" / "default").absolute())
    found = np.asarray(hf.load_hf(validated / "drafter", draft, jnp.float32).fc)
    rounded = {part: np.asarray(tree[part]["fc"].astype(jnp.bfloat16), np.float32) for part in ("weights", "average")}
    assert np.array_equal(found, rounded["average"]) and not np.array_equal(found, rounded["weights"])


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(folder, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints" / "20")
    assert main(["--resume", "--out", str(out), "--mesh", "data=1,fsdp=2,model=2"]) == 0
    shutil.rmtree(out / "checkpoints" / "20")
    ours, theirs = (curves.read_metrics(f / "metrics.jsonl")[-1] for f in (out, finished))
    for key in ("loss", "final_loss", "base_loss", "gradient_norm"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
    assert main(["--resume", "--out", str(out), "--mesh", "model=1"]) == 0  # and back
    assert curves.read_metrics(out / "metrics.jsonl")[-1]["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_captured_features_train_as_computed_ones(folder, finished, tmp_path, capsys):
    target, rows = ["--target", str(folder / "target")], ["--data", str(folder / "data.jsonl"), "--length", "24"]
    assert capture.main([*target, *rows, "--out", str(tmp_path / "f"), "--taps", "0", "1"]) == 0
    assert main(words(folder, tmp_path / "run", "--features", str(tmp_path / "f"))) == 0
    ours, theirs = (curves.read_metrics(f / "metrics.jsonl")[0] for f in (tmp_path / "run", finished))
    assert ours["loss"] != theirs["loss"]  # stored in bfloat16
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
    capsys.readouterr()
    assert main(words(folder, tmp_path / "other", "--features", str(tmp_path / "f"), "--taps", "1", "2")) == 1
    assert "are of the target's layers [0, 1], the drafter reads [1, 2]" in capsys.readouterr().err


def test_a_full_disk_keeps_the_last_checkpoint(folder, finished, tmp_path, capsys, monkeypatch):
    """The kernel refuses what the second checkpoint writes; with room again, the run ends as an undisturbed one."""
    import train.run as module

    real, limits = module.train_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(*given):
        state, metrics = real(*given)
        if int(state.step) == 19:
            until = time.monotonic() + 60
            while not (out / "checkpoints" / "10").exists() and time.monotonic() < until:  # it is written beside
                time.sleep(0.02)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
        return state, metrics

    out = tmp_path / "run"
    monkeypatch.setattr(module, "train_step", filling)
    try:
        assert main(words(folder, out)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert "error: " in error and "File too large" in error
    assert [f.name for f in (out / "checkpoints").iterdir() if f.name.isdecimal()] == ["10"]
    monkeypatch.setattr(module, "train_step", real)
    assert main(["--resume", "--out", str(out)]) == 0
    ours, theirs = ((f / "drafter" / "model.safetensors").read_bytes() for f in (out, finished))
    assert ours == theirs


KILLED = """
import os, pathlib, sys
import jax
from train.__main__ import main

# The process dies at its n-th change of what a folder lists: between two writes, wherever that is.
last, count = int(sys.argv[1]), 0

def dying(event, arguments):
    global count
    if event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove") and "run" in str(arguments[0]):
        count += 1
        if count == last:
            os._exit(9)

sys.addaudithook(dying)
jax.config.update("jax_numpy_dtype_promotion", "standard")
status = main(sys.argv[2:])
print("changes", count)
sys.exit(status)
"""


def killed(at: int, words: list[str]) -> subprocess.CompletedProcess:
    """Train in a process of its own, which dies at that change."""
    command = [sys.executable, "-c", KILLED, str(at), *words]
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}  # the program of the other runs, to the bit
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "at", [pytest.param(n, marks=pytest.mark.slow) for n in (3, 6, 10, 15, 20, 25, 30, 35, 40, 45)]
)
def test_a_killed_run_resumes_bit_equal(folder, finished, tmp_path, at):
    out = tmp_path / "run"
    assert killed(at, words(folder, out)).returncode == 9
    if (out / "settings.toml").exists():
        assert main(["--resume", "--out", str(out)]) == 0
    else:
        assert main(words(folder, out)) == 0  # it had not begun
    ours, theirs = ((f / "drafter" / "model.safetensors").read_bytes() for f in (out, finished))
    assert ours == theirs
    assert [r["step"] for r in curves.read_metrics(out / "metrics.jsonl")] == [5, 10, 15, 20]


def test_a_signal_during_a_validation_saves_at_once(folder, validated, tmp_path, monkeypatch):
    import train.run as module

    real, calls = module.Validation.run, []

    def interrupted(self, weights, stopping=None):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(self, weights, stopping)

    monkeypatch.setattr(module.Validation, "run", interrupted)
    out = tmp_path / "run"
    shutil.copytree(validated, out)
    for step in ("checkpoints", "drafter", "best"):
        shutil.rmtree(out / step)
    assert main(["--resume", "--out", str(out)]) == 130
    assert [r["step"] for r in curves.read_metrics(out / "metrics.jsonl") if "validation_tau" in r] == [5]
    assert Checkpoints(out / "checkpoints").latest() == 10


def test_two_runs_do_not_write_into_one_folder(folder, tmp_path, capsys):
    with lock_folder(tmp_path / "run"):
        assert main(words(folder, tmp_path / "run")) == 1
    assert f"error: {tmp_path / 'run'} is being written by another process" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_has_the_same_target(folder, finished, tmp_path, capsys):
    out, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished, out)
    config = TargetConfig(40, 32, 3, 4, 2, 8, 48, 1e-6, 1e4, 64, True)
    hf.save_hf(other, init_weights(config, jax.random.key(1), std=0.2), config, config.to_hf())
    assert main(["--resume", "--out", str(out), "--target", str(other)]) == 1
    assert "other is not what this run began with: a resumed run needs the same target" in capsys.readouterr().err
