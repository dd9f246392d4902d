"""What all commands promise: exit codes, errors of one sentence, a help that fits, no JAX before the words are read."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "python -m infer": "infer.__main__",
    "python -m infer.serve": "infer.serve.__main__",
    "python -m infer.bench": "infer.bench.command",
    "python -m infer.bench.scanned": "infer.bench.scanned",
    "python -m infer.bench.checkpoints": "infer.bench.checkpoints",
    "python -m infer.bench.spread": "infer.bench.spread",
    "python -m infer.bench.mixed": "infer.bench.mixed",
    "python -m infer.bench.serve": "infer.bench.serve",
    "python -m infer.bench compile": "infer.bench.compile",
    "python -m infer.bench samplers": "infer.bench.samplers",
    "python -m infer.bench shares": "infer.bench.shares",
    "python -m infer.bench plan": "infer.bench.plan",
    "python -m infer.bench products": "infer.bench.products",
    "python -m infer.serve.replicas": "infer.serve.replicas",
    "python -m convert": "convert.__main__",
}
USAGE_ERRORS = [
    ("infer.__main__", ["hi", "--no-such-flag"], "unrecognized options: --no-such-flag"),
    ("infer.__main__", ["hi", "--num-draft-tokens", "0"], "--num-draft-tokens must be at least 1"),
    ("infer.__main__", ["hi", "--drafts", "few"], "--drafts INT|{auto} is expected, found 'few'"),
    ("infer.__main__", ["hi", "--dtype", "int3"], "--dtype is one of bfloat16, float32, found 'int3'"),
    ("infer.__main__", ["hi", "--svg", "x.svg"], "--svg writes what --show-drafts shows"),
    ("infer.__main__", ["hi", "--num-processes", "2"], "--coordinator"),
    ("infer.serve.__main__", ["--no-such-flag"], "unrecognized options: --no-such-flag"),
    ("infer.serve.__main__", ["--max-num-seqs", "0"], "--max-num-seqs must be at least 1"),
    ("infer.serve.__main__", ["--port", "70000"], "--port must be from 0 to 2^16 - 1"),
    ("infer.serve.__main__", ["--request-timeout", "0"], "--request-timeout must be above 0"),
    ("infer.bench.command", ["--no-such-flag"], "unrecognized options: --no-such-flag"),
    ("infer.bench.command", ["--rounds", "0"], "--rounds"),
    ("infer.bench.command", ["--head-candidates", "0"], "--head-candidates must be at least 1"),
    ("infer.bench.command", ["--temperature", "-1"], "--temperature must be 0 or more"),
    ("infer.bench.command", ["--drafts", "0"], "--num-draft-tokens must be at least 1"),
    ("infer.bench.command", ["scan", "--tokens", "0"], "--tokens must be at least 1"),
    ("infer.bench.command", ["checkpoints", "--step", "sing"], "--step is one of"),
    ("infer.bench.scanned", ["--layers", "x"], "--layers INT is expected, found 'x'"),
    ("infer.bench.checkpoints", ["--mesh", "3"], "data=2,model=4"),
    ("infer.bench.checkpoints", ["--step", "make"], "--step works on the copies in --out DIR"),
    ("infer.bench.mixed", ["--new-tokens", "9", "4"], "--new-tokens takes two lengths from 1 up"),
    ("infer.bench.command", ["mixed", "--num-requests", "0"], "--num-requests must be at least 1"),
    ("infer.bench.command", ["samplers", "--tree", "4"], "--trees says of how many nodes trees are"),
    ("infer.bench.samplers", ["--num-prompts", "9"], "--num-prompts 9 is no multiple of --batch-size 8"),
    ("infer.bench.samplers", ["--top-p", "0"], "--top-p must be above 0 and at most 1"),
    ("infer.bench.command", ["shares", "--tree", "4"], "rows share the drafts of whole chains: leave --tree out"),
    ("infer.bench.shares", ["--confidence-threshold", "0.1"], "leave --confidence-threshold out"),
    ("infer.bench.shares", ["--num-prompts", "4"], "--num-prompts 4 is less than --batch-size 8"),
    ("infer.bench.shares", ["--batch-size", "1"], "--batch-size must be at least 2"),
    ("infer.bench.serve", ["--new-tokens", "9", "4"], "--new-tokens takes two lengths from 1 up"),
    ("infer.bench.serve", ["--url", "127.0.0.1:8000"], "begins with http:// or https://, found '127.0.0.1:8000'"),
    ("infer.bench.serve", ["--compare", "http://a/v1", "http://b/v1"], "--compare takes NAME=URL"),
    ("infer.bench.serve", ["--compare", "a=http://a/v1", "a=http://b/v1"], "each with a name of its own"),
    ("infer.bench.serve", ["--chat"], "--chat needs --prompts FILE"),
    ("infer.bench.serve", ["--extra-body", "[1]"], "--extra-body takes a JSON object, found '[1]'"),
    ("infer.bench.command", ["serve", "--rates", "0"], "--rates must be above 0"),
    ("infer.bench.plan", ["--devices", "v6", "--model", "demo"], "such as v5e-4"),
    ("infer.serve.replicas", ["--resources", "GPU"], "--resources is given as GPU=1 or TPU=4"),
    ("infer.serve.__main__", ["--num-processes", "2"], "--coordinator"),
    ("infer.bench.spread", ["--no-such-flag"], "unrecognized options: --no-such-flag"),
    ("infer.bench.command", ["compile", "--topology", "v5e:2x2"], "give one of --shapes NAME and --model DIR"),
    ("infer.bench.compile", ["--shapes", "qwen3-8b", "--topology", "8"], "--topology is given as v5e:2x4"),
    ("convert.__main__", [], "give SRC and DST, or --check DIR"),
    ("convert.__main__", ["a"], "give SRC and DST, or --check DIR"),
    ("convert.__main__", ["a", "b", "--dtype", "int3"], "--dtype is one of bfloat16, float32, found 'int3'"),
    ("domino_jax.runtime.console", ["sing"], "domino has no command sing"),
    ("domino_jax.runtime.console", ["generate", "hi", "--no-such-flag"], "see domino generate --help"),
    ("domino_jax.runtime.console", ["chat", "hi"], "a chat reads its prompts line by line"),
    ("domino_jax.runtime.console", ["train", "--no-such-flag"], "see domino train --help"),
    ("domino_jax.runtime.console", ["bench", "scan", "--tokens", "0"], "--tokens must be at least 1"),
]


@pytest.mark.parametrize(("module", "words", "says"), USAGE_ERRORS, ids=lambda value: str(value))
def test_a_usage_error_is_one_sentence_and_exit_code_2(capsys, module, words, says):
    assert import_module(module).main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ") and says in err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    assert import_module(COMMANDS[command]).main(["--help"]) == 0
    help_text = capsys.readouterr().out
    assert "".join(help_text.split()).startswith(f"usage:{command}".replace(" ", ""))
    assert [line for line in help_text.splitlines() if len(line) > 80] == []


def test_help_is_grouped_and_says_both_names_of_a_renamed_flag(capsys):
    assert import_module("infer.__main__").main(["--help"]) == 0
    help_text = capsys.readouterr().out
    for group in ("drafting", "device", "sampling", "input", "output", "processes"):
        assert f"{group} options" in help_text
    assert "--num-draft-tokens" in help_text and "--drafts" in help_text


RUN_ALL = """
import sys
from importlib import import_module
sys.stderr = sys.stdout = open("/dev/null", "w")
found = []
for module, words, code in eval(sys.argv[1]):
    if import_module(module).main(words) != code:
        found.append((module, words, "exit code"))
    if "jax" in sys.modules:
        found.append((module, words, "imports JAX"))
        break
sys.__stdout__.write(str(found))
"""


@pytest.mark.e2e
def test_no_command_imports_jax_before_its_words_are_checked():
    """But for a mesh, whose words the core reads."""
    calls = [(module, words, 2) for module, words, _ in USAGE_ERRORS if "--mesh" not in words]
    calls += [(module, ["--help"], 0) for module in COMMANDS.values()]
    calls += [("domino_jax.runtime.console", words, 0) for words in ([], ["--help"], ["generate", "--help"])]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, repr(calls)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout == "[]"


@pytest.mark.e2e
@pytest.mark.parametrize("module", ["infer", "infer.bench", "convert", "domino_jax.runtime.console"])
def test_help_into_a_closed_pipe_is_no_error(module):
    process = subprocess.Popen(
        [sys.executable, "-m", module, "--help"],
        env=os.environ | {"PYTHONUNBUFFERED": ""},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_the_console_script_is_the_one_of_the_package():
    """And it runs: `domino convert` as a process of its own."""
    import tomllib

    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["domino"]
    assert script == "domino_jax.runtime.console:run"
    code = "from domino_jax.runtime.console import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", "--target", "x"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: give SRC and DST, or --check DIR.\n"
