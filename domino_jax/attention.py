"""Grouped-query attention over a cache whose rows have lengths of their own, in the forms that devices have.

Row b's T queries stand at positions start[b] ... start[b] + T - 1, where their own keys have been written, so that the
live part of its cache is start[b] + T positions long and everything behind it is stale. What a query sees follows from
that and two settings: with `causal`, the positions up to its own; without, the whole live part (a drafter's block);
with a `window` W, the W positions up to its own, whatever `causal` says (docs/algorithm.md, section 3).

Three forms, one meaning:

    xla     Products over the whole length bucket and a mask: any device, any dtype. Cost follows the bucket, at most
            twice the live length.
    cudnn   `jax.nn.dot_product_attention` by cuDNN, for NVIDIA GPUs and 16-bit floats. It stops at each row's length.
    pallas  A kernel of our own for TPUs, since none that JAX ships fits: `paged_attention` takes one query a row,
            `splash_attention` fixes its mask when it is traced, `flash_attention` reads the whole bucket, and
            `ragged_paged_attention` wants keys and values interleaved in pages. Blocks of the cache beyond each row's
            length are neither fetched nor computed. (JAX's own GPU kernels for decoding are Triton ones, a backend that
            JAX 0.11 declared deprecated: none is used.)

"auto" is the fastest of those that can run, as measured on the device at hand (`domino_jax.runtime.autotune`). The
other two have run on no device here. cuDNN's is held by JAX's statement of the same
function, ours by interpretation, both by what they lower to; see tests/domino_jax/test_attention.py,
which also runs on a device.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from domino_jax.errors import DominoError
from domino_jax.sharding import spec

Backend = Literal["xla", "cudnn", "pallas"]
BackendChoice = Literal["auto", "xla", "cudnn", "pallas"]

WIDEST_CUDNN_HEAD = 128  # 256 from Hopper on; every model of the table has 128
LARGEST_QUERY_BLOCK = 512  # rows of queries (T · G) that the Pallas kernel holds at once
LARGEST_KEY_BLOCK = 512  # cache positions likewise
LARGEST_ALONE = 1024  # queries whose scores exist at a time where tokens attend among themselves
LANES = 128  # the width of a TPU's vector registers
SUBLANES = 16  # their height, for 16-bit floats


def available_backends(asked: BackendChoice, head_dims: Iterable[int], dtype: Any) -> tuple[Backend, ...]:
    """The forms that may run on this process's devices: the one asked for, or with "auto" all that can, xla first.

    Args:
        head_dims: H of each model that will run.
        dtype: of queries and caches.

    Raises:
        DominoError: what was asked for can't run here; it is never replaced by another form.
    """
    head_dims = tuple(head_dims)
    if asked == "auto":
        return tuple(form for form in get_args(Backend) if not _refusal(form, head_dims, dtype))
    refusal = _refusal(asked, head_dims, dtype)
    if refusal:
        raise DominoError(f"{refusal}: give --attention auto or xla.")
    return (asked,)


def _refusal(form: Backend, head_dims: Iterable[int], dtype: Any) -> str | None:
    """Why a form can't run here, or None."""
    device = jax.devices()[0]
    if form == "pallas" and device.platform != "tpu":
        return f"the Pallas attention kernel needs a TPU, found {device.device_kind}"
    if form != "cudnn":
        return None
    if "cuda" not in device.client.platform_version.lower():
        return f"cuDNN's attention needs an NVIDIA GPU, found {device.device_kind}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's attention takes bfloat16, found {jnp.dtype(dtype).name}"
    wrong = [width for width in head_dims if width % 8 or width > WIDEST_CUDNN_HEAD]
    if wrong:
        return f"cuDNN's attention takes heads of a multiple of 8 up to {WIDEST_CUDNN_HEAD}, found head_dim {wrong[0]}"
    return None


def attend(
    q: Array, k: Array, v: Array, start: Array, causal: bool = True, window: int | None = None, form: Backend = "xla"
) -> Array:
    """softmax(q·k / √H) · v over what each query sees, the softmax in float32.

    On a mesh, where rows lie on `data` and heads on `model`, xla is divided by the compiler; the others run on each
    device over its own part, nothing crossing between them.

    Args:
        q: [B, T, N, H].
        k, v: [B, K, S, H], as the cache holds them; row b's from start[b] to start[b] + T - 1 are the queries' own.
        start: [B] int32, or [1] for all rows alike (xla). A row with start + T > S is computed and means nothing.
        causal, window: see the module.

    Returns:
        [B, T, N, H].
    """
    assert form in get_args(Backend)
    if form == "xla":
        return xla(q, k, v, start, causal, window)
    run = partial(cudnn if form == "cudnn" else pallas, causal=causal, window=window)
    if not jax.sharding.get_abstract_mesh().empty:
        queries, cache = spec("B T N H"), spec("B K S H")
        # No check of what varies over which axis: it does not look into custom calls.
        run = jax.shard_map(run, in_specs=(queries, cache, cache, spec("B")), out_specs=queries, check_vma=False)
    return run(q, k, v, start)


