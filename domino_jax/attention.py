"""Grouped-query attention over a cache whose rows have lengths of their own: one interface, three backends.

Row b's T queries stand at positions start[b] ... start[b] + T - 1, where their own keys have been written. The live
part of its cache is start[b] + T positions long; everything behind it is stale. What a query sees follows from that and
two settings: with `causal`, the positions up to its own; without, the whole live part (a drafter's block); with a
`window` W, of those the ones that are less than W positions away (docs/algorithm.md, section 3). Where the queries are
the nodes of a tree, `sees` says which of each other they see, and the cache before them they see whole.

    xla     Products over the whole length bucket and a mask: any device, any dtype. Its cost follows the bucket, at
            most twice the live length.
    cudnn   `kernels.attention_cudnn`, for NVIDIA GPUs and 16-bit floats. It stops at each row's length.
    pallas  `kernels.attention_tpu` for TPUs, `kernels.attention_gpu` for NVIDIA GPUs. They neither fetch nor compute
            blocks beyond a row's length.

"auto" is xla on every kind of device that is not in TESTED_KINDS. On the others it is the fastest backend that agrees
with xla there (`domino_jax.runtime.autotune`).
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax.errors import DominoError
from domino_jax.paged import AnyKVCache, PagedKVCache, gather_pages
from domino_jax.sharding import spec

Backend = Literal["xla", "cudnn", "pallas"]
BackendChoice = Literal["auto", "xla", "cudnn", "pallas"]

# The kinds of device (`jax.Device.device_kind`) on which tests/domino_jax/test_attention.py has passed with a kernel.
# Whoever runs it on another kind adds a line here.
TESTED_KINDS: dict[str, tuple[Backend, ...]] = {}
WIDEST_CUDNN_HEAD = 128  # 256 from Hopper on; every model of the table has 128
SMALLEST_TRITON_HEAD = 16
TPU_LANES = 128  # JAX's kernel for pages takes heads of whole registers
LARGEST_ALONE = 1024  # queries whose scores exist at a time where tokens attend among themselves


def available_backends(
    asked: BackendChoice, head_dims: Iterable[int], dtype: Any, device: Any, trees: bool = False
) -> tuple[Backend, ...]:
    """The backends to choose from on a device: the one asked for; with "auto" xla, then tested kernels.

    Args:
        head_dims: H of each model that will run.
        dtype: of queries and caches.
        device: one of those that programs are compiled for.
        trees: queries will be the nodes of trees.

    Raises:
        DominoError: the backend asked for can't run here; it is never replaced by another one.
    """
    head_dims = tuple(head_dims)
    if asked == "auto":
        tested = TESTED_KINDS.get(device.device_kind, ())
        return ("xla", *(backend for backend in tested if not _refusal(backend, head_dims, dtype, device, trees)))
    refusal = _refusal(asked, head_dims, dtype, device, trees)
    if refusal:
        raise DominoError(f"{refusal}: give --attention auto or xla.")
    return (asked,)


def _refusal(backend: Backend, head_dims: Iterable[int], dtype: Any, device: Any, trees: bool) -> str | None:
    """Why a backend can't run on a device, or None."""
    if backend == "xla":
        return None
    nvidia = device.platform == "gpu" and "cuda" in device.client.platform_version.lower()
    if backend == "pallas":
        if trees:
            return "the Pallas attention kernel has no mask for trees of drafts"
        if device.platform == "tpu":
            return None
        if not nvidia:
            return f"the Pallas attention kernel needs a TPU or an NVIDIA GPU, found {device.device_kind}"
        wrong = [width for width in head_dims if width < SMALLEST_TRITON_HEAD or width & (width - 1)]
        if wrong:
            return (
                "the Pallas attention kernel takes on GPUs heads of a power of two from "
                f"{SMALLEST_TRITON_HEAD} up, found head_dim {wrong[0]}"
            )
        return None
    if not nvidia:
        return f"cuDNN's attention needs an NVIDIA GPU, found {device.device_kind}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's attention takes bfloat16, found {jnp.dtype(dtype).name}"
    wrong = [width for width in head_dims if width % 8 or width > WIDEST_CUDNN_HEAD]
    if wrong:
        return f"cuDNN's attention takes heads of a multiple of 8 up to {WIDEST_CUDNN_HEAD}, found head_dim {wrong[0]}"
    return None


