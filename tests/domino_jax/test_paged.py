"""Caches in pages: what is written, read and moved there is what a contiguous cache holds."""

import inspect
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu import ragged_paged_attention
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from domino_jax import cache as kv
from domino_jax.attention import attend, attend_cached
from domino_jax.kernels import attention_gpu
from domino_jax.kernels.attention_gpu import attend_pages_gpu
from domino_jax.kernels.paged_attention_tpu import attend_pages_tpu
from domino_jax.paged import PagedKVCache, zero_pages
from domino_jax.runtime.ahead import topology_devices

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[aot]'")


def both(rng: Any, batch: int, heads: int = 2, width: int = 4, size: int = 4, capacity: int = 32) -> tuple[Any, Any]:
    """A contiguous cache and one in pages that stand in any order; the last row has pages for half of its positions."""
    shape = (batch, heads, capacity, width)
    layers = [jnp.zeros(shape, jnp.float32) for _ in range(2)]
    count = capacity // size
    table = 1 + rng.permutation(batch * count).reshape(batch, count)
    table[-1, count // 2 :] = 0
    pages = tuple(jnp.zeros((batch * count + 1, size, 2 * heads, width), jnp.float32) for _ in layers)
    return kv.KVCache(tuple(layers), tuple(layers)), PagedKVCache(pages, jnp.asarray(table, jnp.int32))


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_what_is_appended_is_read_again_and_moved_alike(tokens):
    rng = np.random.default_rng(tokens)
    whole, paged = both(rng, 3)
    assert (paged.capacity, paged.page_size, paged.room.tolist()) == (32, 4, [32, 32, 16])
    step = jax.jit(lambda c, k, v, s, p: c.append(1, k, v, s).compact(s, p, tokens))
    for starts in ([0, 5, 2], [3, 11, 5], [17, 20, 7]):
        k, v = (jnp.asarray(rng.normal(size=(3, tokens, 2, 4)), jnp.float32) for _ in "kv")
        start = jnp.asarray(starts, jnp.int32)
        whole, paged = (
            jax.jit(lambda c, k, v, s: c.append(1, k, v, s))(cache, k, v, start) for cache in (whole, paged)
        )
        places = jnp.asarray(rng.integers(0, tokens, (3, tokens)), jnp.int32)
        whole, paged = (step(cache, k, v, start, places) for cache in (whole, paged))
    beyond = paged.append(1, k, v, jnp.asarray([31, 0, 15], jnp.int32))
    np.testing.assert_array_equal(beyond.layer(1)[0][0, :, 31], k[0, 0])
    assert not beyond.layer(1)[0][2, :, 16:].any() and not beyond.pages[1][0].any(), "what has no page is dropped"
    for layer in range(2):
        for a, b in zip(whole.layer(layer), paged.layer(layer), strict=True):
            np.testing.assert_array_equal(a[:2], b[:2])
            np.testing.assert_array_equal(a[2, :, :16], b[2, :, :16])
    which, others = np.asarray(paged.table)[0, :2].tolist(), np.asarray(paged.layer(1)[0])[1]
    cleared = zero_pages(paged, which)
    assert not np.asarray(cleared.pages[1])[which].any()
    np.testing.assert_array_equal(np.asarray(cleared.layer(1)[0])[1], others)


CASES = {"a step": (1, 1, None), "verification": (8, 4, None), "a window": (8, 2, 5), "many": (17, 4, None)}


def arrays(rng: Any, tokens: int, group: int, dtype: Any, size: int = 16) -> tuple[Any, ...]:
    """Queries, a layer's pages, a table and starts: three rows of 128 positions, two KV heads of width 128."""
    pages = jnp.asarray(rng.normal(size=(1 + 3 * 128 // size, size, 4, 128)), dtype)
    q = jnp.asarray(rng.normal(size=(3, tokens, 2 * group, 128)), dtype)
    table = jnp.asarray(1 + rng.permutation(3 * 128 // size).reshape(3, -1), jnp.int32)
    return q, pages, table, jnp.asarray([0, 37, 128 - tokens], jnp.int32)


@pytest.mark.parametrize("name", CASES)
def test_a_program_for_tpus_reads_pages_by_the_kernel_and_one_for_cpus_gathers(name):
    tokens, group, window = CASES[name]
    q, pages, table, start = arrays(np.random.default_rng(0), tokens, group, jnp.float32)
    cache = PagedKVCache((pages,), table)
    expected = attend_cached(q, cache, 0, start, window=window)
    chosen = attend_cached(q, cache, 0, start, window=window, backend="pallas")
    np.testing.assert_array_equal(chosen, expected)
    whole = attend(q, *cache.layer(0), start, window=window)
    np.testing.assert_array_equal(whole, expected)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_for_tpus_reads_from_pages_what_gathering_does(name, monkeypatch):
    """JAX's ragged paged attention, interpreted as XLA's operations, which (0.10.2) takes two helping hands.

    It asks the literals of an index for a shape that they lack, and the kernel's call takes no `interpret`. The other
    interpreter, `pltpu.InterpretParams`, can't read a reference that was reshaped: "'ReshapeTransform' object has no
    attribute 'indices'".
    """
    literals = pytest.importorskip("jax._src.literals")
    monkeypatch.setattr(literals.TypedInt, "shape", (), raising=False)
    call = partial(pl.pallas_call, interpret=True)
    monkeypatch.setattr(kernel, "pl", SimpleNamespace(**vars(pl) | {"pallas_call": call}))
    # What jax.jit holds is of the kernel that is not interpreted.
    monkeypatch.setattr(ragged_paged_attention, "ragged_paged_attention", inspect.unwrap(kernel.ragged_paged_attention))
    tokens, group, window = CASES[name]
    given = arrays(np.random.default_rng(0), tokens, group, jnp.float32)
    expected = attend_cached(given[0], PagedKVCache((given[1],), given[2]), 0, given[3], window=window)
    ours = jax.jit(partial(attend_pages_tpu, window=window))(*given)
    np.testing.assert_allclose(ours, expected, atol=2e-6, rtol=0)


PLACES = {  # page_size, T, G, causal, window; one share of the positions or several
    "a step": (16, 1, 4, True, None),
    "verification": (16, 17, 4, True, None),
    "pages smaller than a block": (4, 8, 2, True, None),
    "pages larger than a block": (64, 9, 3, True, None),
    "pages of one position": (1, 2, 1, True, None),
    "thirty-two queries": (16, 32, 2, True, None),
    "a window": (8, 8, 1, True, 21),
    "a drafter's block": (16, 16, 2, False, None),
    "a drafter's block in a window": (16, 16, 2, False, 9),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in PLACES),
        ("verification", "bfloat16"),
        *(pytest.param(name, "bfloat16", marks=pytest.mark.slow) for name in PLACES if name != "verification"),
    ],
)
def test_the_kernel_for_gpus_reads_from_pages_what_gathering_does(name, dtype, monkeypatch):
    """Interpreted: rows at the beginning, in the middle of a page and at the end, with empty tail pages; a free row."""
    size, tokens, group, causal, window = PLACES[name]
    monkeypatch.setattr(attention_gpu, "LEAST_SHARE", 32 if tokens % 2 else 128)
    monkeypatch.setattr(attention_gpu, "LARGEST_KEY_BLOCK", 32)
    rng, count = np.random.default_rng(1), 128 // size
    pages = rng.normal(size=(1 + 5 * count, size, 4, 16))
    pages[0] = 0
    q = jnp.asarray(rng.normal(size=(5, tokens, 2 * group, 16)), dtype)
    starts = np.array([0, 37, 70, 128 - tokens, 0])
    table = 1 + rng.permutation(5 * count).reshape(5, count)
    table[np.arange(count) >= -(-(starts[:, None] + tokens) // size)] = 0  # no page behind what a row holds
    table[-1] = 0  # a free row
    held = jnp.asarray(pages, dtype), jnp.asarray(table, jnp.int32)
    start = jnp.asarray(starts, jnp.int32)
    exact = PagedKVCache((held[0].astype(jnp.float32),), held[1])
    expected = np.asarray(attend_cached(q.astype(jnp.float32), exact, 0, start, causal, window))
    run = jax.jit(partial(attend_pages_gpu, causal=causal, window=window, interpret=True))
    ours = run(q, *held, start)
    assert ours.dtype == q.dtype and expected[:4].std() > 0.1
    tolerance = 2e-6 if dtype == "float32" else 1.5e-2
    np.testing.assert_allclose(np.asarray(ours, np.float32), expected, atol=tolerance, rtol=0)
    poisoned = held[0].at[1:].set(jnp.nan).at[held[1][:4].ravel()].set(held[0][held[1][:4].ravel()])
    np.testing.assert_array_equal(run(q, poisoned, held[1], start), ours)


@needs_libtpu
@pytest.mark.e2e
@pytest.mark.parametrize("topology", ["v5e:2x2", pytest.param("v6e:2x2", marks=pytest.mark.slow)])
def test_the_kernel_compiles_for_tpus_that_are_not_here(topology, monkeypatch):
    """At the heads of Qwen3-8B, eight verified tokens a row, and one."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    mesh = jax.sharding.Mesh(np.array(topology_devices(topology)[:1]).reshape(1, 1), ("data", "model"))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for tokens in (1, 8):
        shapes = ((4, tokens, 32, 128), jnp.bfloat16), ((513, 16, 16, 128), jnp.bfloat16)
        shapes = (*shapes, ((4, 128), jnp.int32), ((4,), jnp.int32))
        given = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
        run = jax.jit(run_pages)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            text = str(run.lower(*given).compile().as_text())
        assert "custom-call" in text and "gather(" not in text


def run_pages(q: Any, pages: Any, table: Any, start: Any) -> Any:
    return attend_cached(q, PagedKVCache((pages,), table), 0, start, backend="pallas")
