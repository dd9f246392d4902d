"""What the pages say in Python runs, word for word, on the shipped pair."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    "page", ["README.md", pytest.param("docs/python.md", marks=pytest.mark.slow), "docs/adding-a-drafter.md"]
)
def test_python_of_the_pages_runs(page, capsys):
    source = (ROOT / page).read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", source, re.MULTILINE | re.DOTALL):
        if "train(" in block:  # hours
            continue
        exec(compile(block, page, "exec"), names)
        printed = capsys.readouterr().out.strip()
        assert len(printed) > 10 or "print" not in block
        assert "False" not in printed, "what a page claims is not so"
