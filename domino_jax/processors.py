"""What changes logits before a token is chosen: penalties, biases, a minimum length, and which tokens are allowed.

The order and the meaning are vLLM's. All is exact under drafts: what a position is penalised for depends on the drafts
before it in its own block too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from domino_jax.sampling import SamplingParams
from domino_jax.sharding import constrain, shard_copy
from domino_jax.tree import Tree

MOST_BIASES = 256  # of a row
WORD = 32  # tokens of an entry of `allowed`


class Processors(NamedTuple):
    """Settings of each row, and the tokens that they go by."""

    repetition: Array  # [B] float32, 1 is off: of tokens of prompt and output, logits above 0 are divided by it
    presence: Array  # [B] float32, 0 is off: taken from the logits of tokens of the output
    frequency: Array  # [B] float32, 0 is off: likewise, once for each time that they are there
    min_tokens: Array  # [B] int32: before so many tokens no stop id can come, unless nothing else is allowed
    bias_ids: Array  # [B, MOST_BIASES] int32; V or above is none
    biases: Array  # [B, MOST_BIASES] float32, added to these tokens' logits
    allowed: Array  # [B, W] int32, a bit for each token, of the next position alone; -1 where all are
    prompt: Array  # [B, V] bool, tokens of the prompt
    output: Array  # [B, V] int32, how often each token is in the output


def new_processors(
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    vocab_size: int,
    allowed: Sequence[np.ndarray | None] = (),
    outputs: Sequence[Sequence[int]] = (),
) -> Processors:
    """What rows ask for, from the host.

    Args:
        vocab_size: V, of the logits, padding included.
        allowed: see `allowed_tokens`.
        outputs: tokens that have been generated for each row, or for the first ones.
    """
    batch = len(params)
    ids = np.full((batch, MOST_BIASES), vocab_size, np.int32)
    biases = np.zeros((batch, MOST_BIASES), np.float32)
    seen, counts = np.zeros((batch, vocab_size), bool), np.zeros((batch, vocab_size), np.int32)
    for row, (p, prompt) in enumerate(zip(params, prompts, strict=True)):
        for place, (token, bias) in enumerate(p.logit_bias):
            ids[row, place], biases[row, place] = token, bias
        if p.repetition_penalty != 1:
            seen[row, np.asarray(prompt)] = True
    for row, tokens in zip(counts, outputs, strict=False):
        np.add.at(row, np.asarray(tokens, np.int64), 1)

    def numbers(name: str, dtype: type) -> Array:
        return shard_copy(np.array([getattr(p, name) for p in params], dtype), "B")

    return Processors(
        numbers("repetition_penalty", np.float32),
        numbers("presence_penalty", np.float32),
        numbers("frequency_penalty", np.float32),
        numbers("min_tokens", np.int32),
        shard_copy(ids, "B -"),
        shard_copy(biases, "B -"),
        allowed_tokens(allowed, batch, vocab_size),
        shard_copy(seen, "B V"),
        shard_copy(counts, "B V"),
    )


def allowed_tokens(allowed: Sequence[np.ndarray | None], batch: int, vocab_size: int) -> Array:
    """The field `allowed` of rows.

    Args:
        allowed: of each row, or of the first ones: a bit for each token, [W] int32 or shorter; None where all are.
    """
    words = np.full((batch, -(-vocab_size // WORD)), -1, np.int32)
    for row, mask in zip(words, allowed, strict=False):
        if mask is not None:
            row[:] = 0
            row[: len(mask)] = mask[: len(row)]
    return shard_copy(words, "B -")


def process_logits(
    logits: Array, drafts: Array, emitted: Array, stop: Array, given: Processors, tree: Tree | None = None
) -> Array:
    """The logits that tokens are chosen by.

    Args:
        logits: [B, J + 1, V] after the last token and after each draft.
        drafts: [B, J].
        emitted: [B], tokens generated so far.
        stop: [B, E] ids that end the rows.
        tree: of the last token and the drafts; they follow each other when None.
    """
    penalised = (given.repetition != 1) | (given.presence != 0) | (given.frequency != 0)
    vocab = logits.shape[-1]

    def penalise(logits: Array) -> Array:
        drafted = jax.nn.one_hot(drafts, vocab, dtype=jnp.int32)
        if tree is None:
            counts = jnp.pad(jnp.cumsum(drafted, axis=1), ((0, 0), (1, 0), (0, 0)))
        else:  # of those on the way to each node
            counts = jnp.einsum("BTJ,BJV->BTV", tree.sees[:, :, 1:].astype(jnp.int32), drafted)
        counts = given.output[:, None] + counts
        there = counts > 0
        repetition, presence, frequency = (
            x[:, None, None] for x in (given.repetition, given.presence, given.frequency)
        )
        scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits = jnp.where(there | given.prompt[:, None], scaled, logits)
        return logits - presence * there.astype(logits.dtype) - frequency * counts.astype(logits.dtype)

    logits = jax.lax.cond(penalised.any(), penalise, lambda logits: logits, logits)

    def add(logits: Array) -> Array:
        added = jnp.zeros((logits.shape[0], vocab), logits.dtype)
        added = added.at[jnp.arange(logits.shape[0])[:, None], given.bias_ids].add(given.biases, mode="drop")
        return logits + added[:, None]

    logits = jax.lax.cond((given.biases != 0).any(), add, lambda logits: logits, logits)
    place = emitted[:, None] + (jnp.arange(logits.shape[1]) if tree is None else tree.depth)
    early = place < given.min_tokens[:, None]  # [B, J + 1]

    def mask() -> Array:
        bits = given.allowed[..., None] >> jnp.arange(WORD, dtype=jnp.int32) & 1
        return bits.reshape(bits.shape[0], -1)[:, :vocab] == 1  # [B, V]

    def hold(logits: Array) -> Array:
        ends = (jnp.arange(vocab) == stop[..., None]).any(axis=1)  # [B, V]
        ends &= (mask() & ~ends).any(axis=1, keepdims=True)  # a guide may allow nothing else
        return jnp.where(early[..., None] & ends[:, None], -jnp.inf, logits)

    logits = jax.lax.cond(early.any(), hold, lambda logits: logits, logits)

    def restrict(logits: Array) -> Array:
        return jnp.where(mask()[:, None], logits, -jnp.inf)

    logits = jax.lax.cond((given.allowed != -1).any(), restrict, lambda logits: logits, logits)
    return constrain(logits, "B T V")


def count_tokens(given: Processors, sequence: Array, taken: Array) -> Processors:
    """Note the first `taken` [B] of sequence [B, T] as output."""

    def add(output: Array) -> Array:
        here = jnp.arange(sequence.shape[1]) < taken[:, None]
        places = jnp.where(here, sequence, output.shape[1])
        return output.at[jnp.arange(output.shape[0])[:, None], places].add(1, mode="drop")

    counted = (given.repetition != 1) | (given.presence != 0) | (given.frequency != 0)
    output = jax.lax.cond(counted.any(), add, lambda output: output, given.output)
    return given._replace(output=constrain(output, "B V"))
