"""How heads choose: a token from its logits, and the few candidates that are worth scoring."""

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax.drafters.base import DraftTokens, View
from domino_jax.drafters.heads.base import Paths
from domino_jax.layers import unembed
from domino_jax.matrix import AnyMatrix, take
from domino_jax.sampling import Sampling, probabilities, sample
from domino_jax.sharding import MODEL, constrain, model_devices, spec

SPARE = 16  # buckets of the vocabulary for each candidate wanted: that many keep nearly all of the true best


def choose_token(
    logits: Array,
    keys: Array | None,
    place: int,
    sampling: Sampling,
    vocab: int,
    drawn: bool = True,
    names: Array | None = None,
) -> tuple[Array, Array | None]:
    """The proposal at a place of a block, from its logits.

    Args:
        logits: [B, V], or [B, C] of the tokens `names`.
        keys: [B, J] of the block; None where all is greedy.
        place: j, static, from 0 on.
        vocab: V.
        drawn: static; False takes the argmax whatever the sampling is.
        names: [B, C], the tokens that the logits are of; all in their order when None.

    Returns:
        tokens [B] int32; where keys are given, the distributions [B, V] that they were drawn from.
    """
    if keys is not None and drawn:
        distribution = _spread(probabilities(logits[:, None], sampling)[:, 0], names, vocab)
        return sample(keys[:, place], distribution), distribution  # of the whole vocabulary, as the target draws
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if names is not None:
        token = jnp.take_along_axis(names, token[:, None], axis=1)[:, 0]
    return token, None if keys is None else jax.nn.one_hot(token, vocab, dtype=jnp.float32)


def likeliest_logit(logits: Array) -> Array:
    """log(p / (1 - p)) of the likeliest token's probability p by logits [B, V], before temperature: [B] float32.

    Heads without one of their own have this confidence. It is the proposal's own probability where the proposal is the
    argmax. Of a drawn one it is not: what is decided by the token itself, such as whether it is verified, would
    favour some tokens, and the output would no longer be distributed as the target's.
    """
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    others = jnp.arange(logits.shape[-1]) != best
    weights = jnp.exp((logits - jnp.max(logits, axis=-1, keepdims=True)).astype(jnp.float32))
    rest = jnp.sum(jnp.where(others, weights, 0.0), axis=-1)
    return -jnp.log(jnp.maximum(rest, jnp.finfo(jnp.float32).tiny))


def stacked(chosen: list[tuple[Array, Array | None]]) -> DraftTokens:
    """What `choose_token` gave at the places of a block, as one."""
    probs = [distribution for _, distribution in chosen if distribution is not None]
    return DraftTokens(jnp.stack([token for token, _ in chosen], axis=1), jnp.stack(probs, axis=1) if probs else None)


def of_rows(names: Array | None, rows: int) -> Array | None:
    """Names of tokens [DV] as `heads.base.Paths.logits` gives them: [B, DV]."""
    return None if names is None else jnp.broadcast_to(names, (rows, *names.shape))


def vocab_size_of(base: Array, view: View) -> int:
    """V, of which base logits [B, J, V] are, or [B, J, DV] some."""
    return base.shape[2] if view.names is None else view.target.embed.shape[0]


def chosen_along(paths: Paths, base: Array, view: View, keys: Array | None, drawn_from: int = 0) -> DraftTokens:
    """The proposals of a block from left to right, each from the logits that follow those before it.

    Their confidence is `likeliest_logit`; where nothing reads it the compiler leaves it out.

    Args:
        paths: of one path a row.
        base: [B, J, V], of which the shape alone is read.
        view: what a drafter may look at.
        keys: see `choose_token`.
        drawn_from: the first place after the first whose proposal is drawn; those between are the argmax.
    """
    made, sure, state = [], [], paths.start()
    vocab = vocab_size_of(base, view)
    # Unrolled: J is small, and XLA then overlaps and fuses the steps' tiny kernels.
    for j in range(base.shape[1]):
        if j > 0:
            state = paths.advance(state, made[-1][0][:, None], j - 1)
        logits, names = paths.logits(state, j)
        drawn = j == 0 or j >= drawn_from
        made.append(choose_token(logits[:, 0], keys, j, view.sampling, vocab, drawn, names))
        sure.append(likeliest_logit(logits[:, 0]))
    return stacked(made)._replace(confidence=jnp.stack(sure, axis=1))


def largest(x: Array, count: int, divided: bool = False) -> tuple[Array, Array]:
    """The `count` largest of x [B, L, V], and their places, each [B, L, count]: largest first, of equals the first.

    Args:
        divided: devices may share the last axis. They send each other their own best alone.
    """

    def best(x: Array) -> tuple[Array, Array]:
        most = min(count, x.shape[-1])
        values, places = jax.lax.top_k(x.reshape(-1, x.shape[-1]), most)
        return values.reshape(*x.shape[:-1], most), places.reshape(*x.shape[:-1], most)

    def best_of_part(part: Array) -> tuple[Array, Array]:
        values, places = best(part)
        return values, places + jax.lax.axis_index(MODEL) * part.shape[-1]

    if jax.sharding.get_abstract_mesh().empty:
        return best(x)
    places = jax.lax.broadcasted_iota(jnp.int32, x.shape, 2)
    if divided:
        letters = spec("B L V")
        x, places = jax.shard_map(best_of_part, in_specs=letters, out_specs=(letters, letters), check_vma=False)(x)
        x, places = (constrain(found, "B L -") for found in (x, places))
    # Sorted, since jax.lax.top_k would gather the rows of the other devices' batches first.
    lowest, places = jax.lax.sort((-x, places), num_keys=1, is_stable=True)
    return -lowest[..., :count], places[..., :count]


