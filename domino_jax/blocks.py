"""Attention of many blocks over one sequence's context and themselves, for training (SPEC section 7).

A block's queries see the context positions from their conversation's first up to, not including, their anchor, and
their own block; nothing of other blocks. The two sides are kept apart, so no A·M x A·M mask exists. Two forms:

    dense    Scores of all queries against the whole context: what the other is tested against.
    chunked  Some blocks at a time, in a loop whose backward pass computes them again: neither the scores nor a mask of
             A·M x S exist.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax.attention import in_window
from domino_jax.sharding import constrain

Form = Literal["dense", "chunked"]
Choice = Literal["auto", "dense", "chunked"]

ROWS = 512  # queries (blocks times M) of a sequence whose scores exist at a time


def choose(asked: Choice, blocks: int, size: int) -> Form:
    """The form to run: "auto" is chunked where there is more than one group of blocks."""
    if asked != "auto":
        assert asked in get_args(Form)
        return asked
    return "dense" if blocks * size <= ROWS else "chunked"


def attend(
    q: Array,
    own: tuple[Array, Array],
    context: tuple[Array, Array],
    anchors: Array,
    first: Array | None,
    window: int | None,
    form: Form,
) -> Array:
    """softmax(q·k / √H) · v over what each block sees, the softmax in float32.

    Args:
        q: [B, A, M, N, H].
        own: keys and values of the blocks, each [B, A, M, K, H].
        context: of the sequences, each [B, S, K, H].
        anchors: [B, A] absolute positions.
        first: [B, A], the first context position that each block sees; 0 when None.
        window: of a sliding layer: a query at p sees the W positions up to p, in its block too.

    Returns:
        [B, A, M, N, H].
    """
    blocks, size = q.shape[1:3]
    if first is None:
        first = jnp.zeros_like(anchors)
    group = max(1, ROWS // size)
    if form == "dense" or blocks <= group:
        return _dense(q, own, context, anchors, first, window)
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
        return _dense(q, own, (k, v), anchors, first, window)

    pieces = (cut(q), (cut(own[0]), cut(own[1])), cut(anchors), cut(first))
    out = jnp.moveaxis(jax.lax.map(one, pieces), 0, 1)
    return constrain(out.reshape(q.shape[0], groups * group, *q.shape[2:])[:, :blocks], "B A M N H")


def _dense(
    q: Array,
    own: tuple[Array, Array],
    context: tuple[Array, Array],
    anchors: Array,
    first: Array,
    window: int | None,
) -> Array:
    """All scores at once, in two pieces: [M, S] and [M, M] a block."""
    batch, blocks, size, _, width = q.shape
    (own_k, own_v), (ctx_k, ctx_v) = own, context
    length = ctx_k.shape[1]
    offsets, seen = jnp.arange(size, dtype=jnp.int32), jnp.arange(length, dtype=jnp.int32)
    places = anchors[..., None] + offsets  # [B, A, M]
    low, high = first[:, :, None, None], anchors[:, :, None, None]
    before = (seen >= low) & (seen < high) & in_window(places[..., None] - seen, window)  # [B, A, M or 1, S]
    inside = in_window(offsets[:, None] - offsets, window)
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
