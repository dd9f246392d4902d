"""The trainer's commands: usage errors, subcommands and their earlier names, closed pipes; and training from Python."""

import doctest
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from factory import make_target

import train
from domino_jax.errors import DominoError
from train.__main__ import SUBCOMMANDS, main

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("quick_compilation")

WRONG = {
    "train": ["--target", "x", "--data", "y", "--batch", "0"],
    "regenerate": ["--target", "x"],
    "capture": ["--target", "x"],
    "validate": ["--prompts", "x", "--new-tokens", "0"],
    "calibrate": ["--prompts", "x", "--target", "y", "--draft", "z", "--batch-size", "0"],
    "ablation": ["--data", "x", "--prompts", "y", "--out", "z", "--steps", "0"],
    "bench": ["--length", "0"],
    "demo": ["--out", "x", "--prompts", "1"],
    "instructions": ["--target", "x", "--out", "y", "--count", "0"],
    "pretrain": ["--out", "x", "--steps", "0"],
    "prompts": ["--tokenizer", "x", "--out", "y", "--count", "0"],
}


@pytest.mark.parametrize("given", ["an unknown word", "no sense"])
@pytest.mark.parametrize("name", ["train", *SUBCOMMANDS])
def test_a_usage_error_is_one_sentence_and_exit_code_2(name, given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [] if name == "train" else [name]
    words += ["--nonsense"] if given == "an unknown word" else WRONG[name]
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(set(SUBCOMMANDS) - {"instructions", "calibrate"}))
def test_earlier_names_of_subcommands_run_the_same_module(name, capsys):
    """`python -m train.capture` is what `python -m train capture` is."""
    alias = ROOT / "train" / name / "__main__.py" if (ROOT / "train" / name).is_dir() else ROOT / f"train/{name}.py"
    assert f'run_module("{SUBCOMMANDS[name].module}")' in alias.read_text()
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m train {name} ")


def test_help_fits_80_columns_and_names_the_subcommands(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines if line.startswith("  ") and line.strip()} >= set(SUBCOMMANDS)
    titles = [line.strip(" ╭╮─") for line in lines]
    groups = [title.split()[0] for title in titles if title.endswith(" options") and title.count(" ") == 1]
    assert groups == ["data", "drafter", "objective", "optimizer", "run", "processes"]


@pytest.mark.e2e
def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m train --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: python -m train")


@pytest.mark.e2e
def test_importing_the_package_does_not_import_jax():
    program = "import sys, train; from train import TrainConfig; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("api")
    make_target(base / "target")
    rows = [{"input_ids": [5, i], "tokens": [(i + 3 * k) % 30 + 5 for k in range(20)]} for i in range(5, 25)]
    (base / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return base


@pytest.mark.e2e
def test_the_example_of_train_runs_as_it_is_written(folder, monkeypatch, compile_cache_allowed):
    """And changes nothing else in its user's process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(jax.config, "update", lambda name, value: pytest.fail(f"{name} = {value}"))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    names: dict[str, object] = {}
    with jax.numpy_dtype_promotion("standard"):
        for line in doctest.DocTestParser().get_examples(str(train.train.__doc__)):
            if line.want:
                assert repr(eval(line.source, names)) == line.want.strip()
            else:
                exec(line.source, names)  # prints its progress
    assert isinstance(names["run"], train.TrainedDrafter)
    with pytest.raises(DominoError, match="already holds a run"):
        train.train(target="target", data="data.jsonl", out="run")
    with pytest.raises(DominoError, match="leave out --block-size"):
        train.train(out="run", resume=True, block_size=5)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not list(compile_cache_allowed.glob("jax-*"))


def test_settings_come_as_keywords_groups_or_whole():
    from train.options import configure

    objective = train.Objective(gamma=3.0)
    by_name = configure(None, {"target": "x", "data": Path("y"), "gamma": 3, "optimizer": "muon", "steps": 5})
    by_group = configure(
        train.TrainConfig("x", data=train.DataConfig(("y",)), objective=objective),
        {"optimizer": train.OptimizerConfig("muon"), "run": train.RunConfig(steps=5)},
    )
    assert by_name == by_group
    assert configure(None, {"config": "demo", "data": ["a", "b"]}).objective.gamma == 4.0
    for wrong, says in (({"gama": 3.0}, "gama is no setting"), ({"gamma": "3"}, "gamma is set to '3'; expected float")):
        with pytest.raises(DominoError, match=says):
            configure(None, {"target": "x", "data": "y"} | wrong)


@pytest.mark.e2e
@pytest.mark.slow
def test_one_of_two_processes_is_told_to_stop_and_both_save(folder, tmp_path):
    """Long before the next step that is logged: a machine that is taken away gives half a minute's notice."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    words = f"--target {folder}/target --data {folder}/data.jsonl --out {tmp_path}/run --layers 1 --block-size 4"
    words += " --length 32 --batch 4 --steps 1000000 --log-every 500000 --save-every 500000 --num-processes 2"
    words += f" --coordinator 127.0.0.1:{port}"
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "train", *words.split(), "--process-id", str(number)],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        assert running[0].stdout
        while "from step 0" not in (line := running[0].stdout.readline()):
            assert line, running[0].communicate()[1]
        time.sleep(20)  # compiling
        running[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [130, 130], said
    assert "interrupted at step" in said[0][1]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
