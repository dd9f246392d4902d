"""JAX's persistent compilation cache, so that a second start compiles little."""

import hashlib
import platform
from contextlib import suppress
from pathlib import Path

import jax
import jaxlib.version

from domino_jax.runtime.files import user_cache

MAX_BYTES = 2 << 30  # of the cache; the oldest programs are deleted first
MIN_COMPILE_SECONDS = 0.1  # a program that compiles in less is not written


def enable_compile_cache() -> Path | None:
    """Turn on JAX's persistent compilation cache in the user's cache folder.

    It changes settings of JAX for the whole process, so only commands call it, and users who want that.
    A folder given by JAX_COMPILATION_CACHE_DIR is kept; JAX_ENABLE_COMPILATION_CACHE=false leaves the cache off.

    Returns:
        The cache's folder; None where the cache is off or its folder can't be made.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    placed = jax.config.values["jax_compilation_cache_dir"]
    if placed:  # by the user; it may be a bucket's address
        return Path(placed)
    folder = _default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return folder


def _default_folder() -> Path:
    """A folder for this version of JAX and this kind of CPU: machines may share a home, but not a CPU's programs."""
    machine = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        machine += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    kind = hashlib.sha256(machine.encode()).hexdigest()[:8]
    return user_cache() / f"jax-{jax.__version__}-{jaxlib.version.__version__}-{kind}"
