"""Numbers that are not finite: where they begin in a target, and whether a drafter has them.

Decoding itself only looks at the greatest logit (`sampling.finite_logits`). What is here is run once that was not
finite, or drafts look like it: it looks at everything between, which no step could afford.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from domino_jax import cache as kv
from domino_jax import decode, layers, target
from domino_jax.config import TargetConfig
from domino_jax.decode import DecodeConfig, DecodeState, Emitted
from domino_jax.paged import AnyKVCache
from domino_jax.sampling import settings
from domino_jax.sharding import fetch, row_shards, shard_copy
from domino_jax.weights import Params, Target, flatten, lm_head

FEWEST_CYCLES = 8  # to judge drafts by: as many as a dispatch has; the last ones of good drafts may be alike for a few
EMBEDDING, FINAL_NORM, LOGITS = "the embedding", "the final norm", "the logits"


class NotFinite(NamedTuple):
    """Where numbers of a target stop being finite."""

    place: str | None  # "layer 3", counted from 0; None where it is not found
    position: int | None  # of the first token that has them there, from 0; None where the text alone has none
    weight: str | None  # the path of a weight of that place that holds such numbers itself


def first_not_finite(params: Target, config: TargetConfig, ids: Sequence[int], dtype: jnp.dtype) -> NotFinite:
    """The first place of the target, in the order of computation, whose output for these ids is not finite.

    Args:
        dtype: of the cache.
    """
    step, parts = decode.SMALLEST_CHUNK, row_shards()
    length = -(-len(ids) // step) * step
    cache = kv.init_cache(config, parts, kv.length_bucket(length), dtype)
    found = []
    tokens = np.full((parts, length), ids[-1], np.int32)  # padding of another token could have what the text has not
    tokens[:, : len(ids)] = ids
    for start in range(0, length, step):
        piece = shard_copy(tokens[:, start : start + step], "B T")
        flags, cache = _finite_outputs(params, config, piece, shard_copy(np.full(parts, start, np.int32), "B"), cache)
        found.append(fetch(flags)[:, 0])
    bad = ~np.concatenate(found, axis=1)[:, : len(ids)]
    places = [EMBEDDING, *(f"layer {i}" for i in range(config.num_hidden_layers)), FINAL_NORM, LOGITS]
    for place, row in zip(places, bad, strict=True):
        if row.any():
            return NotFinite(place, int(row.argmax()), _weight(params, place))
    # Padding and rejected drafts are run beside the text, and attention multiplies what they hold by zero.
    for place in places:
        if weight := _weight(params, place):
            return NotFinite(place, None, weight)
    return NotFinite(None, None, None)


@partial(jax.jit, static_argnums=1, donate_argnums=4)
def _finite_outputs(
    params: Target, config: TargetConfig, tokens: Array, start: Array, cache: AnyKVCache
) -> tuple[Array, AnyKVCache]:
    """Whether what each place gives is finite: [places, B, T] bool; and the cache."""
    last = config.num_hidden_layers - 1
    # The last layer's output can be had only through the final norm. With weights of one it keeps what is not finite.
    plain = jax.tree.map(lambda leaf: leaf, params)
    plain.norm = jnp.ones_like(params.norm)
    normed, features, written = target.forward(plain, config, tokens, start, cache, tuple(range(last)))
    assert written is not None
    embedded = layers.embed(params.embed, tokens)
    between = jnp.split(features, last, axis=-1) if last else []
    hidden = normed * params.norm
    logits = target.logits(params, config, hidden)[..., : config.vocab_size]
    outputs = (embedded, *between, normed, hidden, logits)
    return jnp.stack([jnp.isfinite(x).all(axis=-1) for x in outputs]), written


def _weight(params: Target, place: str) -> str | None:
    """The path of a weight of a place that is not finite throughout."""
    if place == LOGITS:
        return None if _is_finite(lm_head(params)) else "embed" if params.lm_head is None else "lm_head"
    path = {EMBEDDING: "embed", FINAL_NORM: "norm"}.get(place, place.replace("layer ", "layers."))
    leaves = {name: leaf for name, leaf in flatten(params).items() if f"{name}.".startswith(f"{path}.")}
    return next((name for name, leaf in leaves.items() if not _is_finite(leaf)), None)


def _is_finite(weight: Any) -> bool:
    """Whether all values of a weight, of whatever form, are finite; integers are."""
    return all(
        bool(fetch(jnp.isfinite(leaf).all()))
        for leaf in jax.tree.leaves(weight)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    )


def drafts_look_broken(emitted: Emitted) -> bool:
    """Whether a dispatch's drafts look as those of NaN do: the last of each cycle is the same token, and never stood.

    Args:
        emitted: on the host.
    """
    ran = emitted.counts[: int(emitted.cycles)] > 0
    last = emitted.drafts[: len(ran), :, -1:][ran]
    stood = emitted.accepted[: len(ran)][ran] == emitted.drafts.shape[-1]
    return len(last) >= FEWEST_CYCLES and bool((last == last[0]).all()) and not stood.any()


def drafter_is_finite(params: Params, configs: DecodeConfig, state: DecodeState) -> bool:
    """Whether the distributions that the drafter would draw from now are finite."""
    return bool(fetch(_finite_drafts(params, configs, state)))


@partial(jax.jit, static_argnums=1)
def _finite_drafts(params: Params, configs: DecodeConfig, state: DecodeState) -> Array:
    # A greedy row's distributions are one-hot, whatever the logits are.
    hot = settings(state.token.shape[0], temperature=1.0)
    drawn = state._replace(rows=state.rows._replace(sampling=hot))
    draft, _ = decode.propose(params, configs, drawn, decode.position_keys(state, configs.depth)[:, :-1, 0])
    if draft.parents is not None:  # no node has a score that is not finite
        return (draft.tokens >= 0).any(axis=1).all()
    assert draft.probs is not None
    return jnp.isfinite(draft.probs).all()
