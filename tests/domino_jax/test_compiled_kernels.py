"""Kernels of attention and layers of experts compiled for TPUs that are not here, at the shapes of public models.

libtpu compiles them (`pip install -e ".[aot]"`); nothing is run. `python -m pytest -m slow` has them all.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array

from convert.shapes import SHAPES, described_weights
from domino_jax import moe
from domino_jax.attention import attend, attend_cached
from domino_jax.drafters.training_attention import attend_blocks
from domino_jax.paged import PagedKVCache
from domino_jax.runtime.ahead import Place, compile_ahead, topology_devices
from domino_jax.sharding import make_mesh

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[aot]'"),
]
ROWS, CAPACITY, PAGE, WINDOW = 8, 4096, 16, 1024
HEADS = {  # query heads, KV heads and their width on one device
    "qwen3-8b": (32, 8, 128),
    "qwen3-8b on eight": (4, 1, 128),
    "qwen3-32b on eight": (8, 1, 128),
    "llama-3.2-1b": (32, 8, 64),
}
CALLS: dict[str, tuple[int, bool, int | None]] = {  # queries, causal, window
    "a plain step": (1, True, None),
    "verification": (17, True, None),
    "a drafter's block": (16, False, None),
    "a drafter's block in a window": (16, True, WINDOW),
    "a drafter's block in a window both ways": (16, False, WINDOW),
    "a part of a prompt": (512, True, None),
}


@pytest.fixture(params=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def place(request, monkeypatch) -> Place:
    """One chip."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return Place(None, topology_devices(request.param)[0])


def compiled(run: Callable[..., Any], place: Place, *shapes: tuple[tuple[int, ...], Any]) -> str:
    """The text of a program of arrays of these shapes and dtypes."""
    given = [place.array(jax.ShapeDtypeStruct(*shape), "") for shape in shapes]
    return compile_ahead("it", place, lambda: jax.jit(run).lower(*given))[1]


def kernels(text: str) -> int:
    return text.count('custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("heads", HEADS)
def test_attention_over_a_cache(heads, call, place):
    (count, kv_heads, width), (tokens, causal, window) = HEADS[heads], CALLS[call]
    cache = (ROWS, kv_heads, CAPACITY, width), jnp.bfloat16
    run = partial(attend, causal=causal, window=window, backend="pallas")
    shapes = ((ROWS, tokens, count, width), jnp.bfloat16), cache, cache, ((ROWS,), jnp.int32)
    assert kernels(compiled(run, place, *shapes)) == 1


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("heads", HEADS)
def test_attention_over_pages(heads, call, place):
    """By JAX's kernel where attention is causal and heads are whole registers wide; else they are gathered first."""
    (count, kv_heads, width), (tokens, causal, window) = HEADS[heads], CALLS[call]

    def run(q: Array, pages: Array, table: Array, start: Array) -> Array:
        return attend_cached(q, PagedKVCache((pages,), table), 0, start, causal, window, "pallas")

    pages = (ROWS * CAPACITY // PAGE + 1, PAGE, 2 * kv_heads, width)
    table = ((ROWS, CAPACITY // PAGE), jnp.int32)
    given = ((ROWS, tokens, count, width), jnp.bfloat16), (pages, jnp.bfloat16), table, ((ROWS,), jnp.int32)
    text = compiled(run, place, *given)
    assert kernels(text) == 1
    assert (" gather(" in text) == (not causal or width % 128 > 0)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("heads", ["qwen3-8b", "qwen3-8b on eight", "llama-3.2-1b"])
def test_training_blocks_and_their_gradients(heads, window, place):
    """512 blocks of 16 over 3,072 positions, two sequences: forward, and twice backward."""
    count, kv_heads, width = HEADS[heads]
    blocks, size, length = 512, 16, 3072

    def run(q: Array, own_k: Array, own_v: Array, k: Array, v: Array, anchors: Array) -> Any:
        def loss(*given: Array) -> Array:
            q, own_k, own_v, k, v = given
            out = attend_blocks(q, (own_k, own_v), (k, v), anchors, None, window, "pallas")
            return (out.astype(jnp.float32) ** 2).sum()

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4))(q, own_k, own_v, k, v)

    own, context = (2, blocks, size, kv_heads, width), (2, length, kv_heads, width)
    shapes = [((2, blocks, size, count, width), jnp.bfloat16), *[(own, jnp.bfloat16)] * 2]
    text = compiled(run, place, *shapes, *[(context, jnp.bfloat16)] * 2, ((2, blocks), jnp.int32))
    assert kernels(text) == 3


@pytest.mark.parametrize("tokens", [1, 17, 512])
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
def test_a_layer_of_experts_on_eight_devices(topology, tokens, monkeypatch):
    """Qwen3-30B-A3B's: each device computes its 16 of 128 experts by grouped products, and one sum combines them."""
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    devices = topology_devices(topology)
    config = moe.resolve_moe_backend(SHAPES["qwen3-30b-a3b"].target, devices[0].platform)
    mesh = make_mesh(1, 8, devices=devices)
    layer = described_weights(dataclasses.replace(config, num_hidden_layers=1), jnp.bfloat16, mesh).layers[0]
    place = Place(mesh, devices[0])
    y = place.array(jax.ShapeDtypeStruct((1, tokens, config.hidden_size), jnp.bfloat16), "B T D")
    run = jax.jit(moe.mlp, static_argnums=1)
    program, text = compile_ahead("it", place, lambda: run.lower(layer, config.moe, y))
    held = program.memory_analysis()
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 1
    assert " all-gather" not in text and " all-to-all" not in text
    experts = 16 * 3 * config.moe.moe_intermediate_size * config.hidden_size * 2  # type: ignore[union-attr]
    assert held.argument_size_in_bytes < 1.1 * experts and held.temp_size_in_bytes < experts / 4
