"""Attention over the cache as a Pallas kernel for TPUs.

None of JAX's own kernels fits: `paged_attention` takes one query a row, `splash_attention` fixes its mask when it is
traced, `flash_attention` reads the whole bucket, and `ragged_paged_attention` wants keys and values interleaved in
pages. This one neither fetches nor computes blocks of the cache beyond a row's length.

It has run on no TPU here: tests interpret it and look at what it lowers to.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from domino_jax.attention import apart, side_by_side
from domino_jax.kernels.platforms import call_kernel

LARGEST_QUERY_BLOCK = 512  # rows of queries (T · G) that the kernel holds at once
LARGEST_KEY_BLOCK = 512  # cache positions likewise
LANES = 128  # the width of a TPU's vector registers
SUBLANES = 16  # their height, for 16-bit floats


def attend_tpu(
    q: Array, k: Array, v: Array, start: Array, causal: bool, window: int | None, interpret: bool | None = None
) -> Array:
    """`attention.attend` as a TPU kernel: the online softmax over the blocks of the cache that a row's queries can see.

    The grid is (B, K, blocks of TG, blocks of S). The starts are known before the blocks are fetched: a block that no
    query sees is replaced by its neighbour, which has been fetched already. The last axis ends with the longest row.

    Args:
        interpret: run the kernel as XLA operations, for tests; when None where the program is compiled for a CPU.
    """
    tokens, heads, width = q.shape[1:]
    batch, kv_heads, capacity, _ = k.shape
    group = heads // kv_heads
    rows = side_by_side(q, kv_heads)
    most = min(LARGEST_QUERY_BLOCK, -(-tokens * group // SUBLANES) * SUBLANES)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, -(tokens * group) % most), (0, 0)))
    keys = math.gcd(capacity, LARGEST_KEY_BLOCK)  # buckets are powers of two
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def live(begin: Array, part: Any) -> tuple[Array, Array]:
        """The first block of the cache that queries of block `part` can see, and the last, in a row from `begin` on."""
        first = jax.lax.div(part * most, group)
        last = jnp.minimum(jax.lax.div(part * most + most - 1, group), tokens - 1)
        end = begin + (last if causal else tokens - 1)
        end = jax.lax.div(jnp.minimum(end, capacity - 1), keys)
        if window is None:
            return jnp.zeros_like(end), end
        return jnp.minimum(jax.lax.div(jnp.maximum(begin + first - window + 1, 0), keys), end), end

    def cache_block(b: Any, h: Any, part: Any, j: Any, starts: Any) -> tuple[Any, ...]:
        first, last = live(starts[b], part)
        return b, h, jnp.clip(j, first, last), 0

    def kernel(starts: Any, q: Any, k: Any, v: Any, out: Any, largest: Any, total: Any, sums: Any) -> None:
        b, part, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        first, last = live(starts[b], part)

        @pl.when(j == 0)
        def begin() -> None:
            largest[...] = jnp.full_like(largest, jnp.finfo(jnp.float32).min)
            total[...] = jnp.zeros_like(total)
            sums[...] = jnp.zeros_like(sums)

        @pl.when((j >= first) & (j <= last))
        def add() -> None:
            scores = jax.lax.dot_general(
                q[0, 0], k[0, 0], (((1,), (1,)), ((), ())), precision, preferred_element_type=jnp.float32
            )
            shape = scores.shape
            row = part * most + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            query = starts[b] + jax.lax.div(row, jnp.full_like(row, group))
            key = j * keys + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            seen = key <= query if causal else key < starts[b] + tokens
            if window is not None:
                seen &= (key > query - window) & (key < query + window)
            scores = jnp.where(seen, scores * width**-0.5, jnp.finfo(jnp.float32).min)
            # A query that has seen nothing yet sums anything, and forgets it with its first finite score.
            before = largest[:, :1]
            now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
            weights, kept = jnp.exp(scores - now), jnp.exp(before - now)
            largest[...] = jnp.broadcast_to(now, largest.shape)
            total[...] = total[...] * kept + weights.sum(axis=1, keepdims=True)
            sums[...] = sums[...] * kept + jax.lax.dot_general(
                weights.astype(v.dtype),
                v[0, 0],
                (((1,), (0,)), ((), ())),
                precision,
                preferred_element_type=jnp.float32,
            )

        @pl.when(j == last)
        def end() -> None:
            out[0, 0] = (sums[...] / total[:, :1]).astype(out.dtype)

    query_spec = pl.BlockSpec((1, 1, most, width), lambda b, h, part, j, _: (b, h, part, 0))
    cache_spec = pl.BlockSpec((1, 1, keys, width), cache_block)
    parts = rows.shape[2] // most
    longest = live(start.max(), parts - 1)[1] + 1
    out = call_kernel(
        kernel,
        out_shape=jax.ShapeDtypeStruct(rows.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, kv_heads, parts, longest),
            in_specs=[query_spec, cache_spec, cache_spec],
            out_specs=query_spec,
            scratch_shapes=[pltpu.VMEM((most, LANES), jnp.float32)] * 2 + [pltpu.VMEM((most, width), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="attend",
    )(start, rows, k, v)
    return apart(out[:, :, : tokens * group], tokens)
