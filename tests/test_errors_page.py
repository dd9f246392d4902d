"""docs/errors.md shows what the commands say, word for word."""

import re
from pathlib import Path

import pytest
from shell import run_line

PAGE = Path(__file__).parent.parent / "docs" / "errors.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
EXAMPLES = [
    (section.split("\n")[0], block)
    for section in SECTIONS
    for block in re.findall(r"^```console\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
]


@pytest.mark.parametrize(
    ("section", "block"), EXAMPLES, ids=[block.split("$ ")[-1].split("\n")[0] for _, block in EXAMPLES]
)
def test_an_example_is_what_happens(section, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *setup, (command, expected) = [
        (line, " ".join(said.split()))
        for line, said in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    ]
    assert all(run_line(line) is None and not said for line, said in setup)
    found = run_line(command)
    assert found is not None
    said, status = found
    assert " ".join(said.split()) == expected
    assert status == (2 if section.startswith("Words") else 1)
    assert said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_there_are_examples_of_every_kind():
    assert len(SECTIONS) >= 3 and len(EXAMPLES) >= 20
