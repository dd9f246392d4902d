"""Kernels follow the platform that a program is compiled for, which need not be one that is here."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl


def call_kernel(kernel: Callable[..., None], *, interpret: bool | None, **how: Any) -> Callable[..., Any]:
    """`pl.pallas_call` of a TPU's kernel.

    Args:
        interpret: run it as XLA operations, for tests; when None where the program is compiled for a CPU.
        how: what else `pl.pallas_call` takes.
    """
    if interpret is not None:
        return pl.pallas_call(kernel, interpret=interpret, **how)
    interpreted, compiled = (pl.pallas_call(kernel, interpret=form, **how) for form in (True, False))

    def run(*given: Any) -> Any:
        return jax.lax.platform_dependent(*given, cpu=interpreted, default=compiled)

    return run
