"""Every flag of every command with odd values: checked, or refused as a usage error in one sentence."""

import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError, parse_words
from infer.bench.checkpoints import main as checkpoints
from infer.bench.compile import Compile, check_compile
from infer.bench.options import Bench, check_bench
from infer.bench.plan import Plan, check_plan
from infer.bench.products import Products, check_products
from infer.bench.serve import ServeLoad, check_serve_load
from infer.options import Generate
from infer.serve.options import Serve
from infer.serve.replicas import ServeReplicas, check_replicas
from train.config import TrainConfig
from train.demo.pretrain import Pretrain, check_pretrain
from train.demo.pretrain import main as pretrain
from train.evaluate.calibrate import Calibrate, check_calibrate
from train.evaluate.validate import Validate, check_validate
from train.options import parse_options
from train.regenerate.command import Regenerate, check_regenerate
from train.regenerate.instructions import Instructions, check_instructions

ODD = [
    "",
    " ",
    "-1",
    "0",
    "1e9",
    "1e999",
    "nan",
    "-inf",
    "9" * 25,
    "1.5",
    "x",
    "None",
    "true",
    "\udcff",
    "[1]",
    "1,2",
    "--",
]
PAIR = ["--target", "t", "--draft", "d"]
COMMANDS: dict[str, tuple[Any, list[str], Callable[[Any], Any]]] = {
    "infer": (Generate, ["hi"], lambda options: options.check(chat=False)),
    "infer.serve": (Serve, [], lambda options: options.check()),
    "infer.serve.replicas": (ServeReplicas, [], check_replicas),
    "infer.bench": (Bench, [], check_bench),
    "infer.bench compile": (Compile, ["--shapes", "qwen3-8b", "--topology", "v5e:2x2"], check_compile),
    "infer.bench serve": (ServeLoad, [], check_serve_load),
    "infer.bench products": (Products, [], check_products),
    "infer.bench plan": (Plan, ["--devices", "v6e-4", "--model", "m"], check_plan),
    "train": (TrainConfig, ["--target", "t", "--data", "d"], lambda options: None),
    "train regenerate": (Regenerate, [*PAIR, "--data", "d", "--out", "o"], check_regenerate),
    "train instructions": (Instructions, ["--target", "t", "--out", "o"], check_instructions),
    "train validate": (Validate, [*PAIR, "--prompts", "p"], check_validate),
    "train calibrate": (Calibrate, [*PAIR, "--prompts", "p"], check_calibrate),
    "train pretrain": (Pretrain, ["--out", "o"], check_pretrain),
}


def flags(command: str, capsys: Any) -> list[str]:
    with pytest.raises(SystemExit):
        parse_words(COMMANDS[command][0], ["--help"], prog=command)
    return sorted(set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"})


def give(command: str, flag: str, value: str) -> bool:
    """Whether the command takes the words; if not, its refusal is as it should be."""
    form, base, check = COMMANDS[command]
    words = [*base, f"{flag}={value}"]
    try:
        check(parse_options(words) if form is TrainConfig else parse_words(form, words, prog=command))
    except UsageError as error:
        assert str(error).strip() and "\n" not in str(error) and len(str(error)) < 600
        return False
    except DominoError as error:  # a file or a folder that a flag names
        assert flag in ("--run", "--config", "--out", "--plot", "--profile", "--resume") and "\n" not in str(error)
        return False
    return True


@pytest.mark.parametrize("name", ["folder", "missing/file", "file/file"])
def test_a_file_that_could_not_be_written_in_the_end_is_refused_in_the_beginning(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for command, flags in (("infer", ["--show-drafts", f"--svg={name}"]), ("infer.bench", [f"--json={name}"])):
        form, base, check = COMMANDS[command]
        with pytest.raises(UsageError, match=r"is not a folder; --|is to be a file, and"):
            check(parse_words(form, [*base, *flags], prog=command))
    assert checkpoints(["--json", name]) == 2
    assert pretrain(["--out", "file/model", "--steps", "1"]) == 1
    assert "can't be written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("command", COMMANDS)
def test_some_flags_with_odd_values(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chance, names = random.Random(command), flags(command, capsys)
    taken = [give(command, chance.choice(names), chance.choice(ODD)) for _ in range(25)]
    assert len(names) > 5 and not all(taken)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_all_flags_with_all_odd_values(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    taken = [give(command, flag, value) for flag in flags(command, capsys) for value in ODD]
    assert 0 < sum(taken) < len(taken)
