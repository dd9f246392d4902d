"""What a command meets outside: closed streams, encodings, missing devices, a folder that holds names like ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from convert.registry import DEMO_FOLDER

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from dataclasses import dataclass
from domino_jax.errors import DominoError
from domino_jax.runtime.command import end_process, run_command
from domino_jax.runtime.files import write_text
from pathlib import Path

@dataclass
class Words:
    says: str
    fails: bool = False

def action(words):
    print(words.says + " → \\N{GRINNING FACE} \\udcff é")
    print("note", file=sys.stderr)
    Path("written").write_text(sys.stdin.read())  # must not become standard output or error
    if words.fails:
        raise DominoError("it → failed.")

end_process(run_command(Words, action, prog="p"))
"""


def shell(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of a shell, in which `python` is this one, in a folder."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment | variables, stdin=subprocess.DEVNULL, capture_output=True
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("--says a", 0, "note\n"),
        ("--says a --fails", 1, "note\nerror: it "),
        ("--nonsense", 2, "error: "),
        ("-h", 0, ""),
    ],
)
def test_a_closed_stream_is_no_error(tmp_path, words, code, says, closed):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = shell(f"python script.py {words} {closed}", tmp_path)
    assert done.returncode == code
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert "Traceback" not in err and (err.startswith(says) if "2>" not in closed else err == "")
    assert (out == "") == (">&-" in closed.replace("2>", "") or code == 2)
    if (tmp_path / "written").exists():
        assert (tmp_path / "written").read_text() == ""


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PYTHONIOENCODING": "ascii"}, rb"a \u2192 \U0001f600 \udcff \xe9"),
        ({"PYTHONIOENCODING": "latin-1"}, rb"a \u2192 \U0001f600 \udcff " + b"\xe9"),
        ({"PYTHONIOENCODING": "cp1252:strict"}, rb"a \u2192 \U0001f600 \udcff " + b"\xe9"),
        ({"PYTHONIOENCODING": "utf-8"}, "a → 😀 \\udcff é".encode()),
        ({"LANG": "C"}, "a → 😀 \\udcff é".encode()),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, rb"a \u2192 \U0001f600 \udcff \xe9"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_an_encoding_lacks_is_escaped(tmp_path, variables, expected):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = shell("python script.py --says a --fails", tmp_path, **variables)
    assert (done.returncode, done.stdout) == (1, expected + b"\n")
    assert done.stderr.startswith(b"note\nerror: it ") and b"Traceback" not in done.stderr


@pytest.mark.slow
def test_text_and_drafts_of_a_model_are_printed_in_any_encoding(tmp_path):
    line = f"python -m infer '→ é' --raw --model {DEMO_FOLDER / 'target'} --draft {DEMO_FOLDER / 'draft'}"
    for more in ("", " --show-drafts", " --json", " --compare"):
        done = shell(f"{line} --max-new-tokens 6{more}", tmp_path, PYTHONIOENCODING="ascii", JAX_PLATFORMS="cpu")
        assert done.returncode == 0 and done.stdout and done.stdout.isascii()
        assert b"Traceback" not in done.stderr


WITHOUT_DEVICES = """
import contextlib, io, json, os, sys
from importlib import import_module
found = {}
for module, words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = import_module(module).main(words)
    lines = [line for line in said.getvalue().splitlines() if "warning" not in line]
    found[" ".join([module, *words[:1]])] = code, lines
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "platforms", ["cuda", *(pytest.param(p, marks=pytest.mark.slow) for p in ("nonsense", "rocm,cuda"))]
)
def test_devices_that_are_not_there_are_one_sentence(tmp_path, platforms):
    """Of every command that needs devices; those are asked for once the words are known to be right."""
    pair = ["--target", str(DEMO_FOLDER / "target"), "--draft", str(DEMO_FOLDER / "draft")]
    target, data, out = pair[:2], str(tmp_path / "data.jsonl"), ["--out", str(tmp_path / "out")]
    rows = [{"input_ids": [5 + i, 6, 7], "tokens": [8, 9, 10]} for i in range(8)]
    Path(data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    calls = [
        ("infer.__main__", ["hello"]),
        ("infer.bench.command", ["--no-transformers"]),
        ("infer.bench.command", ["scan"]),
        ("train.__main__", [*target, "--data", data, *out]),
        ("train.__main__", ["capture", *target, "--data", data, *out, "--length", "16"]),
        ("train.__main__", ["validate", *pair, "--prompts", data, "--new-tokens", "4"]),
        ("train.__main__", ["regenerate", *pair, "--data", data, "--out", str(tmp_path / "out.jsonl")]),
        ("train.__main__", ["bench", "--shapes", "qwen3-0.6b"]),
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEVICES, json.dumps(calls)],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": platforms}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for command, (code, lines) in json.loads(done.stdout).items():
        assert code == 1 and len(lines) == 1, (command, code, lines)
        assert lines[0].startswith(f"error: JAX_PLATFORMS={platforms} can't be used: "), command
        assert lines[0].endswith("; unset it, or set another, such as cpu."), command
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("names", [("convert.py",), ("train.py",), ("convert.py", "train.py", "infer.py")], ids=str)
def test_a_working_folder_may_hold_files_of_our_names(tmp_path, names):
    """The console script's own folder comes first on its path; `python -m` has the working folder there."""
    for name in names:
        (tmp_path / name).write_text("raise SystemExit('the folder holds a script of that name')\n")
    script = "import sys; sys.path[0] = '/bin'; from domino_jax.runtime.console import run; run()"
    for words in ("generate --help", "train validate --help"):
        done = shell(f'python -c "{script}" {words}', tmp_path)
        assert (done.returncode, done.stderr) == (0, b""), words
    for module in ("infer.bench", "train", "convert"):
        if f"{module.split('.')[0]}.py" in names:
            continue  # then that is what its user asks for
        done = shell(f"python -m {module} --help", tmp_path)
        assert (done.returncode, done.stderr) == (0, b"") and done.stdout.startswith(b"usage: "), module


def test_processes_of_a_command_run_our_modules_wherever_they_start(tmp_path):
    from domino_jax.runtime.command import own_command, own_environment

    for name in ("train.py", "convert.py"):
        (tmp_path / name).write_text("raise SystemExit('the folder holds a script of that name')\n")
    done = subprocess.run(own_command(["train", "--help"]), cwd=tmp_path, env=own_environment(), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("module", ["train", "train regenerate", "train.validate", "convert", "infer.bench spread"])
def test_a_help_goes_into_head(tmp_path, module):
    done = shell(f"set -o pipefail; python -m {module} --help | head -1", tmp_path, COLUMNS="40")
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.startswith(b"usage: python -m ")
