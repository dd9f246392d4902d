"""The rooms of the project: imports point one way, and every module says what it is for."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"domino_jax", "convert", "train", "infer"}
MAY_IMPORT = {
    "domino_jax": set(),
    "convert": {"domino_jax"},
    "train": {"domino_jax", "convert"},
    "infer": {"domino_jax", "convert"},
}
# domino_jax is pure functions over arrays: no files, no arguments, no tokenizers.
CORE_MAY_USE = {"collections", "contextlib", "dataclasses", "functools", "typing", "math", "flax", "jax", "numpy"}
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(source: str) -> set[str]:
    """Top-level names that a module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            assert node.module
            found.add(node.module.split(".")[0])
    return found


def test_the_finder_finds():
    assert imports("import a.b, c\ndef f():\n    from d.e import g\n    import h as i") == {"a", "c", "d", "h"}
    assert {path.parent.name for path in MODULES} >= PACKAGES


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_room_may_and_says_what_it_is(path):
    source, package = path.read_text(encoding="utf-8"), path.relative_to(ROOT).parts[0]
    used = imports(source)
    assert not (used & PACKAGES) - MAY_IMPORT[package] - {package}
    assert not used & {"tests", "pytest", "factory", "reference"}
    compared = package == "infer" or path.name == "check.py"
    assert "torch" not in used or compared, "torch is there to be compared with, in the bench and in convert --check"
    if package == "domino_jax":
        assert used <= CORE_MAY_USE | {"domino_jax"}
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring and docstring.split("\n")[0].strip()[-1] in ".,:;", "a module opens with a sentence about itself"
