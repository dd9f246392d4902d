"""Several processes on loopback that run one model: the answers of one process, printed by the first."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from factory import make_draft, make_target

from domino_jax.errors import DominoError
from domino_jax.runtime import processes
from domino_jax.runtime.command import exit_code
from infer.__main__ import main

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("hosts")
    make_target(root / "target")
    make_draft(root / "draft")
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("one", "two", "three")))
    words = ["--model", str(root / "target"), "--draft", str(root / "draft"), "--prompts", str(root / "prompts.jsonl")]
    return [*words, "--json", "--max-new-tokens", "20"]


def start(
    words: list[str], count: int, program: tuple[str, str], last: list[str] | None = None
) -> list[subprocess.Popen[str]]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    port = free_port()
    running = []
    for i in range(count):
        place = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count), "--process-id", str(i)]
        command = [sys.executable, *program, *words, *(place if count > 1 else []), *(last or [])]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **pipes))
    return running


def launch(words: list[str], count: int, program: tuple[str, str] = ("-m", "infer")) -> list[tuple[int, str, str]]:
    """Exit status, standard output and standard error of each process."""
    done = []
    for process in start(words, count, program):
        out, err = process.communicate(timeout=240)
        done.append((process.returncode, out, err))
    return done


@pytest.fixture(scope="module")
def alone(words) -> list[list[int]]:
    with redirect_stdout(io.StringIO()) as out:
        assert main([*words, "--mesh", "data=1,model=1"]) == 0
    return [json.loads(line)["tokens"] for line in out.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("count", "more"),
    [
        (2, ["--mesh", "data=2"]),
        # What each measures differs; what they do must not.
        pytest.param(2, ["--mesh", "model=2", "--drafts", "auto"], marks=pytest.mark.slow),
        pytest.param(4, ["--mesh", "data=2,model=2"], marks=pytest.mark.slow),
    ],
    ids=["2, rows", "2, weights, drafts auto", "4, both"],
)
def test_processes_together_give_the_tokens_of_one(words, alone, count, more):
    first, *others = launch([*words, *more], count)
    assert first[0] == 0, first[2]
    assert [json.loads(line)["tokens"] for line in first[1].splitlines()] == alone
    for status, out, err in others:
        assert (status, out) == (0, ""), err
        assert "tokens" not in err


CONVERSATION = """
import json, sys
from pathlib import Path
from convert.loading import load_model
from domino_jax.runtime.processes import ProcessConfig, join_processes
from domino_jax.sharding import parse_mesh
folder, mesh, *place = sys.argv[1:]
first = join_processes(ProcessConfig(place[1], int(place[3]), int(place[5])) if place else None)
from infer.engine import Engine
loaded = load_model(Path(folder) / "target", Path(folder) / "draft", mesh=parse_mesh(mesh))
engine, ids, turns = Engine(loaded), [50, 60, 70] * 20, []
slots = engine.slots(1)
for _ in range(2):
    turn, _ = engine.sequence(ids, 6)
    engine.generate([turn], slots=slots)
    turns.append([turn.tokens, turn.accepted, turn.reused])
    ids = [*turn.ids, *[90] * 15]
if first:
    print(json.dumps(turns))
