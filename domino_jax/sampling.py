"""Temperature, top-k, top-p and min-p: logits to the distribution that is drawn from (docs/algorithm.md, section 6)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

GREEDY_BELOW = 1e-5  # temperatures, as in vLLM: logits divided by far smaller ones overflow float32
LEAST_PENALTY = 1e-3  # of repetition: logits divided by far smaller ones overflow float32
DIGIT = 4  # bits of a score that one pass over the vocabulary finds


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen, and what ends them.

    Temperature 0 is greedy, and the filters' defaults are off. A temperature below GREEDY_BELOW becomes 0.

    Args:
        repetition_penalty: of tokens of prompt and output, LEAST_PENALTY or more; 1 is off.
        presence_penalty, frequency_penalty: of tokens of the output; 0 is off.
        logit_bias: tokens and what is added to their logits.
        min_tokens: before which no stop id can come.
        logprobs: so many of the likeliest tokens' log-probabilities at each position, beside the chosen one's; none
            when None. They are the target's own, before anything above.
        max_tokens: to generate at most.
        stop_token_ids: end the output; the one that did is its last token.
        seed: of the random keys; 0 when None.
        sampler: "rejection" accepts more drafts. With "coupled" the sample depends on the seed alone, whatever drafts,
            how many, and beside what other requests (in float32; lower precisions round differently in other batches).
            When None a request that names a seed is coupled.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    sampler: Literal["rejection", "coupled"] | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)

    @property
    def processed(self) -> bool:
        """Whether logits are changed before a token is chosen (`processors`)."""
        plain = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) == (1, 0, 0)
        return not plain or bool(self.logit_bias) or self.min_tokens > 0

    @property
    def coupled(self) -> bool:
        """Whether the sampler is the coupled one."""
        return self.sampler == "coupled" or (self.sampler is None and self.seed is not None)


class Sampling(NamedTuple):
    """The sampling parameters of each row; a batch may mix them."""

    temperature: Array  # [B] float32; 0 is greedy
    top_k: Array  # [B] int32; 0 is off
    top_p: Array  # [B] float32; 1 is off
    min_p: Array  # [B] float32; 0 is off


def settings(batch: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Sampling:
    """The same settings for every row; a temperature below GREEDY_BELOW is 0, and one beyond float32 its largest."""
    temperature = min(temperature, float(jnp.finfo(jnp.float32).max)) if temperature >= GREEDY_BELOW else 0.0
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
    temperature, min_p = (x[:, None, None] for x in (sampling.temperature, sampling.min_p))
    greedy = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.float32)
    scaled = logits.astype(jnp.float32) / jnp.where(temperature > 0, temperature, 1.0)

    def kept(scaled: Array, asked: Array, weights: Callable[[Array], Array], limit: Array) -> Array:
        """Without what others outweigh; searched for, which costs more than all the rest, only if a row asks."""
        limit = jnp.where(asked, limit, jnp.inf)[:, None, None]
        searched = jnp.any(asked & (sampling.temperature > 0))

        def drop(scaled: Array) -> Array:
            return jnp.where(mass_above_reaches(scaled, weights(scaled), limit), -jnp.inf, scaled)

        return jax.lax.cond(searched, drop, lambda scaled: scaled, scaled)

    # Top-k: drop what k others are above. Top-p: keep a token while the mass of the likelier ones is below p, which is
    # never 0: the likeliest always stays.
    scaled = kept(scaled, sampling.top_k > 0, jnp.ones_like, sampling.top_k.astype(jnp.float32))
    most = jnp.maximum(sampling.top_p, jnp.finfo(jnp.float32).tiny)
    scaled = kept(scaled, sampling.top_p < 1, partial(jax.nn.softmax, axis=-1), most)
    probs = jax.nn.softmax(scaled, axis=-1)
    probs = jnp.where(probs >= min_p * jnp.max(probs, axis=-1, keepdims=True), probs, 0.0)
    probs /= jnp.sum(probs, axis=-1, keepdims=True)
    return jnp.where(temperature > 0, probs, greedy)


def finite_logits(logits: Array, temperature: Array) -> Array:
    """Whether a token can be chosen by logits [B, T, V]; not if one is NaN or +inf, or all are -inf: [B, T] bool.

    The greatest tells, which argmax takes a NaN to be. Whoever verifies needs the same argmax, so that the program has
    one pass over the vocabulary for both.

    Args:
        temperature: [B], which the logits are divided by; 0 is greedy.
    """
    greatest = jnp.take_along_axis(logits, jnp.argmax(logits, axis=-1)[..., None], axis=-1)[..., 0]
    return jnp.isfinite(greatest / jnp.where(temperature > 0, temperature, 1.0)[:, None])


def mass_above_reaches(scores: Array, weights: Array, limit: Array) -> Array:
    """Whether the weights of all higher scores reach `limit` together, for each score.

    A search instead of a sort: the lowest score that stays is found digit by digit of its bits, from sums over the
    vocabulary. Where that is sharded, the sums alone cross between devices.

    Args:
        scores, weights: [B, T, V] float32.
        limit: [B, 1, 1], above 0.

    Returns:
        [B, T, V] bool; False for the highest score.
    """
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.uint32)  # one zero, not two
    order = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))  # of the integers as of the floats
    digits = jnp.arange(1 << DIGIT, dtype=jnp.uint32)

    def narrower(i: Array, found: Array) -> Array:
        """The next digit of the lowest score that stays: the least one of which the highest score would stay."""
        shift = (32 - DIGIT * (i + 1)).astype(jnp.uint32)
        highest = found | (digits << shift) | ((jnp.uint32(1) << shift) - 1)
        above = jnp.sum(jnp.where(order[..., None] > highest[..., None, :], weights[..., None], 0.0), axis=-2)
        return found | (jnp.argmax(above < limit, axis=-1, keepdims=True).astype(jnp.uint32) << shift)

    lowest = jax.lax.fori_loop(0, 32 // DIGIT, narrower, jnp.zeros_like(order[..., :1]))
    return order < lowest


def sample(keys: Array, weights: Array) -> Array:
    """One index for each key [...], with probability proportional to weights [..., V]. Returns [...] int32.

    It is argmax(log weights + g) with Gumbel noise g from the key alone, so that one key draws likely the same index
    from two distributions that are alike. That couples drafts and target (`verify.accept_coupled`).
    """

    def draw(key: Array, weights: Array) -> Array:
        return jax.random.categorical(key, jnp.log(weights)).astype(jnp.int32)

    for _ in keys.shape:
        draw = jax.vmap(draw)
    return draw(keys, weights)


def pick(x: Array, index: Array) -> Array:
    """x[..., index]: x [..., V], index [...] -> [...]. A masked sum: it needs no gather where V is sharded."""
    return jnp.sum(jnp.where(jnp.arange(x.shape[-1]) == index[..., None], x, 0), axis=-1)
