"""Compiled programs are kept from one start to the next."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import jax
from domino_jax.runtime.compile_cache import enable_compile_cache
seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event))
folder = enable_compile_cache()
def slow(x):
    for i in range(400):  # long enough to compile on a fast machine to be worth keeping
        x = jax.numpy.sin(x @ x) + jax.numpy.sort(x, axis=i % 2)
    return x
jax.block_until_ready(jax.jit(slow)(jax.numpy.ones((8, 8))))
print(folder, seen.count("/jax/compilation_cache/cache_hits"))
"""


def start(**environment: str) -> list[str]:
    ours = ("JAX_ENABLE_COMPILATION", "JAX_COMPILATION", "XDG")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=kept | environment, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.split()


def test_a_second_start_reads_what_the_first_compiled(tmp_path):
    home = str(tmp_path)
    folder, hits = start(XDG_CACHE_HOME=home)
    assert Path(folder).parent == tmp_path / "domino-jax" and hits == "0"
    assert any(Path(folder).iterdir())
    again, hits = start(XDG_CACHE_HOME=home)
    assert again == folder and int(hits) > 0


@pytest.mark.slow
def test_the_user_may_place_it_elsewhere_or_turn_it_off(tmp_path):
    place = tmp_path / "mine"
    assert start(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(place))[0] == str(place)
    assert start(XDG_CACHE_HOME=str(tmp_path), JAX_ENABLE_COMPILATION_CACHE="false") == ["None", "0"]
    assert not (tmp_path / "domino-jax").exists()


def test_without_a_place_for_it_nothing_is_kept_and_nothing_fails(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert start(XDG_CACHE_HOME=str(tmp_path / "file")) == ["None", "0"]