def attend_without_cache(
    q: Array, k: Array, v: Array, starts: Array | None = None, form: Backend = "xla", implementation: Any = "cudnn"
) -> Array:
    """Causal attention of the tokens of a row among themselves, without a cache; it can be differentiated.

    As xla the scores of a part of the queries exist at a time, against the keys up to its end. As cudnn none do; of
    packed rows it is told by a mask, [B, 1, T, T]. There is no pallas form: it is xla's.

    Args:
        q: [B, T, N, H].
        k, v: [B, T, K, H].
        starts: [B, T], the first position that each query sees; 0 when None.

    Returns:
        [B, T, N, H].
    """
    length = q.shape[1]
    if form == "cudnn":
        mask = None if starts is None else (jnp.arange(length, dtype=jnp.int32) >= starts[:, :, None])[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=implementation)
    k, v, parts = k.swapaxes(1, 2), v.swapaxes(1, 2), []
    for at in range(0, length, LARGEST_ALONE):
        end = min(at + LARGEST_ALONE, length)
        since = None if starts is None else starts[:, at:end]
        parts.append(xla(q[:, at:end], k[:, :, :end], v[:, :, :end], jnp.full(1, at, jnp.int32), True, None, since))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def in_window(distance: Array, window: int | None) -> Array:
    """Whether a key `distance` positions before the query is visible: 0 ≤ distance < window, or always."""
    if window is None:
        return jnp.ones(distance.shape, bool)
    return (distance >= 0) & (distance < window)


def visible(start: Array, tokens: int, capacity: int, causal: bool, window: int | None) -> Array:
    """What each query sees: start [B] -> [B, T, S] bool."""
    seen = jnp.arange(capacity, dtype=jnp.int32)
    positions = start[:, None] + jnp.arange(tokens, dtype=jnp.int32)
    if window is not None:
        return in_window(positions[:, :, None] - seen, window)
    if causal:
        return seen <= positions[:, :, None]
    return jnp.broadcast_to((seen < start[:, None] + tokens)[:, None], (*positions.shape, capacity))


def side_by_side(q: Array, kv_heads: int) -> Array:
    """The queries that share a KV head in one matrix: [B, T, N, H] -> [B, K, TG, H], G varying fastest."""
    batch, tokens, heads, width = q.shape
    groups = q.reshape(batch, tokens, kv_heads, heads // kv_heads, width)
    return groups.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, -1, width)


def apart(rows: Array, tokens: int) -> Array:
    """`side_by_side` undone: [B, K, TG, H] -> [B, T, N, H]."""
    batch, kv_heads, _, width = rows.shape
    return rows.reshape(batch, kv_heads, tokens, -1, width).transpose(0, 2, 1, 3, 4).reshape(batch, tokens, -1, width)


def xla(
    q: Array, k: Array, v: Array, start: Array, causal: bool, window: int | None, since: Array | None = None
) -> Array:
    """`attend` as plain matrix products: any other order of axes and XLA on a CPU transposes the cache.

    Args:
        since: [B, T], positions before which a query sees nothing; 0 when None.
    """
    tokens, kv_heads = q.shape[1], k.shape[1]
    rows = side_by_side(q, kv_heads)
    scores = jnp.einsum("BKXH,BKSH->BKXS", rows, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    seen = visible(start, tokens, k.shape[2], causal, window)
    if since is not None:
        seen &= jnp.arange(k.shape[2], dtype=jnp.int32) >= since[:, :, None]
    seen = jnp.repeat(seen, q.shape[2] // kv_heads, axis=1)[:, None]
    # Finite, so that a query that sees nothing (a padded row) gives a mean and not NaN.
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(v.dtype)
    return apart(jnp.einsum("BKXS,BKSH->BKXH", weights, v), tokens)


def cudnn(
    q: Array, k: Array, v: Array, start: Array, causal: bool, window: int | None, implementation: Any = "cudnn"
) -> Array:
    """`attend` by `jax.nn.dot_product_attention`.

    That takes keys as [B, S, K, H], which would transpose the cache. A KV head and its G query heads are given as a row
    of their own instead, [BK, S, 1, H]: the cache as it lies in memory. Its causal mask is aligned to position 0 and
    not to each row's start, so several causal queries are told what they see by a mask, [BK, 1, T, S].
    """
    batch, tokens, heads, width = q.shape
    kv_heads, capacity = k.shape[1:3]
    rows = side_by_side(q, kv_heads).reshape(batch * kv_heads, tokens, heads // kv_heads, width)
    keys, values = (x.reshape(batch * kv_heads, capacity, 1, width) for x in (k, v))
    mask = None
    if window is not None or (causal and tokens > 1):
        mask = jnp.repeat(visible(start, tokens, capacity, causal, window)[:, None], kv_heads, axis=0)
    out = jax.nn.dot_product_attention(
        rows,
        keys,
        values,
        mask=mask,
        # Never beyond the cache: a row that is over may stand at its end.
        key_value_seq_lengths=jnp.repeat(jnp.minimum(start + tokens, capacity), kv_heads),
        implementation=implementation,
    )
    return apart(out.reshape(batch, kv_heads, -1, width), tokens)


def pallas(
    q: Array, k: Array, v: Array, start: Array, causal: bool, window: int | None, interpret: bool | None = None
) -> Array:
    """`attend` as a TPU kernel: the online softmax over the blocks of the cache that a row's queries can see.

    The grid is (B, K, blocks of TG, blocks of S). The starts are known before the blocks are fetched: one that nobody
    sees is replaced by its neighbour, which is there already. The last axis ends with the longest row.

    Args:
        interpret: run it as XLA operations, which is for tests; by default on a CPU.
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
        end = begin + (last if causal or window is not None else tokens - 1)
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
            seen = key <= query if causal or window is not None else key < starts[b] + tokens
            if window is not None:
                seen &= key > query - window
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
    out = pl.pallas_call(
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
        interpret=jax.default_backend() == "cpu" if interpret is None else interpret,
        name="attend",
    )(start, rows, k, v)
    return apart(out[:, :, : tokens * group], tokens)
