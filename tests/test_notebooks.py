"""The notebooks of docs/notebooks: small, without outputs, of commands that exist, and run on the shipped model."""

import ast
import contextlib
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from string import Template
from typing import Any

import pytest

from domino_jax.runtime.command import own_environment, parse_words
from infer.bench.device import DeviceBench, check_device
from infer.options import Generate

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
FORMS: dict[str, tuple[Any, Any]] = {
    "infer": (Generate, lambda options: options.check(chat=False)),
    "infer.bench device": (DeviceBench, check_device),
}


def code_cells(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def python_of(cell: str) -> str:
    """A cell without the lines that are for a shell or for IPython."""
    return "\n".join(line for line in cell.splitlines() if not line.startswith(("!", "%")))


def settings(path: Path) -> dict[str, Any]:
    """What the first cell sets."""
    names: dict[str, Any] = {}
    exec(code_cells(path)[0], names)
    return {name: value for name, value in names.items() if name.isupper()}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_small_and_their_commands_take_their_words(path, tmp_path, monkeypatch):
    book = json.loads(path.read_text())
    assert path.stat().st_size < 8000 and book["nbformat"] == 4
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert cells and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    monkeypatch.chdir(tmp_path)
    seen = set()
    for cell in code_cells(path):
        ast.parse(python_of(cell))
        for line in cell.splitlines():
            words = shlex.split(Template(line[1:]).substitute(settings(path))) if line.startswith("!") else []
            if words[:2] == ["python", "-m"]:
                count = 2 if words[2] == "infer.bench" else 1
                name = " ".join(words[2 : 2 + count])
                form, check = FORMS[name]
                check(parse_words(form, words[2 + count :], prog=name))
                seen.add(name)
    assert seen == set(FORMS)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_run_here_on_the_shipped_model(path, tmp_path):
    """All cells in turn; what would be installed is here already."""
    given = {"REPOSITORY": str(ROOT), "MODEL": "demo", "SECONDS": 30}
    where, names, said = tmp_path, {}, io.StringIO()
    for number, cell in enumerate(code_cells(path)):
        for line in cell.splitlines():
            if line.startswith("%cd "):
                where /= line.removeprefix("%cd ")
            elif line.startswith("!") and not line.startswith("!pip "):
                words = [sys.executable if word == "python" else word for word in shlex.split(line[1:])]
                words = [Template(word).substitute(names) for word in words]
                done = subprocess.run(words, cwd=where, env=own_environment(), capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                said.write(done.stdout)
        with contextlib.redirect_stdout(said):
            exec(python_of(cell), names)
        if number == 0:
            names |= given
    assert "# What a device computes" in said.getvalue() and (where / "found" / "device.json").exists()
