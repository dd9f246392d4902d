"""Float32 training computes its products in float32 on every device, and changes nothing for other programs."""

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from train.run import Setup

JAX_CONFIG: Any = jax.config  # its flags are attributes that no type checker sees


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "highest"), ("bfloat16", None)])
def test_the_precision_of_products_is_the_runs(dtype, expected):
    setup: Any = SimpleNamespace(mesh=None, recipe=SimpleNamespace(dtype=dtype))
    assert JAX_CONFIG.jax_default_matmul_precision is None
    with Setup.context(setup):
        assert JAX_CONFIG.jax_default_matmul_precision == expected
    assert JAX_CONFIG.jax_default_matmul_precision is None
