"""Temperature, top-k, top-p and min-p: logits to the distribution that is drawn from (SPEC section 6)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Sampling(NamedTuple):
    """Settings of each row; a batch may mix them."""

    temperature: Array  # [B] float32; 0 is greedy
    top_k: Array  # [B] int32; 0 is off
    top_p: Array  # [B] float32; 1 is off
    min_p: Array  # [B] float32; 0 is off


def settings(batch: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Sampling:
    """The same settings for every row."""
    return Sampling(
        jnp.full(batch, temperature, jnp.float32),
        jnp.full(batch, top_k, jnp.int32),
        jnp.full(batch, top_p, jnp.float32),
        jnp.full(batch, min_p, jnp.float32),
    )


def probabilities(logits: Array, sampling: Sampling) -> Array:
    """The distribution after all filters, in transformers' order: temperature, top-k, top-p, min-p.

    Tokens that tie with the last one kept are kept too (transformers keeps some of them, by index).

    Args:
        logits: [B, T, V].
        sampling: one setting a row. A row of temperature 0 becomes one-hot at its argmax.

    Returns:
        [B, T, V] float32, each [V] summing to one.
    """
    vocab = logits.shape[-1]
    temperature, top_k, top_p, min_p = (x[:, None, None] for x in sampling)
    greedy = jax.nn.one_hot(jnp.argmax(logits, axis=-1), vocab, dtype=jnp.float32)
    scaled = logits.astype(jnp.float32) / jnp.where(temperature > 0, temperature, 1.0)

    def truncate(scaled: Array) -> Array:
        descending = -jnp.sort(-scaled, axis=-1)
        # Top-k: drop what is below the k-th largest; ties with it stay.
        k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
        kept = jnp.where(jnp.arange(vocab) < k, descending, -jnp.inf)
        kth = jnp.min(jnp.where(jnp.isfinite(kept), kept, jnp.inf), axis=-1, keepdims=True)
        scaled = jnp.where(scaled >= kth, scaled, -jnp.inf)
        # Top-p: keep a token while the mass of the likelier ones is below p; the first always stays.
        descending = jnp.where(descending >= kth, descending, -jnp.inf)
        mass = jax.nn.softmax(descending, axis=-1)
        inside = (jnp.cumsum(mass, axis=-1) - mass < top_p) | (jnp.arange(vocab) == 0) | (top_p >= 1)
        lowest = jnp.min(jnp.where(inside & jnp.isfinite(descending), descending, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(scaled >= lowest, scaled, -jnp.inf)

    # Sorting the vocabulary costs more than all the rest here: only when some row asks for it.
    needed = jnp.any((sampling.temperature > 0) & ((sampling.top_k > 0) | (sampling.top_p < 1)))
    scaled = jax.lax.cond(needed, truncate, lambda s: s, scaled)
    probs = jax.nn.softmax(scaled, axis=-1)
    probs = jnp.where(probs >= min_p * jnp.max(probs, axis=-1, keepdims=True), probs, 0.0)
    probs /= jnp.sum(probs, axis=-1, keepdims=True)
    return jnp.where(temperature > 0, probs, greedy)


def draw(keys: Array, weights: Array) -> Array:
    """One index a row with probability proportional to weights [B, V]; keys [B]. Returns [B] int32."""
    return jax.vmap(lambda key, w: jax.random.categorical(key, jnp.log(w)))(keys, weights).astype(jnp.int32)


def pick(x: Array, index: Array) -> Array:
    """x[..., index]: x [..., V], index [...] -> [...]. A masked sum: it needs no gather where V is sharded."""
    return jnp.sum(jnp.where(jnp.arange(x.shape[-1]) == index[..., None], x, 0), axis=-1)
