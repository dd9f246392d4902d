"""Anchors: where blocks begin (docs/algorithm.md, section 7)."""

import jax
import jax.numpy as jnp
from jax import Array


def draw_anchors(key: Array, mask: Array, count: int, starts: Array | None = None) -> tuple[Array, Array]:
    """Up to `count` anchors a sequence, without replacement, where the mask is on at a and a + 1.

    The draw is of the key and the rows' places alone: a mesh and accumulation change nothing about it. They come in
    order of their position, so that neighbours see nearly the same context (what `blocks_pallas` is made for); those
    that are none stand at 0, where none is seen. To the loss they are a set.

    Args:
        mask: [B, S] bool, the loss mask.
        count: A; at most S of them are drawn.
        starts: [B, S], the first position of each token's conversation: a and a + 1 are of one. One when None.

    Returns:
        anchors [B, A] int32 and whether each is one [B, A] bool: a sequence with fewer legal places has
        fewer anchors, one with none has none.
    """
    legal = mask & jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    if starts is not None:
        legal &= starts == jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    # The A largest of independent uniform numbers are a uniform draw without replacement.
    score = jnp.where(legal, jax.random.uniform(key, mask.shape), -1.0)
    best, anchors = jax.lax.top_k(score, min(count, mask.shape[1]))
    valid = best >= 0
    anchors = jnp.where(valid, anchors, 0).astype(jnp.int32)
    anchors, valid = jax.lax.sort((anchors, valid), dimension=1, num_keys=1)
    return anchors, valid
