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


ASKS = {"devices", "local_devices", "device_count", "local_device_count", "default_backend", "get_backend"}
MAY_ASK = {  # which devices this process has; the platform that programs are compiled for is told
    "domino_jax/runtime/devices.py": ["own_devices"],
    "domino_jax/runtime/memory.py": ["free_bytes"],
    "domino_jax/runtime/command.py": ["_device_problem"],
    "domino_jax/sharding.py": ["make_mesh"],
    "convert/tensors.py": ["_same_frequencies"],  # for the CPU, by name
    "infer/bench/checkpoints.py": ["run_checkpoints"],
}
# Those that decide what this process itself runs, before anything is traced.
MAY_ASK_FOR_OWN = {
    "convert/loading.py",
    "convert/orbax.py",
    "infer/bench/checkpoints.py",
    "infer/bench/correctness.py",
    "infer/bench/layer_scan.py",
    "infer/bench/memory.py",
    "infer/bench/probe.py",
    "infer/bench/products.py",
    "infer/bench/roofline.py",
    "infer/bench/rounds.py",
    "infer/bench/sweep.py",
    "train/bench/command.py",
    "train/features/capture.py",
    "train/regenerate/decoding.py",
    "train/run.py",
    "train/step.py",
}


def device_questions(source: str) -> list[str]:
    """Functions that ask JAX for this process's devices, or for its backend."""
    found = []

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name = node.name
        if isinstance(node, ast.Attribute) and node.attr in ASKS and ast.unparse(node.value).split(".")[0] == "jax":
            found.append(name)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jax":
            found.extend(name for alias in node.names if alias.name in ASKS)
        for child in ast.iter_child_nodes(node):
            visit(child, name)

    visit(ast.parse(source), "")
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(x):\n    return jax.devices()[0]", ["f"]),
        ("class A:\n    async def f(self):\n        if jax.default_backend() == 'cpu': pass", ["f"]),
        ("def f(x, platform=None):\n    return platform or jax.default_backend()", ["f"]),
        ("x = jax.local_devices()", [""]),
        ("ask = jax.default_backend", [""]),
        ("def f():\n    from jax.extend.backend import get_backend", ["f"]),
        ("from jax import default_backend, jit", [""]),
        ("x = jax.extend.backend.get_backend().platform", [""]),
        ("def f(mesh, devices):\n    return mesh.devices, devices, self.devices()", []),
    ],
)
def test_the_finder_finds_questions(source, found):
    assert device_questions(source) == found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_program_is_compiled_for_is_not_read_from_this_process(path):
    """Programs are compiled for other devices too: what they are for is told, or follows the arrays and the mesh."""
    source, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
    assert sorted(set(device_questions(source))) == MAY_ASK.get(name, [])
    if "own_devices" in source and name != "domino_jax/runtime/devices.py":
        assert name in MAY_ASK_FOR_OWN


def test_a_public_name_is_defined_once():
    """`grep` for a public function or class finds one definition; every command has its `main`."""
    places = defaultdict(list)
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert {name: where for name, where in places.items() if len(where) > 1 and name != "main"} == {}
