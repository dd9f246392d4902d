"""The wrapper of all commands: exit codes, errors of one sentence, closed pipes."""

import gc
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from domino_jax.errors import DominoError
from domino_jax.runtime import command
from domino_jax.runtime.command import Subcommand, UsageError, exit_code, find_subcommand, parse_words, run_command

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Inner:
    """A group."""

    size: int | Literal["auto"] = 1


@dataclass(frozen=True)
class Words:
    """Options of a command."""

    name: str
    """who"""
    kind: Literal["b", "a"] | None = None
    inner: Inner = field(default_factory=Inner)


def test_words_become_options_and_nested_ones_have_no_prefix(capsys):
    assert parse_words(Words, ["--name", "x", "--size", "3"], prog="p") == Words("x", inner=Inner(3))
    assert parse_words(Words, [], prog="p", default=Words("y")) == Words("y")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "missing --name STR; see p --help."),
        (["--name", "x", "--kind", "c"], "--kind is one of a, b, found 'c'; see p --help."),
        (["--name", "x", "--size", "z"], "--size INT|{auto} is expected, found 'z'; see p --help."),
        (["--name", "x", "--nonsense"], "unrecognized options: --nonsense; see p --help."),
        (["--nam", "x"], "missing --name STR; see p --help."),
        (["--name"], "missing value for argument '--name'. Expected 1 values; see p --help."),
    ],
)
@pytest.mark.parametrize("columns", ["80", "30"])
def test_wrong_words_are_one_sentence_and_exit_code_2(capsys, monkeypatch, words, says, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert run_command(Words, lambda _: None, words, prog="p") == 2
    assert capsys.readouterr() == ("", f"error: {says}\n")


def test_a_help_is_no_wider_than_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(SystemExit):
        parse_words(Words, ["--help"], prog="python -m a.package", epilog="Words " * 20)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40 and lines[0].startswith("usage: python -m a.package")
    assert " ".join(lines).count("Words") == 20


@pytest.mark.parametrize(
    ("outcome", "code", "says"),
    [
        (None, 0, ""),
        (1, 1, ""),
        (DominoError("it failed."), 1, "error: it failed.\n"),
        (UsageError("--a and --b."), 2, "error: --a and --b.\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(0), 0, ""),
        (SystemExit(), 0, ""),
        (SystemExit(3), 3, ""),
        (OSError(28, "No space left on device"), 1, "error: the output can't be written: no space left"),
        (OSError(28, "No space left on device", "a.json"), 1, "error: a.json: No space left on device.\n"),
    ],
    ids=str,
)
def test_every_end_has_its_exit_code(capsys, monkeypatch, outcome, code, says):
    monkeypatch.setattr(command.os, "dup2", lambda *_: None)  # the suite's own output goes on

    def action() -> int | None:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    assert exit_code(action) == code
    assert capsys.readouterr().err.startswith(says)


@pytest.mark.parametrize("where", ["a finalizer", "a callback of the garbage collector", "a weak reference's callback"])
def test_an_interrupt_that_python_ignores_comes_again(where):
    """Such as one in the callback that JAX has there: the user would have to press Ctrl-C twice."""

    class Thing:
        def __del__(self):
            if where == "a finalizer":
                raise KeyboardInterrupt

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def action() -> None:
        thing = Thing()
        reference = weakref.ref(thing, interrupt if where == "a weak reference's callback" else None)
        if where == "a callback of the garbage collector":
            gc.callbacks.append(interrupt)
        del thing
        if gc.callbacks[-1:] == [interrupt]:
            gc.collect()
            gc.callbacks.remove(interrupt)
        for _ in range(500):
            time.sleep(0.01)
        pytest.fail(f"the interrupt was lost; {reference}")

    assert exit_code(action) == 130


@pytest.mark.parametrize(
    "error", [AssertionError(), RuntimeError("Unable to initialize backend 'x': no. (set JAX_…"), None]
)
def test_missing_devices_are_a_sentence_and_other_errors_are_themselves(capsys, monkeypatch, error):
    import jax

    def devices() -> list[object]:
        if error is not None:
            raise error
        return []

    def action() -> None:
        jax.devices()
        raise RuntimeError("another one")

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if error is None:
        with pytest.raises(RuntimeError, match="another one"):
            exit_code(action)
        return
    assert exit_code(action) == 1
    assert capsys.readouterr().err.startswith("error: JAX can't use the devices here: ")


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 // 0)


@pytest.mark.e2e
@pytest.mark.parametrize("words", ["--help", "--name x"])
def test_a_closed_pipe_is_no_error(tmp_path, words):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom dataclasses import dataclass\nfrom domino_jax.runtime.command import run_command\n"
        "@dataclass\nclass Words:\n    name: str\n"
        "sys.exit(run_command(Words, lambda _: print('text' * 100000), prog='p'))\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script), *words.split()],
        env={"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_a_subcommand_runs_the_main_of_its_module(tmp_path, monkeypatch):
    (tmp_path / "a_command.py").write_text("def main(argv, prog):\n    return len(argv) + len(prog)\n")
    monkeypatch.syspath_prepend(tmp_path)
    table = {"go": Subcommand("a_command", "goes.")}
    run = find_subcommand(table, ["go", "x"], "p")
    assert run is not None and run() == len(["x"]) + len("p go")
    assert find_subcommand(table, ["stop"], "p") is None is find_subcommand(table, [], "p")


@pytest.mark.e2e
def test_a_command_is_wrapped_without_jax():
    code = "import sys, domino_jax.runtime.command, convert.options; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
