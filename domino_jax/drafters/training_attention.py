"""Attention of many blocks over one sequence's context and themselves, for training (docs/algorithm.md, section 7).

A block's queries see the context positions from their conversation's first up to, not including, their anchor, and
their own block; nothing of other blocks. No A·M x A·M mask exists. Four backends:

    dense    Scores of all queries against the whole context: the reference for the others.
    chunked  Some blocks at a time, in a loop whose backward pass computes them again: neither the scores nor a mask of
             A·M x S exist. Every block meets the whole context, visible or not.
    cudnn    The same groups, each through cuDNN's kernel, for NVIDIA GPUs and 16-bit floats: a group's queries over the
             context and its own rows, with a mask of that group's size; scores never leave the chip. Blocks of a group
             see each other's rows as masked keys, ROWS more of them.
    pallas   A kernel for TPUs (`kernels.training_attention_tpu`): scores never leave the chip, no mask exists, and only
             the context that a tile of blocks sees is fetched and computed, in the backward pass too.

dense and chunked were measured on a CPU. The others have run on no device, and "auto" does not choose them: tests
compare cuDNN's masks with JAX's reference of the same function, interpret the kernel and look at what it lowers to.
libtpu compiles the kernel for v4, v5e, v5p and v6e, ahead of time and without a chip, which says nothing about speed.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax import attention
from domino_jax.attention import in_window
from domino_jax.config import BlockShape, DecoderConfig
from domino_jax.errors import DominoError
from domino_jax.sharding import constrain

BlockBackend = Literal["dense", "chunked", "cudnn", "pallas"]
BlockBackendChoice = Literal["auto", "dense", "chunked", "cudnn", "pallas"]

ROWS = 512  # queries (blocks times M) of a sequence whose scores exist at a time


def resolve_block_backend(asked: BlockBackendChoice, config: BlockShape, count: int) -> BlockBackend:
    """The backend for `count` blocks a sequence: "auto" is chunked where there is more than one group of them."""
    # On a device compare `python -m train.bench --block-attention` chunked with cudnn or pallas: both save the half of
    # all scores that chunked computes and masks, and keep scores on the chip.
    if asked == "auto":
        return "dense" if count * config.block_size <= ROWS else "chunked"
    return asked


def check_block_backend(asked: BlockBackendChoice, config: DecoderConfig, dtype: Any, device: Any) -> None:
    """Refuse a backend that can't run on a device; it is never replaced by another one.

    Args:
        dtype: of queries and keys.
        device: one of those that programs are compiled for.

    Raises:
        DominoError: it can't.
    """
    if asked == "cudnn":
        attention.available_backends("cudnn", (config.head_dim,), dtype, device)
    if asked == "pallas" and device.platform != "tpu":
        raise DominoError(
            f"the blocks' Pallas kernel needs a TPU, found {device.device_kind}: give --block-attention auto or "
            "chunked."
        )


def attend_blocks(
    q: Array,
    own: tuple[Array, Array],
    context: tuple[Array, Array],
    anchors: Array,
    first: Array | None,
    window: int | None,
    backend: BlockBackend,
    implementation: Any = "cudnn",
    causal: bool = True,
) -> Array:
    """softmax(q·k / √H) · v over what each block sees, the softmax in float32.

    Args:
        q: [B, A, M, N, H].
        own: keys and values of the blocks, each [B, A, M, K, H].
        context: of the sequences, each [B, S, K, H].
        anchors: [B, A] absolute positions.
        first: [B, A], the first context position that each block sees; 0 when None.
        window: of a sliding layer: a query at p sees the W positions up to p, in its block too.
        causal: with a window, a query does not see as far ahead as well.

    Returns:
        [B, A, M, N, H].
    """
    blocks, size = q.shape[1:3]
    if first is None:
        first = jnp.zeros_like(anchors)
    if backend == "pallas":
        from domino_jax.kernels import training_attention_tpu  # the others do without Pallas

        return training_attention_tpu.attend_blocks_tpu(q, own, context, anchors, first, window, causal=causal)
    group = max(1, ROWS // size)
    alone = partial(_cudnn, implementation=implementation) if backend == "cudnn" else _dense
    alone = partial(alone, causal=causal)
    if backend == "dense" or blocks <= group:
        return alone(q, own, context, anchors, first, window)
    # The keys' gradients are summed over the groups: in float32.
    wide = tuple(x.astype(jnp.float32) for x in context)
    groups = -(-blocks // group)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, groups * group - blocks), *((0, 0) for _ in x.shape[2:])))
        return jnp.moveaxis(x.reshape(x.shape[0], groups, group, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(piece: tuple[Array, tuple[Array, Array], Array, Array]) -> Array:
        q, own, anchors, first = piece
        k, v = (x.astype(q.dtype) for x in wide)
        return alone(q, own, (k, v), anchors, first, window)

    pieces = (cut(q), (cut(own[0]), cut(own[1])), cut(anchors), cut(first))
    out = jnp.moveaxis(jax.lax.map(one, pieces), 0, 1)
    return constrain(out.reshape(q.shape[0], groups * group, *q.shape[2:])[:, :blocks], "B A M N H")


def _visible(
    anchors: Array, first: Array, size: int, length: int, window: int | None, causal: bool
) -> tuple[Array, Array]:
    """What blocks see of the context [B, A, M, S], and of themselves [M, M]."""
    offsets, seen = jnp.arange(size, dtype=jnp.int32), jnp.arange(length, dtype=jnp.int32)
    places = (anchors[..., None] + offsets)[..., None]  # [B, A, M, 1]
    low, high = first[:, :, None, None], anchors[:, :, None, None]
    before = (seen >= low) & (seen < high) & in_window(places - seen, window)
    return before, in_window(offsets[:, None] - offsets, window, causal)


def _cudnn(
    q: Array,
    own: tuple[Array, Array],
    context: tuple[Array, Array],
    anchors: Array,
    first: Array,
    window: int | None,
    implementation: Any,
    causal: bool,
) -> Array:
    """One attention of all blocks' rows over [context ; the rows of all blocks], told by a mask what each sees."""
    batch, blocks, size = q.shape[:3]
    rows = blocks * size
    before, inside = _visible(anchors, first, size, context[0].shape[1], window, causal)
    apart = jnp.eye(blocks, dtype=bool)[:, None, :, None] & inside[None, :, None, :]  # [A, M, A, M]
    mask = jnp.concatenate(
        [before.reshape(batch, rows, -1), jnp.broadcast_to(apart.reshape(rows, rows), (batch, rows, rows))], axis=-1
    )
    k, v = (
        jnp.concatenate([ctx, x.reshape(batch, rows, *x.shape[3:])], axis=1)
        for ctx, x in zip(context, own, strict=True)
    )
    out = jax.nn.dot_product_attention(
        q.reshape(batch, rows, *q.shape[3:]), k, v, mask=mask[:, None], implementation=implementation
    )
    return out.reshape(q.shape)


