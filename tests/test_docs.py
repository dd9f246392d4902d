"""The documentation says what is there: sections that are cited exist, links resolve, lines keep their length."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "convert").rglob("*.md")])
SOURCES = sorted(
    path
    for room in ("domino_jax", "convert", "train", "infer", "tests")
    for path in (ROOT / room).rglob("*")
    if path.suffix in {".py", ".toml"}
)
CITED = re.compile(r"docs/algorithm\.md,\s+(?:#\s+)?sections?\s+(\d+)(?: and (\d+))?")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_sections_of_the_algorithm_that_code_cites_exist():
    page = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^## (\d+)\. ", page, re.MULTILINE))
    cited = {
        section
        for path in SOURCES
        for found in CITED.findall(path.read_text(encoding="utf-8"))
        for section in found
        if section
    }
    assert len(cited) > 5 and cited <= sections


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings_that_exist(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken
