"""Anchors: where blocks begin (SPEC section 7)."""

import jax
import jax.numpy as jnp
from jax import Array


def draw(key: Array, mask: Array, count: int) -> tuple[Array, Array]:
    """Up to `count` anchors a sequence, without replacement, where the mask is on at a and a + 1.

    Args:
        mask: [B, S] bool, the loss mask.
        count: A; at most S of them are drawn.

    Returns:
        anchors [B, A] int32 and whether each is one [B, A] bool: a sequence with fewer legal places has
        fewer anchors, one with none has none.
    """
    legal = mask & jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    # The A largest of independent uniform numbers are a uniform draw without replacement.
    score = jnp.where(legal, jax.random.uniform(key, mask.shape), -1.0)
    best, anchors = jax.lax.top_k(score, min(count, mask.shape[1]))
    return anchors.astype(jnp.int32), best >= 0