def _dense(
    q: Array,
    own: tuple[Array, Array],
    context: tuple[Array, Array],
    anchors: Array,
    first: Array,
    window: int | None,
    causal: bool,
) -> Array:
    """All scores at once, in two pieces: [M, S] and [M, M] a block."""
    batch, blocks, size, _, width = q.shape
    (own_k, own_v), (ctx_k, ctx_v) = own, context
    length = ctx_k.shape[1]
    before, inside = _visible(anchors, first, size, length, window, causal)
    groups = q.reshape(batch, blocks, size, own_k.shape[3], -1, width)
    outer = jnp.einsum("BAMKGH,BSKH->BKGAMS", groups, ctx_k, preferred_element_type=jnp.float32)
    inner = jnp.einsum("BAMKGH,BAXKH->BKGAMX", groups, own_k, preferred_element_type=jnp.float32)
    least = jnp.finfo(jnp.float32).min
    scores = jnp.concatenate([jnp.where(before[:, None, None], outer, least), jnp.where(inside, inner, least)], axis=-1)
    # The block always sees itself, so no query is without a key.
    weights = jax.nn.softmax(scores * width**-0.5, axis=-1).astype(ctx_v.dtype)
    attended = jnp.einsum("BKGAMS,BSKH->BAMKGH", weights[..., :length], ctx_v)
    attended += jnp.einsum("BKGAMX,BAXKH->BAMKGH", weights[..., length:], own_v)
    return attended.reshape(q.shape)
