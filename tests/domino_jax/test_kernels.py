"""Kernels follow the platform that a program is lowered for, and not this process's devices."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array

from domino_jax.attention import attend, attend_cached
from domino_jax.drafters.training_attention import attend_blocks
from domino_jax.paged import PagedKVCache

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


def lowered_for_cuda(run: Callable[..., Array], *given: Any) -> str:
    """A program as it is lowered for NVIDIA GPUs that are not here."""
    if jax.__version_info__ >= (0, 11) and not any(find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        pytest.skip("from 0.11 on JAX compiles Triton's kernels while it lowers: pip install -e '.[cuda]'")
    return jax.jit(run).trace(*given).lower(lowering_platforms=("cuda",)).as_text()


def of_pages(q: Array, pages: Array, table: Array, start: Array, **how: Any) -> Array:
    return attend_cached(q, PagedKVCache((pages,), table), 0, start, backend="pallas", **how)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tokens", [1, 17, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 32, 512))])
def test_attention_is_one_kernel_on_nvidia_gpus_and_gathers_no_pages(tokens, dtype):
    """At the heads of Qwen3-8B: eight rows of 4,096 positions, pages of 16, and the drafter's block and windows."""
    q, start = jnp.zeros((8, tokens, 32, 128), dtype), jnp.zeros(8, jnp.int32)
    pages, table = jnp.zeros((513, 16, 16, 128), dtype), jnp.zeros((8, 256), jnp.int32)
    cache = jnp.zeros((8, 8, 1024, 128), dtype)
    for causal, window in ((True, None), (True, 100), (False, None)):
        how: dict[str, Any] = {"causal": causal, "window": window}
        in_pages = lowered_for_cuda(partial(of_pages, **how), q, pages, table, start)
        contiguous = lowered_for_cuda(partial(attend, **how, backend="pallas"), q, cache, cache, start)
        for text in (in_pages, contiguous):
            assert text.count("triton") == 1 and "gather" not in text and "tpu_custom_call" not in text