def attend(
    q: Array,
    k: Array,
    v: Array,
    start: Array,
    causal: bool = True,
    window: int | None = None,
    backend: Backend = "xla",
    sees: Array | None = None,
) -> Array:
    """softmax(q·k / √H) · v over what each query sees, the softmax in float32.

    On a mesh, where rows lie on `data` and heads on `model`, the compiler partitions xla; a kernel runs on each device
    over its own part, and no data crosses between devices.

    Args:
        q: [B, T, N, H].
        k, v: [B, K, S, H], as the cache holds them; row b's from start[b] to start[b] + T - 1 are the queries' own.
        start: [B] int32, or [1] for all rows alike (xla). A row with start + T > S is computed and means nothing.
        causal, window: see the module.
        sees: [B, T, T] bool of queries and their own keys, which stand in the cache in the order of the queries; None
            for those that follow each other. Not with a window, nor with pallas.

    Returns:
        [B, T, N, H].
    """
    assert backend in get_args(Backend) and (sees is None or (window is None and backend != "pallas"))
    if backend == "xla":

        def run_xla(q: Array, k: Array, v: Array, start: Array, sees: Array | None, **how: bool) -> Array:
            return attend_xla(q, k, v, start, causal, window, None, sees, **how)

        on_tpu = partial(run_xla, heads_first=True)
        return jax.lax.platform_dependent(q, k, v, start, sees, tpu=on_tpu, default=run_xla)
    # Imported here: the kernels use this module's helpers, and xla does without Pallas.
    from domino_jax.kernels import attention_cudnn, attention_gpu, attention_tpu

    def run(q: Array, k: Array, v: Array, start: Array, *sees: Array) -> Array:
        how: dict[str, Any] = {"causal": causal, "window": window}
        if backend == "cudnn":
            return attention_cudnn.attend_cudnn(q, k, v, start, **how, sees=sees[0] if sees else None)
        of_gpu = partial(attention_gpu.attend_gpu, **how, interpret=False)
        return jax.lax.platform_dependent(q, k, v, start, cuda=of_gpu, default=partial(attention_tpu.attend_tpu, **how))

    letters = "B T N H", "B K S H", "B K S H", "B"
    if sees is None:
        return _on_each_device(run, letters, q, k, v, start)
    return _on_each_device(run, (*letters, "B T T"), q, k, v, start, sees)


def _on_each_device(run: Callable[..., Array], letters: tuple[str, ...], *given: Array) -> Array:
    """Run a kernel on each device over its own part of arrays with these axes; it gives [B, T, N, H]."""
    if jax.sharding.get_abstract_mesh().empty:
        return run(*given)
    # No check of what varies over which axis: it does not look into custom calls.
    return jax.shard_map(run, in_specs=tuple(map(spec, letters)), out_specs=spec("B T N H"), check_vma=False)(*given)


def attend_cached(
    q: Array,
    cache: AnyKVCache,
    layer: int,
    start: Array,
    causal: bool = True,
    window: int | None = None,
    backend: Backend = "xla",
    sees: Array | None = None,
) -> Array:
    """`attend` over one layer of a cache, contiguous or in pages.

    A cache in pages is gathered first, a layer at a time: right on any device, for one more copy of what the rows hold.
    With pallas the pages themselves are read: on NVIDIA GPUs always, on TPUs where attention is causal and heads are
    a multiple of 128 wide.
    """
    if isinstance(cache, PagedKVCache) and backend == "pallas" and sees is None:
        return _attend_pages(q, cache.pages[layer], cache.table, start, causal, window)
    return attend(q, *cache.layer(layer), start, causal, window, backend, sees)


def _attend_pages(q: Array, pages: Array, table: Array, start: Array, causal: bool, window: int | None) -> Array:
    """`attend_cached` by the kernel of the device that the program is compiled for; for a CPU by gathering."""
    from domino_jax.kernels.attention_gpu import attend_pages_gpu
    from domino_jax.kernels.attention_tpu import attend_tpu
    from domino_jax.kernels.paged_attention_tpu import attend_pages_tpu

    def gathered(q: Array, pages: Array, table: Array, start: Array, run: Callable[..., Array] = attend_xla) -> Array:
        return run(q, *gather_pages(pages, table), start, causal, window)

    of_gpu = partial(attend_pages_gpu, causal=causal, window=window, interpret=False)
    by_kernel = causal and q.shape[-1] % TPU_LANES == 0
    of_tpu = partial(attend_pages_tpu, window=window) if by_kernel else partial(gathered, run=attend_tpu)

    def run(*given: Array) -> Array:
        return jax.lax.platform_dependent(*given, cpu=gathered, cuda=of_gpu, default=of_tpu)

    return _on_each_device(run, ("B T N H", "- - K H", "B -", "B"), q, pages, table, start)


