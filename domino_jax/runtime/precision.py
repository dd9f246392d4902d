"""The dtype that a run computes in, and how it holds matrices."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from domino_jax.errors import DominoError

Matrices = Literal["auto", "float32", "bfloat16"]
CPUS = Path("/proc/cpuinfo")


def resolve_dtype(asked: str | None, platform: str) -> Any:
    """The dtype `asked` for; when None float32 on a CPU, where XLA's bfloat16 products are slow, else bfloat16.

    Args:
        platform: that programs are compiled for ("cpu", "gpu", "tpu").
    """
    return jnp.dtype(asked or ("float32" if platform == "cpu" else "bfloat16"))


def matmul_precision(dtype: Any) -> AbstractContextManager[Any]:
    """The context for programs of a run in `dtype`: in float32, products are computed in float32 on every device.

    Accelerators round the factors of float32 products to fewer bits by default.
    """
    return jax.default_matmul_precision("highest") if jnp.dtype(dtype) == jnp.float32 else nullcontext()


def keeps_bfloat16(asked: Matrices, dtype: Any, platform: str) -> bool:
    """Whether matrices that are stored in bfloat16 stay so in a run of `dtype` (see `prepare.prepare_for_cpu`).

    Args:
        asked: "auto": in float32, on a CPU with units for bfloat16 matrices, where it was measured to be faster. Not
            with several processes: their CPUs may differ, and all must run the same program.
        platform: see `resolve_dtype`.

    Raises:
        DominoError: asked for in another dtype than float32, in which there is nothing to choose.
    """
    if dtype != jnp.float32:
        if asked != "auto":
            raise DominoError(f"--matrices is a choice of float32 runs: this one's are {dtype.name}.")
        return False
    if asked != "auto":
        return asked == "bfloat16"
    return platform == "cpu" and jax.process_count() == 1 and has_amx()


def has_amx() -> bool:
    """Whether Linux lists units for products of bfloat16 matrices (Intel's AMX) among this CPU's features."""
    try:
        lines = CPUS.read_text().splitlines()
    except OSError:  # not Linux
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return "amx_bf16" in flags.split()
