"""What generates text runs without the packages of the extras; what needs one names the extra that installs it."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from convert.registry import DEMO_FOLDER
from domino_jax.runtime.extras import EXTRAS

ROOT = Path(__file__).parents[2]
# flax.nnx imports optax itself, so optax is there wherever flax is: it is refused to everybody else.
BLOCKED = """
import json, runpy, sys
from domino_jax.runtime.extras import EXTRAS

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in EXTRAS:
            return None
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if "site-packages" in frame.f_code.co_filename and name.partition(".")[0] == "optax":
            return None
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """`python -m` of these words, with every package of an extra refused."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_text_is_generated_without_any_extra():
    done = run("infer", "--input-ids", "5,70,71", "--max-new-tokens", "6", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["tokens"]) == 6


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (("train", "--target", str(DEMO_FOLDER / "target"), "--data", "no.jsonl", "--out", "no"), "orbax"),
        (("train.capture", "--help"), "orbax"),
        (("convert", "--check", str(DEMO_FOLDER / "target")), "orbax"),
        (("infer.bench.serve",), "httpx"),
        (("infer.bench", "compile", "--shapes", "qwen3-8b", "--topology", "v5e:2x2"), "libtpu"),
    ],
)
def test_what_needs_an_extra_names_it(words, package):
    done = run(*words)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    sentence = f'the package {package} is not installed; install it with: pip install "domino-jax[{EXTRAS[package]}]".'
    assert done.stderr.splitlines()[-1] == f"error: {sentence}"


def test_each_package_is_in_the_extra_that_is_named_for_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", requirement)[0].removesuffix("-checkpoint") for requirement in requirements}

    for package, extra in EXTRAS.items():
        package = package.replace("prometheus_client", "prometheus-client")  # as it is installed
        assert package in names(project["optional-dependencies"][extra])
        assert package not in names(project["dependencies"])
