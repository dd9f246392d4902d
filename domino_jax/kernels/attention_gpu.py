"""Attention over the cache as a Pallas kernel for NVIDIA GPUs, compiled by Triton: contiguous caches and pages alike.

A program has a block of the queries that share a KV head of a row, and reads no block of the cache that none of them
sees. Few rows would leave most of a GPU idle, so a row's positions are then shared out among several programs, whose
outputs are joined by their log-sum-exp (flash-decoding: Dao, Haziza, Massa & Sizov 2023).

It has run on no GPU here: tests interpret it and look at what it lowers to.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from domino_jax.attention import apart, side_by_side
from domino_jax.kernels.platforms import call_kernel

LEAST_QUERY_BLOCK = 16  # rows of queries (T · G) of a program: Triton's products take no fewer
LARGEST_QUERY_BLOCK = 64
LARGEST_KEY_BLOCK = 64  # cache positions that a program holds at once
PROGRAMS = 264  # to be had by sharing out positions: two for each of an H100's processors
LEAST_SHARE = 256  # positions of the cache for each program of a row, at least
LEAST = float(jnp.finfo(jnp.float32).min)


def attend_gpu(
    q: Array, k: Array, v: Array, start: Array, causal: bool, window: int | None, interpret: bool | None = None
) -> Array:
    """`attention.attend` as a GPU's kernel.

    Args:
        interpret: run the kernel as XLA operations, for tests; when None where the program is compiled for a CPU.
    """

    def read(cache: Any, b: Any, h: Any, key: Any) -> tuple[Any, Any]:
        return cache[0][b, h, key], cache[1][b, h, key]

    return _attend(q, (k, v), read, k.shape[1], k.shape[2], start, causal, window, interpret)


def attend_pages_gpu(
    q: Array,
    pages: Array,
    table: Array,
    start: Array,
    causal: bool,
    window: int | None,
    interpret: bool | None = None,
) -> Array:
    """The same over pages, [P, page_size, 2K, H], and the table of each row's, [B, S / page_size] int32."""
    size = pages.shape[1]

    def read(cache: Any, b: Any, h: Any, key: Any) -> tuple[Any, Any]:
        held, where = cache
        page, place = where[b, jax.lax.div(key, jnp.full_like(key, size))], jax.lax.rem(key, jnp.full_like(key, size))
        return held[page, place, 2 * h], held[page, place, 2 * h + 1]

    capacity = table.shape[1] * size
    return _attend(q, (pages, table), read, pages.shape[2] // 2, capacity, start, causal, window, interpret)


def _attend(
    q: Array,
    cache: tuple[Array, Array],
    read: Callable[..., tuple[Any, Any]],
    kv_heads: int,
    capacity: int,
    start: Array,
    causal: bool,
    window: int | None,
    interpret: bool | None,
) -> Array:
    """Attention over a cache of any form.

    Args:
        read: of the cache's arrays, a row, a KV head and positions [n], the keys and values there, [n, H] each.
        kv_heads, capacity: K and S.
    """
    batch, tokens, heads, width = q.shape
    group = heads // kv_heads
    rows = side_by_side(q, kv_heads).reshape(batch * kv_heads, tokens * group, width)
    most = max(LEAST_QUERY_BLOCK, min(LARGEST_QUERY_BLOCK, 1 << (tokens * group - 1).bit_length()))
    rows = jnp.pad(rows, ((0, 0), (0, -(tokens * group) % most), (0, 0)))
    parts, keys = rows.shape[1] // most, math.gcd(capacity, LARGEST_KEY_BLOCK)
    shares = max(1, min(PROGRAMS // (batch * kv_heads * parts), capacity // LEAST_SHARE))
    product = partial(
        jax.lax.dot_general,
        precision=jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )

    def kernel(q: Any, starts: Any, one: Any, other: Any, out: Any, *weight: Any) -> None:
        row_and_head, part, share = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        b, h = jax.lax.div(row_and_head, kv_heads), jax.lax.rem(row_and_head, kv_heads)
        begin = starts[b]
        place = part * most + jnp.arange(most, dtype=jnp.int32)
        query = begin + jax.lax.div(place, jnp.full_like(place, group))
        last = jnp.minimum(jax.lax.div(part * most + most - 1, group), tokens - 1)
        end = jnp.minimum(begin + (last + 1 if causal else tokens), capacity)
        behind, first = jax.lax.div(end + keys - 1, keys), 0
        if window is not None:
            first = jax.lax.div(jnp.maximum(begin + jax.lax.div(part * most, group) - window + 1, 0), keys)
            first = jnp.minimum(first, behind - 1)
        each = jax.lax.div(behind - first + shares - 1, shares)
        queries = q[0]

        def add(j: Any, so_far: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            largest, total, sums = so_far
            key = j * keys + jnp.arange(keys, dtype=jnp.int32)
            k, v = read((one, other), b, h, key)
            scores = product(queries, k, (((1,), (1,)), ((), ()))) * width**-0.5
            seen = key[None] <= query[:, None] if causal else key[None] < begin + tokens
            if window is not None:
                seen &= (key[None] > query[:, None] - window) & (key[None] < query[:, None] + window)
            scores = jnp.where(seen, scores, LEAST)
            # A query that has seen nothing yet sums anything, and forgets it with its first finite score.
            now = jnp.maximum(largest, scores.max(axis=1))
            weights, kept = jnp.exp(scores - now[:, None]), jnp.exp(largest - now)
            sums = sums * kept[:, None] + product(weights.astype(v.dtype), v, (((1,), (0,)), ((), ())))
            return now, total * kept + weights.sum(axis=1), sums

        nothing = jnp.full(most, LEAST), jnp.zeros(most), jnp.zeros((most, width))
        ours = first + share * each, jnp.minimum(first + (share + 1) * each, behind)
        largest, total, sums = jax.lax.fori_loop(*ours, add, nothing)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)  # zero for a share of no positions
        out[0, 0] = (sums / total[:, None]).astype(out.dtype)
        for held in weight:
            held[0, 0] = largest + jnp.log(total)

    query_spec = pl.BlockSpec((1, most, width), lambda i, part, _: (i, part, 0))
    out_spec = pl.BlockSpec((1, 1, most, width), lambda i, part, share: (share, i, part, 0))
    whole = [pl.BlockSpec(x.shape, partial(_origin, x.ndim)) for x in (start, *cache)]
    shape = (shares, *rows.shape)
    outputs = [jax.ShapeDtypeStruct(shape, q.dtype if shares == 1 else jnp.float32)]
    specs = [out_spec]
    if shares > 1:
        outputs.append(jax.ShapeDtypeStruct(shape[:-1], jnp.float32))
        specs.append(pl.BlockSpec((1, 1, most), lambda i, part, share: (share, i, part)))
    out, *weight = call_kernel(
        kernel,
        grid=(batch * kv_heads, parts, shares),
        in_specs=[query_spec, *whole],
        out_specs=specs,
        out_shape=outputs,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attend",
    )(rows, start, *cache)
    for held in weight:
        out = (out * jax.nn.softmax(held, axis=0)[..., None]).sum(axis=0, keepdims=True)
    out = out[0, :, : tokens * group].astype(q.dtype).reshape(batch, kv_heads, tokens * group, width)
    return apart(out, tokens)


def _origin(axes: int, *_: Any) -> tuple[int, ...]:
    """Where the block begins that is all of an array."""
    return (0,) * axes
