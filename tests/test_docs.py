"""The documentation says what is there: links, cited sections, commands, flags, files, figures and their sources."""

import json
import re
from pathlib import Path

import pytest

from infer.bench.spread import spread_tables

ROOT = Path(__file__).parent.parent
ROOMS = ("domino_jax", "convert", "train", "infer", "tests")
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "convert").rglob("*.md")])
RESULTS = sorted((ROOT / "docs" / "results").iterdir())
CITED = re.compile(r"docs/algorithm\.md,\s+(?:#\s+)?sections?\s+(\d+)(?: and (\d+))?")
LONGEST_LINE, LONGEST_CELL, README_LINES = 120, 90, 120


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_sections_of_the_algorithm_that_code_cites_exist():
    sections = set(re.findall(r"^## (\d+)\. ", read(ROOT / "docs" / "algorithm.md"), re.MULTILINE))
    sources = [path for room in ROOMS for path in (ROOT / room).rglob("*") if path.suffix in {".py", ".toml"}]
    cited = {section for path in sources for found in CITED.findall(read(path)) for section in found if section}
    assert len(cited) > 5 and cited <= sections


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings_that_exist(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_and_cells_of_tables_are_short(page):
    lines = read(page).splitlines()
    assert not [line for line in lines if len(line) > LONGEST_LINE]
    rows = [line for line in lines if line.startswith("|")]
    assert not [cell for row in rows for cell in re.split(r"(?<!\\)\|", row) if len(cell.strip()) > LONGEST_CELL]
    assert page != README or len(lines) <= README_LINES


def test_result_files_are_of_clean_commits_and_linked():
    linked = {(page.parent / link).resolve() for page in PAGES for link in re.findall(r"\]\(([^)\s#]+)", read(page))}
    for path in RESULTS:
        rows = json.loads(read(path))
        for row in rows if isinstance(rows, list) else [rows]:
            commits = {key: value for key, value in row.items() if key == "commit" or key.endswith("_commit")}
            assert commits, f"{path.name} names no commit"
            assert all(re.fullmatch("[0-9a-f]{7,40}", value) for value in commits.values()), f"{path.name}: {commits}"
        assert path.resolve() in linked, f"no page links {path.name}"
    pictures = [path for path in (ROOT / "docs").rglob("*") if path.suffix in {".png", ".svg"}]
    assert not [path.name for path in pictures if path.resolve() not in linked]


def test_speed_tables_are_what_the_result_files_say():
    runs = [path for path in RESULTS if path.match("speed-*.json")]
    if not runs:
        pytest.skip("no three runs at a clean commit yet")
    tables = spread_tables(runs)
    first = tables.split("\n\n")[1]
    assert first in read(README), f"README should hold\n\n{first}"
    assert tables in read(ROOT / "docs" / "results.md"), f"docs/results.md should hold\n\n{tables}"