"""


@pytest.mark.slow
def test_a_conversation_keeps_its_caches_in_every_process(words):
    folder = str(Path(words[1]).parent)
    (alone,) = launch([folder, "data=1,model=1"], 1, ("-c", CONVERSATION))
    assert alone[0] == 0, alone[2]
    first, other = launch([folder, "data=1,model=2"], 2, ("-c", CONVERSATION))
    assert (first[0], other[0]) == (0, 0), first[2] + other[2]
    assert json.loads(first[1]) == json.loads(alone[1]) and other[1] == ""
    assert json.loads(first[1])[1][-1] > 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("here:1", None, None), "--num-processes (or JAX_NUM_PROCESSES) and --process-id"),
        (("here:1", 2, 2), "from 0 to 1"),
    ],
)
def test_half_of_a_place_is_refused(given, says, monkeypatch):
    for name in processes.VARIABLES.values():
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DominoError) as error:
        processes.resolve_processes(*given)
    assert says in str(error.value)


def test_the_environment_counts_where_flags_are_silent(monkeypatch):
    for name, value in zip(processes.VARIABLES.values(), ("there:9", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)
    assert processes.resolve_processes(None, None, None) == processes.ProcessConfig("there:9", 4, 3)
    assert processes.resolve_processes(None, None, 1) == processes.ProcessConfig("there:9", 4, 1)
    monkeypatch.setenv("JAX_PROCESS_ID", "three")
    with pytest.raises(DominoError, match="whole numbers"):
        processes.resolve_processes(None, None, None)


@pytest.mark.slow
def test_processes_together_write_the_answers_of_one_into_one_file_and_measure_as_one(words, tmp_path):
    rows = [{"input_ids": [40 + i, 60, 70 + i]} for i in range(5)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def regenerate(out: str, count: int) -> list[tuple[int, str, str]]:
        given = ["regenerate", "--target", words[1], "--draft", words[3], "--data", str(tmp_path / "data.jsonl")]
        given += ["--out", str(tmp_path / out), "--max-new-tokens", "12", "--batch-size", "2", "--temperature", "1"]
        return launch([*given, "--mesh", f"data={count},model=1"], count, ("-m", "train"))

    ((status, _, error),) = regenerate("alone.jsonl", 1)
    assert status == 0, error
    whole = (tmp_path / "alone.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "both.jsonl").write_text("".join(whole[:2]) + whole[2][:9])  # killed after two, and within the third
    settings = (tmp_path / "alone.jsonl.settings.json").read_text()
    (tmp_path / "both.jsonl.settings.json").write_text(settings)
    first, other = regenerate("both.jsonl", 2)
    assert (first[0], other[0]) == (0, 0), first[2] + other[2]
    assert "5 answers in " in first[1] and "3 now" in first[1] and other[1] == ""
    assert "answers" not in other[2]
    assert sorted((tmp_path / "both.jsonl").read_text().splitlines(keepends=True)) == sorted(whole)

    validate = ["validate", "--target", words[1], "--draft", words[3], "--prompts", str(tmp_path / "data.jsonl")]
    validate += ["--new-tokens", "8", "--batch-size", "4", "--json"]
    ((status, found, error),) = launch([*validate, "--mesh", "data=1"], 1, ("-m", "train"))
    assert status == 0, error
    first, other = launch([*validate, "--mesh", "data=2"], 2, ("-m", "train"))
    assert (first[0], other[0], other[1]) == (0, 0, ""), first[2] + other[2]
    assert json.loads(first[1])["final_tau_per_prompt"] == json.loads(found)["final_tau_per_prompt"]


@pytest.mark.slow
@pytest.mark.parametrize(("told", "number"), [(1, signal.SIGTERM), (0, signal.SIGINT)])
def test_one_process_is_told_to_stop_and_all_stop_with_a_whole_file(words, tmp_path, told, number):
    rows = [{"input_ids": [40 + i % 100, 60, 70]} for i in range(3000)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    given = ["regenerate", "--target", words[1], "--data", str(tmp_path / "data.jsonl"), "--out", str(out)]
    given += ["--max-new-tokens", "100", "--batch-size", "4", "--temperature", "0", "--mesh", "data=2"]
    running = start(given, 2, ("-m", "train"))
    try:
        deadline = time.monotonic() + 120
        while not (out.exists() and out.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.2)
        running[told].send_signal(number)
        done = [process.communicate(timeout=60) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [130, 130], done
    lines = out.read_text().splitlines(keepends=True)
    assert 0 < len(lines) < len(rows) and all(line.endswith("}\n") for line in lines)
    assert f"interrupted: {len(lines)} answers in {out}" in done[0][1] and "interrupted" not in done[1][1]


FAILING = """
import sys
from domino_jax.errors import DominoError
from domino_jax.runtime.command import end_process
from train.regenerate import command, output

place = sys.argv.pop()
def fails(*_):
    raise DominoError("this one fails.")
after = 3
def fails_later(answers, number, values, add=getattr(output, place.split(".")[0]).__dict__.get("add")):
    global after
    after -= 1
    return add(answers, number, values) if after else fails()