def attend_without_cache(
    q: Array, k: Array, v: Array, starts: Array | None = None, backend: Backend = "xla", implementation: Any = "cudnn"
) -> Array:
    """Causal attention of the tokens of a row among themselves, without a cache; it can be differentiated.

    With xla the scores of a part of the queries exist at a time, against the keys up to the part's end. With cudnn no
    scores exist; packed rows need a mask, [B, 1, T, T]. pallas has no kernel for this and is the same as xla.

    Args:
        q: [B, T, N, H].
        k, v: [B, T, K, H].
        starts: [B, T], the first position that each query sees; 0 when None.

    Returns:
        [B, T, N, H].
    """
    length = q.shape[1]
    if backend == "cudnn":
        mask = None if starts is None else (jnp.arange(length, dtype=jnp.int32) >= starts[:, :, None])[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=implementation)
    k, v, parts = k.swapaxes(1, 2), v.swapaxes(1, 2), []
    for at in range(0, length, LARGEST_ALONE):
        end = min(at + LARGEST_ALONE, length)
        since = None if starts is None else starts[:, at:end]
        parts.append(
            attend_xla(q[:, at:end], k[:, :, :end], v[:, :, :end], jnp.full(1, at, jnp.int32), True, None, since)
        )
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def in_window(distance: Array, window: int | None, causal: bool = True) -> Array:
    """Whether a key `distance` positions before the query is visible: less than `window` away, or always.

    Args:
        causal: and not behind the query, where there is a window.
    """
    if window is None:
        return jnp.ones(distance.shape, bool)
    return (distance < window) & (distance >= 0 if causal else distance > -window)


def visible(
    start: Array, tokens: int, capacity: int, causal: bool, window: int | None, sees: Array | None = None
) -> Array:
    """What each query sees: start [B] -> [B, T, S] bool."""
    seen = jnp.arange(capacity, dtype=jnp.int32)
    if sees is not None:
        place = seen - start[:, None]  # [B, S], among the queries
        own = jnp.take_along_axis(sees, jnp.clip(place, 0, tokens - 1)[:, None], axis=2)
        return (place < 0)[:, None] | (own & (place < tokens)[:, None])
    positions = start[:, None] + jnp.arange(tokens, dtype=jnp.int32)
    if causal and window is None:
        return seen <= positions[:, :, None]
    live = jnp.broadcast_to((seen < start[:, None] + tokens)[:, None], (*positions.shape, capacity))
    return live if window is None else live & in_window(positions[:, :, None] - seen, window, causal)


def side_by_side(q: Array, kv_heads: int) -> Array:
    """The queries that share a KV head in one matrix: [B, T, N, H] -> [B, K, TG, H], G varying fastest."""
    batch, tokens, heads, width = q.shape
    groups = q.reshape(batch, tokens, kv_heads, heads // kv_heads, width)
    return groups.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, -1, width)


def apart(rows: Array, tokens: int) -> Array:
    """`side_by_side` undone: [B, K, TG, H] -> [B, T, N, H]."""
    batch, kv_heads, _, width = rows.shape
    return rows.reshape(batch, kv_heads, tokens, -1, width).transpose(0, 2, 1, 3, 4).reshape(batch, tokens, -1, width)


def attend_xla(
    q: Array,
    k: Array,
    v: Array,
    start: Array,
    causal: bool,
    window: int | None,
    since: Array | None = None,
    sees: Array | None = None,
    heads_first: bool = False,
) -> Array:
    """`attend` as plain matrix products: any other order of axes and XLA on a CPU transposes the cache.

    Args:
        since: [B, T], positions before which a query sees nothing; 0 when None.
        sees: see `attend`.
        heads_first: keep the G queries of a position apart, in the order of the projection: on a TPU nothing is then
            transposed on the way in and out.
    """
    tokens, kv_heads, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[1]
    seen = visible(start, tokens, k.shape[2], causal, window, sees)
    if since is not None:
        seen &= jnp.arange(k.shape[2], dtype=jnp.int32) >= since[:, :, None]
    if heads_first:
        rows, axes = q.reshape(*q.shape[:2], kv_heads, group, -1).transpose(0, 2, 3, 1, 4), "GT"
        seen = seen[:, None, None]
    else:
        rows, axes = side_by_side(q, kv_heads), "X"
        seen = jnp.repeat(seen, group, axis=1)[:, None]
    scores = jnp.einsum(f"BK{axes}H,BKSH->BK{axes}S", rows, k, preferred_element_type=jnp.float32)
    scores *= q.shape[-1] ** -0.5
    # Finite, so that a query that sees nothing (a padded row) gives a mean and not NaN.
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(v.dtype)
    out = jnp.einsum(f"BK{axes}S,BKSH->BK{axes}H", weights, v)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape) if heads_first else apart(out, tokens)
