"""Log-probabilities of a prompt's own tokens: the target runs it in chunks, in a cache of its own."""

from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from domino_jax import decode, target
from domino_jax.cache import length_bucket
from domino_jax.decode import DecodeConfig, Logprobs
from domino_jax.paged import AnyKVCache
from domino_jax.runtime.slots import TokenLogprobs
from domino_jax.sampling import pick
from domino_jax.sharding import fetch, row_shards, shard_copy
from domino_jax.weights import Params

UNEMBEDDED = 64  # positions whose logits exist at a time


def prompt_logprobs(
    params: Params, configs: DecodeConfig, prompt: Sequence[int], dtype: Any, most: int
) -> Generator[None, None, list[TokenLogprobs | None]]:
    """What the target says of each of a prompt's tokens after those before it; None of the first.

    Args:
        dtype: of the cache.
        most: likeliest tokens of each position.

    Yields:
        Between chunks, so that something else can run there.
    """
    lean, rows, capacity = configs.without_drafter, row_shards(), length_bucket(len(prompt))
    chunks = decode.prefill_chunks(len(prompt), 0, capacity)
    tokens = np.zeros((rows, chunks.stop + 1), np.int32)
    tokens[:, : len(prompt)] = prompt
    cache, found = decode.init_caches(lean, rows, capacity, dtype).target, []
    for offset in chunks:
        if offset:
            yield
        piece, following = (tokens[:, at : at + chunks.step] for at in (offset, offset + 1))
        cache, logprobs = _score(
            params, lean, most, cache, shard_copy(piece, "B T"), shard_copy(following, "B T"), np.int32(offset)
        )
        found.append(jax.tree.map(lambda x: x[0], fetch(logprobs)))
    told: list[TokenLogprobs | None] = [None]
    for piece in found:
        for chosen, ids, values in zip(*(x.tolist() for x in piece), strict=True):
            told.append(TokenLogprobs(chosen, list(zip(ids, values, strict=True))))
    return told[: len(prompt)]


@partial(jax.jit, static_argnums=(1, 2), donate_argnums=3)
def _score(
    params: Params, configs: DecodeConfig, most: int, cache: AnyKVCache, tokens: Array, following: Array, offset: Array
) -> tuple[AnyKVCache, Logprobs]:
    """Log-probabilities [B, T] of the tokens that follow `tokens`, which begin at a position, and of the likeliest."""
    rows, width = tokens.shape
    start = jnp.broadcast_to(offset, rows)
    hidden, _, written = target.forward(params.target, configs.target, tokens, start, cache, (), configs.attention)
    assert written is not None
    parts = max(1, width // UNEMBEDDED)

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(rows, parts, width // parts, *x.shape[2:]), 1, 0)

    def one(part: tuple[Array, Array]) -> Logprobs:
        logprobs = jax.nn.log_softmax(target.logits(params.target, configs.target, part[0]), axis=-1)
        values, ids = jax.lax.top_k(logprobs, min(most, configs.target.vocab_size))
        return Logprobs(pick(logprobs, part[1]), ids.astype(jnp.int32), values)

    found = jax.lax.map(one, (split(hidden), split(following)))
    return written, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, width, *x.shape[3:]), found)
