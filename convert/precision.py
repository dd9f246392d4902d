"""The dtype that a run computes in."""

from typing import Any

import jax
import jax.numpy as jnp


def settle(asked: str | None) -> Any:
    """The dtype `asked` for; when None float32 on a CPU, where XLA's bfloat16 products are slow, else bfloat16.

    Where it is float32, products are computed so from here on: accelerators round them by default, which would make
    float32 untrue.
    """
    dtype = jnp.dtype(asked or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    if dtype == jnp.float32:
        jax.config.update("jax_default_matmul_precision", "highest")
    return dtype