whose, _, method = place.partition(".")
setattr(getattr(output, whose), method, fails_later if method == "add" else fails)
end_process(command.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "failing"),
    [("Answers.__init__", 0), ("Answers.add", 0), ("FollowedAnswers.__init__", 1), ("FollowedAnswers.add", 1)],
)
def test_when_one_process_of_several_fails_no_other_waits(words, tmp_path, place, failing):
    rows = [{"input_ids": [40 + i % 100, 60, 70]} for i in range(200)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--target", words[1], "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    given += ["--max-new-tokens", "30", "--batch-size", "4", "--temperature", "0", "--mesh", "data=2"]
    running = start(given, 2, ("-c", FAILING), last=[place])
    try:
        said = [process.communicate(timeout=90) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [1, 1], said
    assert not any("Traceback" in err for _, err in said)
    assert all(err.count("error: ") == 1 for _, err in said)
    if not place.startswith("FollowedAnswers.__init__"):  # there all say that they do not see the same file
        assert "error: this one fails." in said[failing][1]


def signal_one(
    running: list[subprocess.Popen[str]], told: int, number: signal.Signals
) -> tuple[list[tuple[str, str]], float]:
    """Send a signal to one of several processes, and wait for all: what they said, and the seconds it took."""
    running[told].send_signal(number)
    began = time.monotonic()
    said = [process.communicate(timeout=60) for process in running]
    return said, time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "number", "code"), [(1, signal.SIGINT, 130), (0, signal.SIGINT, 130), (1, signal.SIGTERM, 143)]
)
def test_when_one_process_ends_early_all_do_within_seconds(words, told, number, code, tmp_path):
    """They would wait in a collective for what it will never send."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n' * 5000)
    running = start([*words, "--prompts", str(prompts), "--mesh", "data=1,model=2"], 2, ("-m", "infer"))
    try:
        assert running[0].stdout is not None and running[0].stdout.readline(), "it writes, and will for minutes"
        said, took = signal_one(running, told, number)
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [code, code], said
    assert took < 20 and not any("Traceback" in err for _, err in said)
    ended = [processes.ENDED_EARLY in err for _, err in said]
    assert ended[1 - told] and not ended[told]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_process_vanishes_the_other_ends_with_a_sentence(words, killed, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n' * 5000)
    running = start([*words, "--prompts", str(prompts), "--mesh", "data=1,model=2"], 2, ("-m", "infer"))
    try:
        assert running[0].stdout is not None and running[0].stdout.readline(), "it writes, and will for minutes"
        said, took = signal_one(running, killed, signal.SIGKILL)
    finally:
        for process in running:
            process.kill()
    assert running[killed].returncode == -signal.SIGKILL and running[1 - killed].returncode == 1, said
    assert took < 50 and said[1 - killed][1].count("error: ") == 1, said


JOINED = """
import sys
from domino_jax.runtime import processes
from domino_jax.runtime.command import exit_code
from domino_jax.runtime.command import end_process
watch_others = processes._watch_others
def joined():
    watch_others()
    print("joined", file=sys.stderr, flush=True)
processes._watch_others = joined
from infer import __main__ as infer
if "--coordinator" not in sys.argv:
    start = infer.join_processes
    infer.join_processes = lambda *given: (print("joined", file=sys.stderr, flush=True), start(*given))[1]
end_process(infer.main(sys.argv[1:]))
"""
MOMENTS = [0.0, 0.3, 0.8, 1.5, 2.5, 4.0, 6.0, 9.0, 13.0]  # s after the start: loading, compiling, calibrating, decoding


@pytest.mark.parametrize(
    ("count", "told", "number", "moment"),
    [
        (1, 0, signal.SIGINT, 1.5),
        (2, 1, signal.SIGTERM, 0.3),
        *(pytest.param(1, 0, signal.SIGINT, moment, marks=pytest.mark.slow) for moment in MOMENTS),
        *(
            pytest.param(2, i % 2, number, moment, marks=pytest.mark.slow)
            for i, moment in enumerate(MOMENTS)
            for number in (signal.SIGINT, signal.SIGTERM)
        ),
    ],
)
def test_a_signal_at_any_moment_ends_every_process(words, count, told, number, moment, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n' * 5000)
    given = [*words, "--prompts", str(prompts), "--drafts", "auto", "--mesh", f"data=1,model={count}"]
    running = start(given, count, ("-c", JOINED))
    try:
        stream = running[told].stderr
        assert stream is not None and any(line == "joined\n" for line in stream)
        time.sleep(moment)
        said, took = signal_one(running, told, number)
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [128 + number] * count, said
    assert took < 25 and not any("Traceback" in err or "Exception ignored" in err for _, err in said)


@pytest.mark.parametrize(
    "said", ["INTERNAL: Gloo all-reduce failed", "UNAVAILABLE: socket closed\nmore", "ABORTED: x."]
)
def test_a_failure_of_devices_among_others_is_a_sentence(monkeypatch, capsys, said):
    def fails() -> None:
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(processes, "_joined", True)
    monkeypatch.setattr(processes, "code_of_others", lambda: None)
    assert exit_code(fails) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: the devices have failed, as they do when another process is gone: ")
    assert err.count("\n") == 1 and said.split()[0] in err
    monkeypatch.setattr(processes, "_joined", False)
    with pytest.raises(jax.errors.JaxRuntimeError):
        exit_code(fails)


@pytest.mark.parametrize("code", [1, 130, 143])
def test_others_are_told_and_told_apart(monkeypatch, code):
    """What a process writes for the others, and reads of them."""
    store: dict[str, str] = {}
    fake = SimpleNamespace(
        key_value_try_get=lambda key: store[key],
        key_value_set=lambda key, value: store.update({key: value}),
        key_value_dir_get=lambda prefix: [key for key in store if key.startswith(prefix)],
    )
    monkeypatch.setattr(processes, "_store", lambda: fake)
    monkeypatch.setattr(processes, "_ending", False)
    processes.end_others(code)
    assert store == {} and processes.code_of_others(0) is None  # on its own
    monkeypatch.setattr(processes, "_joined", True)
    processes.end_others(code)
    assert processes.code_of_others(0) == code and len(store) == 2
