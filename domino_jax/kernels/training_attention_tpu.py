"""The attention of training's blocks as a TPU kernel: their context by an online softmax, forward and backward.

A query sees an interval of the context: from the first position of its conversation, or of its window, up to its
block's anchor. So no mask exists in memory, only two bounds a query. A tile of queries fetches and computes only the
key blocks between its lowest and its highest bound. That pays where a tile's anchors are neighbours, as
`train.anchors.draw_anchors` gives them; the result is the same in any order. A block's own M x M part is dense, and the
two parts are joined by their log-sum-exp.

The backward pass computes the weights again from the log-sum-exp, as FlashAttention-2 does (Dao 2023, arXiv 2307.08691,
algorithm 2): one kernel over key blocks for the queries' gradient, one over tiles of queries for the keys' and values'.

Queries lie in the lanes: scores are [keys, rows], and a row's bounds, maximum and sum take one row of registers. No
product then needs a transpose inside the kernel; the transposed keys and values [.., H, S] are made once, outside.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from domino_jax.attention import in_window
from domino_jax.kernels.platforms import call_kernel
from domino_jax.sharding import spec

ROWS = 512  # queries of a tile (blocks · M · G)
KEYS = 512  # context positions of a key block, at most
LANES = 128  # the width of a TPU's vector registers: rows and keys come in multiples of it
LEAST = -3e38  # a log-sum-exp of nothing, and its maximum

PARALLEL = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))
PLAIN, TURNED = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))  # a · b and a · bᵀ


def attend_blocks_tpu(
    q: Array,
    own: tuple[Array, Array],
    context: tuple[Array, Array],
    anchors: Array,
    first: Array,
    window: int | None,
    interpret: bool | None = None,
    causal: bool = True,
) -> Array:
    """`training_attention.attend_blocks` by the kernel. On a mesh each device runs it over its own rows and heads.

    Args:
        interpret: run the kernel as XLA operations, for tests; when None where the program is compiled for a CPU.
    """
    run = partial(_attend, window=window, interpret=interpret, causal=causal)
    if not jax.sharding.get_abstract_mesh().empty:
        of_blocks, of_context, places = spec("B A M N H"), spec("B S K H"), spec("B A")
        # No check of what varies over which axis: it does not look into custom calls.
        run = jax.shard_map(
            run,
            in_specs=(of_blocks, (of_blocks,) * 2, (of_context,) * 2, places, places),
            out_specs=of_blocks,
            check_vma=False,
        )
    return run(q, own, context, anchors, first)


def _attend(
    q: Array,
    own: tuple[Array, Array],
    context: tuple[Array, Array],
    anchors: Array,
    first: Array,
    window: int | None,
    interpret: bool | None,
    causal: bool,
) -> Array:
    batch, count, size, heads, width = q.shape
    kv_heads = own[0].shape[3]
    queries = q.reshape(batch, count, size, kv_heads, heads // kv_heads, width)
    each = size * heads // kv_heads
    tile = min(max(ROWS // each, 1), count)  # blocks of a tile
    tiles = -(-count // tile)

    def tiled(x: Array) -> Array:
        """[B, A, ...] -> [B, tiles, blocks of a tile, ...]; the blocks that are added see nothing."""
        x = jnp.pad(x, ((0, 0), (0, tiles * tile - count), *((0, 0) for _ in x.shape[2:])))
        return x.reshape(batch, tiles, tile, *x.shape[2:])

    def whole(x: Array) -> Array:
        """[B, K, tiles, ..., rows of a tile] -> [B, A, M, K, G, ...]."""
        x = x[..., : tile * each].reshape(*x.shape[:-1], tile, size, heads // kv_heads)
        x = x.transpose(0, 2, x.ndim - 3, x.ndim - 2, 1, x.ndim - 1, *range(3, x.ndim - 3))
        return x.reshape(batch, tiles * tile, *x.shape[3:])[:, :count]

    def filled(x: Array) -> Array:
        """Rows for whole registers; those that are added see nothing."""
        return jnp.pad(x, (*((0, 0) for _ in x.shape[1:]), (0, -x.shape[-1] % LANES)))

    in_lanes = tiled(queries).transpose(0, 4, 1, 6, 2, 3, 5).reshape(batch, kv_heads, tiles, width, tile * each)
    low = jnp.broadcast_to(first[..., None], (batch, count, size))
    if window is not None:
        low = jnp.maximum(low, anchors[..., None] + jnp.arange(1 - window, 1 - window + size, dtype=jnp.int32))
    bounds = tiled(jnp.stack([low, jnp.broadcast_to(anchors[..., None], low.shape)], axis=-1))
    bounds = jnp.repeat(bounds.transpose(0, 1, 4, 2, 3), heads // kv_heads, axis=-1).reshape(batch, tiles, 2, -1)
    in_lanes, bounds = filled(in_lanes), filled(bounds)
    length = context[0].shape[1]
    k, v = (jnp.pad(x, ((0, 0), (0, -length % LANES), (0, 0), (0, 0))).swapaxes(1, 2) for x in context)
    outer, before = map(whole, _context(in_lanes, k, v, bounds, interpret))

    # The own part, which every query has, and the sum of both.
    inner = jnp.einsum("BAMKGH,BAXKH->BAMKGX", queries, own[0], preferred_element_type=jnp.float32) * width**-0.5
    offsets = jnp.arange(size, dtype=jnp.int32)
    inside = in_window(offsets[:, None] - offsets, window, causal)[:, None, None]
    inner = jnp.where(inside, inner, LEAST)
    largest = jax.lax.stop_gradient(jnp.maximum(inner.max(axis=-1), before))
    weights, kept = jnp.exp(inner - largest[..., None]), jnp.exp(before - largest)
    out = jnp.einsum("BAMKGX,BAXKH->BAMKGH", weights.astype(own[1].dtype), own[1], preferred_element_type=jnp.float32)
    out = (out + kept[..., None] * outer.astype(jnp.float32)) / (weights.sum(axis=-1) + kept)[..., None]
    return out.astype(q.dtype).reshape(q.shape)


def spans(bounds: Array, keys: int) -> tuple[Array, Array]:
    """The key blocks [begin, end) that each tile visits, of bounds [B, tiles, 2, rows]: both [B, tiles].

    They are those that any of its rows sees, and what lies between.
    """
    low, high = bounds[:, :, 0], bounds[:, :, 1]
    some = low < high
    end = jax.lax.div(jnp.where(some, high, 0).max(axis=-1) + keys - 1, keys)
    begin = jax.lax.div(jnp.where(some, low, jnp.iinfo(jnp.int32).max).min(axis=-1), keys)
    return jnp.minimum(begin, end), end


def visitors(begin: Array, end: Array, count: int) -> tuple[Array, Array]:
    """The tiles [first, last) among which are all that visit each of `count` key blocks: both [B, count]."""
    place = jnp.arange(count, dtype=jnp.int32)
    visits = (begin[:, :, None] <= place) & (place < end[:, :, None])  # [B, tiles, count]
    number = jnp.arange(1, begin.shape[1] + 1, dtype=jnp.int32)[:, None]
    last = jnp.where(visits, number, 0).max(axis=1)
    return jnp.minimum(jnp.where(visits, number - 1, begin.shape[1]).min(axis=1), last), last


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _context(q: Array, k: Array, v: Array, bounds: Array, interpret: bool | None) -> tuple[Array, Array]:
    """Attention over the context alone, and its log-sum-exp.

    Args:
        q: [B, K, tiles, H, rows].
        k, v: [B, K, S, H], S a multiple of LANES.
        bounds: [B, tiles, 2, rows], the positions low ≤ k < high that a row sees.

    Returns:
        [B, K, tiles, H, rows], zeros where a row sees nothing, and [B, K, tiles, rows] in float32, LEAST there.
    """
    return _forward(q, k, v, bounds, interpret)[0]


def _forward(q: Array, k: Array, v: Array, bounds: Array, interpret: bool | None) -> tuple[Any, Any]:
    width, rows = q.shape[3:]
    keys = math.gcd(k.shape[2], KEYS)
    begin, end = spans(bounds, keys)
    multiply = _product(q.dtype)

    def kernel(begin: Any, end: Any, bounds: Any, q: Any, k: Any, vt: Any, out: Any, sums: Any, *scratch: Any) -> None:
        most, total, acc = scratch
        place = begin[pl.program_id(0), pl.program_id(2)] + pl.program_id(3)

        @pl.when(pl.program_id(3) == 0)
        def first() -> None:
            most[...] = jnp.full_like(most, LEAST)
            total[...] = jnp.zeros_like(total)
            acc[...] = jnp.zeros_like(acc)

        @pl.when(place < end[pl.program_id(0), pl.program_id(2)])
        def add() -> None:
            scores = multiply(k[...], q[...], PLAIN) * width**-0.5
            seen = _seen(bounds, place * keys, scores.shape)
            now = jnp.maximum(most[...], jnp.where(seen, scores, LEAST).max(axis=0, keepdims=True))
            weights, kept = jnp.where(seen, jnp.exp(scores - now), 0.0), jnp.exp(most[...] - now)
            most[...] = now
            total[...] = total[...] * kept + weights.sum(axis=0, keepdims=True)
            acc[...] = acc[...] * kept + multiply(vt[...], weights.astype(vt.dtype), PLAIN)

        @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
        def last() -> None:
            some = total[...] > 0  # a row that sees something has a sum of at least 1
            of = jnp.where(some, total[...], 1.0)
            out[...] = (acc[...] / of).astype(out.dtype)
            sums[...] = jnp.where(some, most[...] + jnp.log(of), LEAST)

    at = _specs(_over_keys, width, rows, keys)
    out, sums = call_kernel(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((*q.shape[:3], 1, rows), jnp.float32)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(*q.shape[:3], jnp.maximum((end - begin).max(), 1)),
            in_specs=[at["bounds"], at["queries"], at["keys"], at["keys turned"]],
            out_specs=[at["queries"], at["sums"]],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in ((1, rows), (1, rows), (width, rows))],
        ),
        compiler_params=PARALLEL,
        interpret=interpret,
        name="blocks_forward",
    )(begin, end, bounds, q, k, v.swapaxes(2, 3))
    sums = sums[:, :, :, 0]
    return (out, sums), (q, k, v, bounds, out, sums)


def _backward(interpret: bool | None, kept: Any, gradients: tuple[Array, Array]) -> tuple[Array, Array, Array, None]:
    q, k, v, bounds, out, sums = kept
    d_out, d_sums = gradients
    width, rows = q.shape[3:]
    keys = math.gcd(k.shape[2], KEYS)
    begin, end = spans(bounds, keys)
    first, last = visitors(begin, end, k.shape[2] // keys)
    multiply = _product(q.dtype)
    # The softmax's own gradient takes from each score the row's mean; the log-sum-exp's adds its gradient.
    mean = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=3) - d_sums
    known = jnp.stack([sums, mean], axis=3)  # [B, K, tiles, 2, rows]

    def slopes(place: Any, bounds: Any, known: Any, q: Any, d_out: Any, k: Any, v: Any) -> tuple[Array, Array]:
        """The weights, and the gradient of q · k / √H of one key block and one tile, times √H."""
        scores = multiply(k[...], q[...], PLAIN) * width**-0.5
        seen = _seen(bounds, place * keys, scores.shape)
        weights = jnp.where(seen, jnp.exp(scores - known[0:1]), 0.0)
        return weights, weights * (multiply(v[...], d_out[...], PLAIN) - known[1:2])

    def of_queries(
        begin: Any, end: Any, bounds: Any, known: Any, q: Any, d_out: Any, k: Any, kt: Any, v: Any, dq: Any, acc: Any
    ) -> None:
        place = begin[pl.program_id(0), pl.program_id(2)] + pl.program_id(3)

        @pl.when(pl.program_id(3) == 0)
        def first() -> None:
            acc[...] = jnp.zeros_like(acc)

        @pl.when(place < end[pl.program_id(0), pl.program_id(2)])
        def add() -> None:
            _, slope = slopes(place, bounds, known, q, d_out, k, v)
            acc[...] += multiply(kt[...], slope.astype(kt.dtype), PLAIN)

        @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
        def last() -> None:
            dq[...] = (acc[...] * width**-0.5).astype(dq.dtype)

    def of_keys(begin: Any, end: Any, first: Any, last: Any, *refs: Any) -> None:
        bounds, known, q, d_out, k, v, dk, dv, acc_k, acc_v = refs
        b, place = pl.program_id(0), pl.program_id(2)
        tile = first[b, place] + pl.program_id(3)

        @pl.when(pl.program_id(3) == 0)
        def start() -> None:
            acc_k[...] = jnp.zeros_like(acc_k)
            acc_v[...] = jnp.zeros_like(acc_v)

        there = jnp.minimum(tile, begin.shape[1] - 1)

        @pl.when((tile < last[b, place]) & (begin[b, there] <= place) & (place < end[b, there]))
        def add() -> None:
            weights, slope = slopes(place, bounds, known, q, d_out, k, v)
            acc_v[...] += multiply(weights.astype(d_out.dtype), d_out[...], TURNED)
            acc_k[...] += multiply(slope.astype(q.dtype), q[...], TURNED)

        @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
        def finish() -> None:
            dk[...] = (acc_k[...] * width**-0.5).astype(dk.dtype)
            dv[...] = acc_v[...].astype(dv.dtype)

    at = _specs(_over_keys, width, rows, keys)
    dq = call_kernel(
        of_queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(*q.shape[:3], jnp.maximum((end - begin).max(), 1)),
            in_specs=[at[x] for x in ("bounds", "known", "queries", "queries", "keys", "keys turned", "keys")],
            out_specs=at["queries"],
            scratch_shapes=[pltpu.VMEM((width, rows), jnp.float32)],
        ),
        compiler_params=PARALLEL,
        interpret=interpret,
        name="blocks_backward_queries",
    )(begin, end, bounds, known, q, d_out, k, k.swapaxes(2, 3), v)
    at = _specs(_over_tiles, width, rows, keys)
    dk, dv = call_kernel(
        of_keys,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(*q.shape[:2], k.shape[2] // keys, jnp.maximum((last - first).max(), 1)),
            in_specs=[at[x] for x in ("bounds", "known", "queries", "queries", "keys", "keys")],
            out_specs=[at["keys"], at["keys"]],
            scratch_shapes=[pltpu.VMEM((keys, width), jnp.float32)] * 2,
        ),
        compiler_params=PARALLEL,
        interpret=interpret,
        name="blocks_backward_keys",
    )(begin, end, first, last, bounds, known, q, d_out, k, v)
    return dq, dk, dv, None


_context.defvjp(_forward, _backward)


def _product(dtype: Any) -> Any:
    """A product of matrices, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)


