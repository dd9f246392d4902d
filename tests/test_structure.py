"""The rooms of the project: imports point one way, and every module says what it is for."""

import ast
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
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
CORE_MAY_USE = {"abc", "collections", "contextlib", "dataclasses", "functools", "json", "math", "typing"}
CORE_MAY_USE |= {"flax", "jax", "numpy"}
OPENERS = {"Path", "files", "joinpath", "with_name", "open"}  # calls whose arguments are paths
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


def reaches(source: str, own: str) -> set[str]:
    """Packages whose folders a module names in a path, other than its own."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts = [side.value for side in (node.left, node.right) if isinstance(side, ast.Constant)]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in OPENERS:
            parts = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        else:
            continue
        found |= {step for part in parts if isinstance(part, str) for step in part.split("/")}
    return found & PACKAGES - {own}


def test_the_finder_finds_paths():
    assert reaches('Path(__file__).parents[1] / "infer" / "demo"', "convert") == {"infer"}
    assert reaches('resources.files("train") / "recipes"', "infer") == {"train"}
    assert reaches('Path("../infer/demo")', "convert") == {"infer"} == reaches('x.joinpath("infer")', "convert")
    assert not reaches('resources.files("train") / "recipes"; print("infer")', "train")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_does_not_reach_into_another_rooms_folder(path):
    assert not reaches(path.read_text(encoding="utf-8"), path.relative_to(ROOT).parts[0])


def test_the_finder_finds():
    assert imports("import a.b, c\ndef f():\n    from d.e import g\n    import h as i") == {"a", "c", "d", "h"}
    assert {path.parent.name for path in MODULES} >= PACKAGES


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_room_may_and_says_what_it_is(path):
    source, package = path.read_text(encoding="utf-8"), path.relative_to(ROOT).parts[0]
    used = imports(source)
    assert not (used & PACKAGES) - MAY_IMPORT[package] - {package}
    assert not used & {"tests", "pytest", "factory", "loops", "reference"}
    compared = package == "infer" or path.name == "check.py"
    assert "torch" not in used or compared, "torch is there to be compared with, in the bench and in convert --check"
    inner = path.relative_to(ROOT).parts[1]
    if package == "domino_jax" and inner != "runtime":  # a process's surroundings: devices, files, other processes
        assert used <= CORE_MAY_USE | {"domino_jax"}
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring and docstring.split("\n")[0].strip()[-1] in ".,:;", "a module opens with a sentence about itself"


@pytest.mark.parametrize(
    ("expression", "runs"),
    [
        ("", ["unit", "e2e"]),
        ("not e2e", ["unit", "e2e"]),  # pytest's own deselection comes after
        ("slow", ["unit", "e2e", "slow"]),
        ("e2e and slow", ["unit", "e2e", "slow"]),
    ],
)
def test_slow_tests_run_only_where_the_expression_names_them(request, expression, runs):
    folder = {"e2e": conftest.E2E}
    items: list[Any] = []
    for name in ("unit", "e2e", "slow"):
        item = pytest.Function.from_parent(request.node.parent, name=name, callobj=lambda: None)
        item.path = folder.get(name, ROOT / "tests") / "test_x.py"
        items.append(item)
    items[2].add_marker(pytest.mark.slow)
    left_out: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    conftest.pytest_collection_modifyitems(
        SimpleNamespace(option=SimpleNamespace(markexpr=expression), hook=hook),  # type: ignore[arg-type]
        items,
    )
    assert [item.name for item in items] == runs
    assert [item.name for item in left_out] == (["slow"] if "slow" not in runs else [])
    assert [item.name for item in items if item.get_closest_marker("e2e")] == ["e2e"]


QUESTIONS = {f"jax.{name}" for name in ("devices", "local_devices", "device_count", "default_backend")}


def device_questions(source: str) -> list[str]:
    """Functions that ask for this process's devices and can't be told of others."""
    found = []

    def visit(node: ast.AST, told: bool, name: str) -> None:
        if isinstance(node, ast.FunctionDef):
            given = {arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)}
            told, name = told or bool(given & {"device", "devices", "platform"}), node.name
        called = node.func if isinstance(node, ast.Call) else None
        asks = {"devices", "local_devices", "default_backend", "device_count", "local_device_count"}
        if (
            isinstance(called, ast.Attribute)
            and called.attr in asks
            and ast.unparse(called.value) == "jax"
            and not told
        ):
            found.append(name)
        for child in ast.iter_child_nodes(node):
            visit(child, told, name)

    visit(ast.parse(source), False, "")
    return found


def test_the_finder_finds_questions():
    assert device_questions("def f(x):\n    return jax.devices()[0]") == ["f"]
    assert device_questions("class A:\n    def f(self):\n        if jax.default_backend() == 'cpu': pass") == ["f"]
    assert not device_questions("def f(x, platform=None):\n    return platform or jax.default_backend()")
    assert device_questions("x = jax.local_devices()") == [""]


TRACED = [path for path in MODULES if "domino_jax" in path.parts and "runtime" not in path.parts]


@pytest.mark.parametrize("path", [*TRACED, ROOT / "train" / "loss.py"], ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_traced_does_not_ask_which_devices_are_here(path):
    """Programs are compiled for other devices too: what they are for is told, or follows the arrays and the mesh."""
    assert device_questions(path.read_text(encoding="utf-8")) == []


def test_a_public_name_is_defined_once():
    """`grep` for a public function or class finds one definition; every command has its `main`."""
    places = defaultdict(list)
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert {name: where for name, where in places.items() if len(where) > 1 and name != "main"} == {}
