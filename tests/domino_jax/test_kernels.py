"""Kernels follow the platform that a program is lowered for, and not this process's devices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array

from domino_jax.attention import attend
from domino_jax.drafters.training_attention import attend_blocks

BLOCKS = jnp.zeros((1, 8, 4, 2, 128), jnp.bfloat16)  # [B, A, M, N, H]
OWN = (jnp.zeros((1, 8, 4, 1, 128), jnp.bfloat16),) * 2
CONTEXT = (jnp.zeros((1, 128, 1, 128), jnp.bfloat16),) * 2
ANCHORS = jnp.arange(8, dtype=jnp.int32)[None]
TOKENS, CACHE = jnp.zeros((1, 3, 2, 128), jnp.bfloat16), jnp.zeros((1, 1, 256, 128), jnp.bfloat16)


def blocks(q: Array, own: Any, context: Any) -> Array:
    return attend_blocks(q, own, context, ANCHORS, None, None, "pallas")


def loss(q: Array, own: Any, context: Any) -> Array:
    return blocks(q, own, context).astype(jnp.float32).sum()


KERNELS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], int]] = {
    "decoding": (partial(attend, backend="pallas"), (TOKENS, CACHE, CACHE, jnp.zeros(1, jnp.int32)), 1),
    "training": (blocks, (BLOCKS, OWN, CONTEXT), 1),
    "training, backward": (jax.grad(loss, argnums=(0, 1, 2)), (BLOCKS, OWN, CONTEXT), 3),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_compiled_for_tpus_and_interpreted_for_cpus(name):
    run, given, count = KERNELS[name]
    traced = jax.jit(run).trace(*given)
    for platform, calls in (("tpu", count), ("cpu", 0)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("custom_call @tpu_custom_call") == calls, platform