def _seen(bounds: Any, begin: Any, shape: tuple[int, ...]) -> Array:
    """Which of the keys from `begin` on each row sees, [keys, rows]."""
    key = begin + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (key >= bounds[0:1]) & (key < bounds[1:2])


def _over_keys(t: Any, j: Any, b: Any, begin: Any, end: Any) -> tuple[Any, Any]:
    """The tile and the key block at (t, j); past a tile's last key block that one again, which is there already."""
    return t, jnp.minimum(begin[b, t] + j, jnp.maximum(end[b, t] - 1, begin[b, t]))


def _over_tiles(place: Any, i: Any, b: Any, begin: Any, end: Any, first: Any, last: Any) -> tuple[Any, Any]:
    """Likewise at (key block, i)."""
    return jnp.minimum(first[b, place] + i, jnp.maximum(last[b, place] - 1, first[b, place])), place


def _specs(walk: Any, width: int, rows: int, keys: int) -> dict[str, pl.BlockSpec]:
    """What a kernel holds of each array at a point (B, K, ...) of its grid, whose last two axes `walk` reads."""

    def of_tile(size: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, None, size, rows), lambda b, h, x, y, *known: (b, h, walk(x, y, b, *known)[0], 0, 0)
        )

    return {
        "queries": of_tile(width),
        "known": of_tile(2),
        "sums": of_tile(1),
        "bounds": pl.BlockSpec((None, None, 2, rows), lambda b, h, x, y, *known: (b, walk(x, y, b, *known)[0], 0, 0)),
        "keys": pl.BlockSpec((None, None, keys, width), lambda b, h, x, y, *known: (b, h, walk(x, y, b, *known)[1], 0)),
        "keys turned": pl.BlockSpec(
            (None, None, width, keys), lambda b, h, x, y, *known: (b, h, 0, walk(x, y, b, *known)[1])
        ),
    }
