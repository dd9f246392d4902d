"""The documentation says what is there: links, cited sections, commands, flags, files, figures and their sources."""

import contextlib
import importlib
import importlib.util
import io
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from convert import registry
from infer.bench.compile import compiled_table
from infer.bench.products import products_table
from infer.bench.spread import spread_tables

ROOT = Path(__file__).parent.parent
ROOMS = ("domino_jax", "convert", "train", "infer", "tests")
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "convert").rglob("*.md")])
NOTEBOOK = ROOT / "docs" / "notebook"  # of commands and files as they once were
CURRENT = [page for page in PAGES if NOTEBOOK not in page.parents and page.name != "CHANGELOG.md"]
RESULTS = sorted((ROOT / "docs" / "results").iterdir())
CITED = re.compile(r"docs/algorithm\.md,\s+(?:#\s+)?sections?\s+(\d+)(?: and (\d+))?")
FOREIGN_FLAGS = {"--logdir"}  # of other programs' commands
LONGEST_LINE, LONGEST_CELL, README_LINES = 120, 90, 120


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL)


def inline_code(page: Path) -> list[str]:
    """What stands between backticks outside of fenced blocks."""
    return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL))


class Command(NamedTuple):
    """A `python -m ...` of a page."""

    words: tuple[str, ...]  # the module, and a subcommand of `train` or `infer.bench`
    flags: set[str]


def commands(page: Path) -> list[Command]:
    """Every command of ours in a page's shell blocks and between its backticks."""
    found = []
    for block in [*blocks(page, "bash"), *(text.replace("\n", " ") for text in inline_code(page))]:
        for line in re.sub(r"\\\n\s*|&&\n\s*", " ", block).split("\n"):
            match = re.search(r"python -m ((\w+)\S*)( [a-z]+(?= |$))?(.*?)(?: \| | > | >> | && |  #|$)", line)
            if match and match[2] in ROOMS:
                subcommand = match[3].split() if match[3] and match[1] in ("train", "infer.bench") else []
                found.append(Command((match[1], *subcommand), flags_of(match[4])))
    return found


@cache
def help_of(*words: str) -> str:
    """The help of a command: a module, and perhaps a subcommand."""
    module, *rest = words
    package = importlib.util.find_spec(module)
    assert package, f"there is no module {module}"
    main = importlib.import_module(f"{module}.__main__" if package.submodule_search_locations else module).main
    asked = mock.patch.object(sys, "argv", [module, *rest, "--help"])
    with asked, contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main()
    return printed.getvalue()


def flags_of(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))


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


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_commands_have_the_flags_that_pages_give_them(page):
    for words, flags in commands(page):
        unknown = flags - flags_of(help_of(*words))
        assert not unknown, f"python -m {' '.join(words)} has no {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_flags_and_files_that_pages_name_exist(page):
    inline = [text for text in inline_code(page) if "--xla" not in text]
    known = {flag for other in CURRENT for words, _ in commands(other) for flag in flags_of(help_of(*words))}
    assert not {flag for text in inline for flag in flags_of(text)} - known - FOREIGN_FLAGS
    paths = {text.partition("::")[0] for text in inline if re.fullmatch(rf"({'|'.join(ROOMS)}|docs)/[\w./:-]+", text)}
    assert not [path for path in paths if not (ROOT / path).exists()]


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


def test_the_table_of_compiled_programs_is_what_the_result_files_say():
    runs = [path for path in RESULTS if path.match("compile-*.json")]
    if not runs:
        pytest.skip("no programs compiled at a clean commit yet")
    table = compiled_table(runs)
    assert table in read(ROOT / "docs" / "performance.md"), f"docs/performance.md should hold\n\n{table}"


def test_the_tables_of_8_bits_are_what_the_result_files_say():
    table = products_table(json.loads(read(ROOT / "docs" / "results" / "products.json")))
    assert table in read(ROOT / "docs" / "quantization.md"), f"docs/quantization.md should hold\n\n{table}"
    table = compiled_table([ROOT / "docs" / "results" / "int8-8b-v5e-1x1.json"])
    assert table in read(ROOT / "docs" / "quantization.md"), f"docs/quantization.md should hold\n\n{table}"


def test_the_map_of_the_rooms_names_every_package_and_module():
    text = read(ROOT / "docs" / "architecture.md")
    packages = [path.parent for room in ROOMS[:-1] for path in (ROOT / room).rglob("__init__.py")]
    assert not [name(path) for path in packages if f"{path.name}/" not in text]
    modules = [path for room in ("domino_jax", "domino_jax/runtime", "convert") for path in (ROOT / room).glob("*.py")]
    hidden = {"__init__", "__main__", "errors"}
    assert not [name(path) for path in modules if path.stem not in hidden and f"`{path.stem}`" not in text]


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/adding-a-drafter.md"])
def test_names_of_code_in_the_walks_are_defined(page):
    sources = "\n".join(read(path) for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    found = re.findall(r"(?:def|class) (\w+)|^ *(?:self\.)?(\w+): |^(\w+) = ", sources, re.MULTILINE)
    known = {name for groups in found for name in groups}
    known |= {path.stem for room in ROOMS for path in (ROOT / room).rglob("*")}  # modules and packages
    named = [re.fullmatch(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(.*\))?", text) for text in inline_code(ROOT / page)]
    assert not {match[1] for match in named if match and not set(match[1].split(".")) <= known}


def test_the_table_of_models_is_the_registry():
    table = read(ROOT / "docs" / "checkpoints.md")
    for model, public in registry.TABLE.items():
        assert f"| `{model}`" in table
        others = [place for pair in public.others for place in pair]
        assert all(word in table for word in (*public[:3], *others) if word and model != "demo")


def test_the_table_of_drafters_has_all_of_them():
    page = read(ROOT / "docs" / "drafters.md")
    sources = "\n".join(read(path) for path in (ROOT / "domino_jax" / "drafters").rglob("*.py"))
    classes = re.findall(r"^class (\w+(?:Drafter|Head))\b(?!\(Protocol)", sources, re.MULTILINE)
    assert {"BlockDrafter", "NgramDrafter", "DominoHead", "NoHead"} <= set(classes)
    assert not [one for one in classes if f"| `{one}`" not in page]
