"""`python -m infer.bench device`: what it runs, what it keeps when it is cut off, and the page that it makes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import pytest

from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError, parse_words
from domino_jax.runtime.devices import GIB
from infer.bench import correctness, device, probe
from infer.bench.device import DeviceBench, DevicePart, PartName, check_device, list_parts, run_device, run_part
from infer.bench.device_report import report
from infer.bench.forms import ComparedForm, run_form
from infer.bench.options import Bench, check_bench
from infer.bench.products import Products, check_products
from train.bench.command import TrainBench

FOUND = {
    **{"commit": "abc", "jax": "0", "platform": "tpu", "device": "TPU v5 lite", "devices": 8, "processor": "p"},
    **{"memory_bytes": 16 * GIB, "shapes": "qwen3-8b", "mesh": "data=1,model=8", "training_mesh": "fsdp=8"},
    **{"data": 1, "used": 8, "fits": True},
}
ALONE = FOUND | {"shapes": "demo", "mesh": None, "training_mesh": None, "used": 1}
SPEED_ROW = {
    **{"context": 48, "batch": 1, "mode": "plain", "drafts": 0, "tokens_per_second": 1234.0},
    **{"ms_per_cycle": 2.5, "cycle_over_step": 1.0, "prefill_s": 0.1, "compile_s": 3.0},
}


@pytest.mark.parametrize("found", [FOUND, FOUND | {"data": 2, "mesh": "data=2,model=4"}, ALONE], ids=str)
def test_every_part_is_a_command_that_takes_its_words(found):
    parts = list_parts(found)
    assert tuple(part.name for part in parts) == get_args(PartName)
    assert [part.name for part in parts[:2]] == ["attention", "drafters"]  # correctness first
    for part in parts:
        room, *words = part.words
        if room == "train":
            parse_words(TrainBench, words[1:], prog="train bench")
        elif words[0] == "correctness":
            asked = parse_words(correctness.Correctness, [*words[1:], "--json", "x"], prog="correctness")
            correctness.check_correctness(asked)
        elif words[0] == "products":
            check_products(parse_words(Products, words[1:], prog="products"))
        else:
            options = parse_words(Bench, words, prog="infer.bench")
            check_bench(options)
            assert all(batch % found["data"] == 0 for batch in options.batch_sizes)


@pytest.mark.parametrize("case", correctness.TRIED)
def test_every_drafter_is_a_command_that_takes_its_words(case):
    check_bench(parse_words(Bench, [*correctness.COMMON, *correctness.TRIED[case]], prog="infer.bench"))


@pytest.mark.parametrize(
    ("memory", "count", "shapes", "model"),
    [
        (None, 1, "demo", 1),
        (80e9, 1, "qwen3-8b", 1),
        (32 * GIB, 1, "qwen3-8b", 1),
        (16 * GIB, 1, "qwen3-4b", 1),
        (16 * GIB, 8, "qwen3-8b", 8),
        (8 * GIB, 1, "qwen3-1.7b", 1),
        (32 * GIB, 3, "qwen3-8b", 2),  # three do not divide its heads
    ],
)
def test_the_largest_shape_that_fits_is_taken(memory, count, shapes, model):
    assert probe.choose_shape(None, None, count, memory) == (shapes, (1, model), True)


def test_a_shape_that_is_asked_for_is_taken_whether_it_fits_or_not():
    assert probe.choose_shape("qwen3-32b", None, 1, 16 * GIB) == ("qwen3-32b", (1, 1), False)
    assert probe.choose_shape("qwen3-32b", (2, 4), 8, 16 * GIB) == ("qwen3-32b", (2, 4), False)
    with pytest.raises(DominoError, match="needs 8 devices; found 2"):
        probe.choose_shape("qwen3-8b", (1, 8), 2, 16 * GIB)
    with pytest.raises(DominoError, match="no-such-shape"):
        probe.choose_shape("no-such-shape", None, 1, None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seconds": 29}, "--seconds must be at least 30"),
        ({"mesh": "model"}, "a mesh is given as"),
        ({"shapes": ""}, "--shapes is empty"),
        ({"json": Path(__file__)}, "is to be a folder"),
        ({"json": Path(__file__).parent}, "holds files already"),
    ],
)
def test_words_that_make_no_sense(options, says, tmp_path):
    with pytest.raises((UsageError, DominoError), match=says):
        check_device(DeviceBench(**({"json": tmp_path / "new"} | options)))


def started(monkeypatch: Any, folder: Path, parts: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Run the command with parts that are played: a status, or an exception; what it has written."""

    def play(part: DevicePart, folder: Path, seconds: float) -> dict[str, Any]:
        if part.name == "probe":
            (folder / "probe.json").write_text(json.dumps(ALONE))
        became = parts.get(part.name, "done")
        if isinstance(became, BaseException):
            raise became
        return {"status": became, "seconds": 1.0, "reason": "it broke"}

    monkeypatch.setattr(device, "run_part", play)
    monkeypatch.setattr(device, "exit_on_sigterm", lambda: None)
    try:
        run_device(DeviceBench(json=folder, **options))
    finally:
        whole = json.loads((folder / "device.json").read_text())
        assert (folder / "report.md").read_text() == report(folder)
        parts["found"] = {part["name"]: part["status"] for part in whole["parts"]}
    return whole


@pytest.mark.parametrize("signalled", [KeyboardInterrupt(), SystemExit(143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_leaves_the_page_of_what_is_done(signalled, monkeypatch, tmp_path):
    parts: dict[str, Any] = {"speed": signalled}
    with pytest.raises(type(signalled)):
        started(monkeypatch, tmp_path / "new", parts)
    became = list(parts["found"].values())
    assert became == ["done", "done", "cut off"] + ["not begun"] * (len(became) - 3)


def test_a_part_that_fails_does_not_take_the_others_with_it(monkeypatch, tmp_path):
    parts: dict[str, Any] = {"attention": "failed", "int8": "failed", "batches": "cut off"}
    with pytest.raises(DominoError, match=r"attention, int8 failed; .*report\.md says why"):
        started(monkeypatch, tmp_path, parts)
    assert parts["found"]["training"] == "done" and parts["found"]["batches"] == "cut off"
    assert "it broke" in (tmp_path / "report.md").read_text()


def test_what_there_is_no_time_for_is_not_begun_and_said(monkeypatch, tmp_path):
    clock = iter(range(0, 10_000, 12))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    found = started(monkeypatch, tmp_path, {}, seconds=100)
    became = [part["status"] for part in found["parts"]]
    assert became[0] == "done" and became[-1] == "not begun"
    assert "| training | not begun |" in (tmp_path / "report.md").read_text()


def test_without_a_device_nothing_is_begun(monkeypatch, tmp_path):
    with pytest.raises(DominoError, match="no device can be used: it broke"):
        started(monkeypatch, tmp_path, {"probe": "failed"})
    assert "No device was found." in (tmp_path / "report.md").read_text()


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("program", "status", "reason"),
    [
        ("pass", "done", None),
        ("print('error: too large'); raise SystemExit(1)", "failed", "too large"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "failed", "exit code -9"),
        ("import time; time.sleep(60)", "cut off", None),
        ("import time, signal; signal.signal(2, signal.SIG_IGN); time.sleep(60)", "cut off", None),
    ],
)
def test_a_part_is_done_failed_or_cut_off(program, status, reason, monkeypatch, tmp_path):
    monkeypatch.setattr(device, "own_command", lambda words: [sys.executable, "-c", program])
    monkeypatch.setattr(device, "GRACE", 0.2)
    began = time.monotonic()
    seconds = 1.0 if status == "cut off" else 60.0
    done = run_part(DevicePart("x", 1.0, ["y"]), tmp_path, seconds)
    assert (done["status"], done.get("reason")) == (status, reason) and time.monotonic() - began < 60


@pytest.mark.e2e
def test_ctrl_c_while_a_part_is_started_ends_it(monkeypatch, tmp_path):
    """The signal comes when the process is there and nobody knows of it yet."""
    begun: list[Any] = []
    popen = subprocess.Popen

    def start(*words: Any, **how: Any) -> Any:
        begun.append(popen(*words, **how))
        signal.raise_signal(signal.SIGINT)
        return begun[0]

    monkeypatch.setattr(device, "own_command", lambda words: [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(device.subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        run_part(DevicePart("x", 1.0, ["y"]), tmp_path, 60.0)
    assert begun[0].poll() is not None


def test_the_page_is_made_of_whatever_is_there(tmp_path):
    assert "No device was found." in report(tmp_path) and "Nothing was checked." in report(tmp_path)
    equal = {"group": "attention over caches", "backend": "pallas", "dtype": "bfloat16", "status": "equal"}
    checks = [
        equal | {"case": "plain step", "error": 0.001, "bound": 0.02},
        equal | {"case": "tree", "status": "differs", "error": 0.5, "bound": 0.02},
        equal | {"case": "verification", "status": "begun"},
        equal | {"case": "plain step", "backend": "cudnn", "status": "refused", "reason": "needs an NVIDIA GPU"},
    ]
    parts = [{"name": "speed", "status": "cut off", "seconds": 3.2, "command": "a | b"}]
    (tmp_path / "device.json").write_text(json.dumps({"found": FOUND, "seconds": 480, "parts": parts}))
    (tmp_path / "attention.json").write_text(json.dumps(checks))
    (tmp_path / "speed.json").write_text(json.dumps([SPEED_ROW]))
    (tmp_path / "batches.json").write_text('[{"context": 1, ')  # the process ended while it wrote
    (tmp_path / "training.json").write_text("[1]")
    page = report(tmp_path)
    assert "8 x TPU v5 lite (tpu), 16.0 GiB each" in page and "qwen3-8b, random weights" in page
    assert "| attention over caches | pallas | bfloat16 | 1 | 1 | 1 |  | 5.0e-01 |" in page
    assert "**attention over caches tree pallas bfloat16: differs** (error 5.0e-01, at most 2e-02)" in page
    assert "verification pallas bfloat16: failed** (it had not come to its end)" in page
    assert "- not here: cudnn: needs an NVIDIA GPU" in page
    assert "| 48 | 1 | plain | 0 | 1,234 | 2.50 | 1.00 | 0.100 | 3 |" in page
    assert "## Batch sizes" not in page and "## Training step\n\nThe file can't be read." in page
    assert r"| speed | cut off | 3 |  | `a \| b` |" in page
    parts.append({"name": "attention", "status": "cut off", "seconds": 3.2, "command": "c"})
    (tmp_path / "device.json").write_text(json.dumps({"found": FOUND, "seconds": 480, "parts": parts}))
    page = report(tmp_path)
    assert "had not come" not in page and "| attention | cut off |" in page
    assert "- attention over caches verification pallas bfloat16: its time was over" in page


@pytest.mark.parametrize(
    ("run", "status"),
    [
        (lambda x: 2 * x, "equal"),
        (lambda x: 2.01 * x, "differs"),
        (lambda x: x / 0, "differs"),
        (lambda x: x @ jnp.ones((7, 7)), "failed"),
    ],
)
def test_a_form_is_equal_differs_or_fails(run, status):
    found = run_form(ComparedForm("a", "b", "c", run, lambda x: 2 * x, (jnp.ones((3, 5)),)), "float32")
    assert found["status"] == status and ("error" in found) == (status != "failed")


@pytest.mark.e2e
@pytest.mark.slow
def test_the_whole_runs_here_on_the_shipped_pair_and_its_report_is_whole(tmp_path):
    """Every part, within its time; nothing differs."""
    words = [sys.executable, "-m", "infer.bench", "device", "--json", str(tmp_path / "new"), "--shapes", "demo"]
    done = subprocess.run([*words, "--seconds", "1500"], capture_output=True, text=True, timeout=1600)
    page = (tmp_path / "new" / "report.md").read_text()
    assert done.returncode == 0, done.stderr + page
    whole = json.loads((tmp_path / "new" / "device.json").read_text())
    assert {part["status"] for part in whole["parts"]} == {"done"}
    assert "## Training step" in page and "can't be read" not in page and "**" not in page


@pytest.mark.e2e
@pytest.mark.slow
def test_ctrl_c_ends_it_and_what_it_runs(tmp_path):
    words = [sys.executable, "-m", "infer.bench", "device", "--json", str(tmp_path / "new"), "--shapes", "demo"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert process.stderr and process.stderr.readline().startswith("attention: ")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "| attention | cut off |" in (tmp_path / "new" / "report.md").read_text()