def likeliest(logits: Array, count: int) -> tuple[Array, Array]:
    """The `count` highest of logits [B, J, V], or nearly: values and ids, each [B, J, count], highest first.

    A large vocabulary is first divided into many more buckets than are wanted, and the best of each bucket kept (the
    partial reduction of Chern et al. 2022, "TPU-KNN"): sorting all of it would cost more than the head saves. The
    highest of all is always there, and a bucket seldom holds two of the others. Devices that share the vocabulary
    send each other the buckets' best alone.
    """
    batch, rows, vocab = logits.shape
    shards = model_devices()
    part = vocab // shards
    depth = max(1, vocab // (SPARE * count))  # tokens of a bucket
    width = -(-part // depth)  # buckets of a device
    cells = logits.reshape(batch, rows, shards, part)
    cells = jnp.pad(cells, ((0, 0), (0, 0), (0, 0), (0, depth * width - part)), constant_values=-jnp.inf)
    cells = cells.reshape(batch, rows, shards, depth, width)
    places = jnp.argmax(cells, axis=3).astype(jnp.int32) * width + jnp.arange(width, dtype=jnp.int32)
    ids = jnp.arange(shards, dtype=jnp.int32)[:, None] * part + places
    best = jnp.max(cells, axis=3)
    best, ids = (constrain(x.reshape(batch, rows, -1), "B J -") for x in (best, ids))
    # Sorted, since jax.lax.top_k would gather the rows of the other devices' batches first.
    lowest, ids = jax.lax.sort((-best, ids), num_keys=1)
    return -lowest[..., :count], ids[..., :count]


class LowRankLogits:
    """Base logits of a block's places, and what a low-rank correction makes of them: of all tokens, or of a few."""

    def __init__(self, base: Array, output: AnyMatrix, candidates: int | None, names: Array | None = None):
        """Args:
        base: [B, J, V], or [B, J, DV] of the tokens `names`.
        output: [V, R] or [DV, R], a matrix that takes a rank vector to logits.
        candidates: C, see `heads.base.Head.propose`.
        names: [DV] int32.
        """
        self._base, self._output, self._few = base, output, None
        self._names = of_rows(names, base.shape[0])
        if candidates is not None and candidates < base.shape[-1]:
            best, ids = likeliest(base, candidates)  # [B, J, C]
            self._few = best, ids if names is None else names[ids], take(output, ids)  # the last [B, J, C, R]

    def plain(self, place: int) -> tuple[Array, Array | None]:
        """The base logits at a place alone: see `heads.base.Paths.logits`."""
        return self._base[:, place, None], self._names

    def corrected(self, place: int, rank: Array) -> tuple[Array, Array | None]:
        """With rank vectors [B, L, R] of L paths: see `heads.base.Paths.logits`."""
        if self._few is None:
            return constrain(self._base[:, place, None] + unembed(rank, self._output), "B L V"), self._names
        best, names, rows = (x[:, place] for x in self._few)
        return corrected_few(best, rank, rows), names


def corrected_few(best: Array, rank: Array, rows: Array) -> Array:
    """Base logits [B, C] of a few tokens after a low-rank correction: [B, L, C].

    Args:
        rank: [B, L, R] of L paths.
        rows: [B, C, R] of the matrix that takes rank vectors to logits.
    """
    return best[:, None] + jnp.einsum("BLR,BCR->BLC", rank, rows, preferred_element_type=jnp.float32)


def _spread(distribution: Array, names: Array | None, vocab: int) -> Array:
    """A distribution over the tokens `names` [B, C], or over all, as one over the vocabulary: [B, V]."""
    if names is None:
        return distribution
    if model_devices() == 1:
        rows = jnp.arange(names.shape[0])[:, None]
        return jnp.zeros((names.shape[0], vocab), distribution.dtype).at[rows, names].add(distribution)

    # Each device its own part: a scatter into a sharded vocabulary would gather it.
    def part(distribution: Array, names: Array) -> Array:
        size = vocab // model_devices()
        places = names - jax.lax.axis_index(MODEL) * size
        places = jnp.where((places >= 0) & (places < size), places, size)  # the others are dropped
        rows = jnp.arange(names.shape[0])[:, None]
        return jnp.zeros((names.shape[0], size), distribution.dtype).at[rows, places].add(distribution, mode="drop")

    given = constrain(distribution, "B -"), constrain(names, "B -")
    letters = spec("B -"), spec("B V")
    return jax.shard_map(part, in_specs=(letters[0],) * 2, out_specs=letters[1], check_vma=False)(*given)
