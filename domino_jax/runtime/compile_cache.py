"""Compiled programs are kept on disk, so that a second start compiles little."""

import hashlib
import os
import platform
from contextlib import suppress
from pathlib import Path

import jax
import jaxlib.version

MOST_BYTES = 2 << 30  # the oldest programs go first
LEAST_SECONDS = 0.1  # of compilation, below which keeping a program gains nothing


def enable_compile_cache() -> Path | None:
    """Turn on JAX's persistent compilation cache, where the user has not placed it elsewhere or turned it off.

    JAX_COMPILATION_CACHE_DIR places it, JAX_ENABLE_COMPILATION_CACHE=false turns it off.

    Returns:
        The folder, None where nothing is kept (it is off, or there is no place for it).
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    placed = jax.config.values["jax_compilation_cache_dir"]
    if placed:  # maybe no folder but a bucket's address
        return Path(placed)
    folder = _default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    return folder


def _default_folder() -> Path:
    """A folder of this version and this kind of machine: a home may be shared, and a CPU's programs are its own."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        home = Path(os.devnull)
    machine = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        machine += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    kind = hashlib.sha256(machine.encode()).hexdigest()[:8]
    return home / "domino-jax" / f"jax-{jax.__version__}-{jaxlib.version.__version__}-{kind}"
