"""Trees of proposals over a block drafter: the likeliest paths, found best first (docs/algorithm.md, section 10).

All of it is in the program. No branch depends on the data, and the shapes are those of N nodes whatever the tree is.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax.drafters.base import DraftTokens, View
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.heads import head_of
from domino_jax.drafters.heads.base import Paths
from domino_jax.drafters.heads.choosing import largest, vocab_size_of
from domino_jax.errors import DominoError
from domino_jax.paged import AnyKVCache
from domino_jax.sampling import Sampling, probabilities
from domino_jax.weights import Draft


class _Blocks:
    """What the other base of a drafter of trees has: the drafter of chains whose blocks trees are grown from."""

    config: Any  # with `num_proposals` and `head`
    candidates: int | None


@dataclass(frozen=True)
class Trees(_Blocks):
    """What drafters of trees have in common, whatever drafts their blocks.

    Args:
        nodes: N, besides the anchor.
        lanes: W, paths that are followed to the next depth, the likeliest ones. The tree is the best one there is when
            None, which is N of them.
        correction: "depth" has the head correct along the likeliest path alone, and all nodes of a depth share that.
        coupled: a sampled row's nodes are those that the target will draw the likeliest, given the noise that it draws
            with; False has them be the likeliest ones whatever the noise, of which fewer are accepted.
    """

    nodes: int = 16
    lanes: int | None = None
    correction: Literal["path", "depth"] = "path"
    coupled: bool = True

    def check_tree(self) -> None:
        """Raises: DominoError: a number is below 1, or there is no head to correct."""
        for what, given in (("nodes", self.nodes), ("lanes", self.lanes)):
            if given is not None and given < 1:
                raise DominoError(f"a tree has at least 1 of its {what}, found {given}.")
        if self.correction == "depth" and not self.config.head:
            raise DominoError("a tree correction needs a drafter with a causal head, and this one has none.")

    @property
    def most(self) -> int:
        return self.nodes

    @property
    def depth(self) -> int:
        """See `drafters.base.Branching`."""
        return min(self.nodes, self.config.num_proposals)

    @property
    def longest_chain(self) -> int:
        """See `drafters.base.Branching`."""
        return min(self.nodes - 1, self.config.num_proposals)

    def branches(self, proposals: int) -> bool:
        """See `drafters.base.Branching`."""
        return proposals > self.longest_chain

    def grow(self, weights: Any, z: Array, base: Array, view: View, nodes: int, keys: Array | None) -> DraftTokens:
        """The tree of a block, from the states of its P first proposals [B, P, D] and their base logits [B, P, V].

        Its nodes are chosen, not drawn: the output is exact whatever they are.

        Args:
            weights: the drafter's.
        """
        with jax.named_scope("head"):
            paths: Paths = head_of(self.config).paths(weights.head, z, base, view, self.candidates)
            depth = z.shape[1]
            if keys is not None and self.coupled:
                paths = PerturbedPaths(paths, keys, view.sampling, vocab_size_of(base, view))
            elif keys is not None:
                paths = ScaledPaths(paths, view.sampling.temperature)
            if self.correction == "depth":
                paths = SharedPaths(paths, depth)
            return best_first(paths, nodes, depth, self.lanes or nodes)


@dataclass(frozen=True)
class TreeDrafter(Trees, BlockDrafter):
    """A block drafter that proposes a tree: the N likeliest nodes, each with the head's logits along its own path.

    Args:
        candidates: C, tokens of (nearly) the highest base logits of each depth, of which alone nodes are made where the
            head corrects; the vocabulary when None.
        nodes, lanes, correction, coupled: see `Trees`.

    Raises:
        DominoError: a number is below 1, or there is no head to correct.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_tree()

    @property
    def name(self) -> str:
        return f"{super().name}, in trees of {self.nodes}"

    def propose(
        self, weights: Draft, state: AnyKVCache, view: View, proposals: int, keys: Array | None
    ) -> tuple[DraftTokens, AnyKVCache, AnyKVCache]:
        """See `drafters.base.Drafter`. A few proposals are a chain."""
        if not self.branches(proposals):
            return super().propose(weights, state, view, proposals, keys)
        z, base, state = self.draft_block(weights, state, view, min(proposals, self.depth))
        return self.grow(weights, z, base, self.named(weights, view), proposals, keys), state, view.cache


class ScaledPaths:
    """Another head's paths with each row's logits divided by its temperature, if it has one: a `heads.base.Paths`."""

    def __init__(self, paths: Paths, temperature: Array):
        self._paths = paths
        self._temperature = jnp.where(temperature > 0, temperature, 1.0)[:, None, None]
        self.start, self.advance = paths.start, paths.advance

    def logits(self, state: Any, place: int) -> tuple[Array, Array | None]:
        logits, names = self._paths.logits(state, place)
        return logits / self._temperature, names


class PerturbedPaths:
    """Another head's paths with the noise added with which the target will draw: a `heads.base.Paths`.

    The target's token at a position is the argmax of its log-probabilities and of Gumbel noise that the position's key
    makes (`sampling.sample`). Where a head's distribution is the target's, its best node is that token.

    Args:
        keys: [B, P], of the positions.
        sampling: of each row. A greedy row's logits stay as they are.
        vocab: V.
    """

    def __init__(self, paths: Paths, keys: Array, sampling: Sampling, vocab: int):
        self._paths, self._keys, self._sampling, self._vocab = paths, keys, sampling, vocab
        self.start, self.advance = paths.start, paths.advance

    def logits(self, state: Any, place: int) -> tuple[Array, Array | None]:
        logits, names = self._paths.logits(state, place)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (self._vocab,)))(self._keys[:, place])
        if names is not None:
            noise = jnp.take_along_axis(noise, names, axis=1)
        perturbed = jnp.log(probabilities(logits, self._sampling)) + noise[:, None]
        return jnp.where(self._sampling.temperature[:, None, None] > 0, perturbed, logits), names


class SharedPaths:
    """Paths that have at each depth what another head says along its own likeliest path: a `heads.base.Paths`."""

    def __init__(self, paths: Paths, depth: int):
        self._found = []
        state = paths.start()
        for place in range(depth):
            logits, names = paths.logits(state, place)
            self._found.append((logits, names))
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            if names is not None:
                token = jnp.take_along_axis(names, token, axis=1)
            if place + 1 < depth:
                state = paths.advance(state, token, place)

    def start(self) -> tuple[()]:
        return ()

    def logits(self, state: tuple[()], place: int) -> tuple[Array, Array | None]:
        return self._found[place]

    def advance(self, state: tuple[()], tokens: Array, place: int) -> tuple[()]:
        return state


class _Scored(NamedTuple):
    """Nodes that may be of the tree, each with the log-probability of its path."""

    scores: Array  # [B, E] float32; -inf for none
    tokens: Array  # [B, E] int32
    parents: Array  # [B, E] int32, among all that are scored, from 1 on; 0 is the anchor


def best_first(paths: Paths, nodes: int, depth: int, lanes: int) -> DraftTokens:
    """The tree of the likeliest paths, of which no more than `lanes` are followed from one depth to the next.

    A node's score is the sum of the log-probabilities along its path, so it is never above its parent's: the best N of
    all that are scored are a tree. Of those at depth d at most N - d + 1 can be among them, with d - 1 ancestors, and
    N - d where they have a child: no more are kept, and no more are followed, which loses nothing.

    Args:
        nodes: N, static.
        depth: P, static, of the longest path.
        lanes: W, static.
    """
    state, scores = paths.start(), jnp.zeros((1, 1), jnp.float32)
    here = jnp.zeros((1, 1), jnp.int32)  # of the paths, what `parents` call them
    found, count = [], 0
    for place in range(depth):
        logits, names = paths.logits(state, place)
        best, tokens = largest(logits, min(nodes - place, logits.shape[-1]), divided=names is None)  # [B, L or 1, k]
        best -= jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        if names is not None:
            tokens = jnp.take_along_axis(names[:, None], tokens, axis=2)
        total = scores[:, :, None] + best
        total = jnp.where(jnp.isnan(total), -jnp.inf, total)
        batch, followed, children = total.shape
        kept, order = largest(total.reshape(batch, 1, -1), min(nodes - place, followed * children))
        kept, order = kept[:, 0], order[:, 0]
        tokens = jnp.broadcast_to(tokens, total.shape).reshape(batch, -1)
        parent = order // children
        new = _Scored(kept, _at(tokens, order), _at(jnp.broadcast_to(here, (batch, followed)), parent))
        found.append(new)
        here = count + 1 + jnp.arange(kept.shape[1], dtype=jnp.int32)[None]
        count += kept.shape[1]
        following = min(lanes, nodes - place - 1, kept.shape[1])
        if place + 1 == depth or not following:
            break
        scores, here, parent = kept[:, :following], here[:, :following], parent[:, :following]
        state = jax.tree.map(lambda x, parent=parent: _at(x, parent), state)
        state = paths.advance(state, new.tokens[:, :following], place)
    return _chosen(_Scored(*(jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True))), nodes)


def _chosen(scored: _Scored, nodes: int) -> DraftTokens:
    """The best N, in the order of their scores, and of those that are equal in the order of depth: parents first."""
    missing = max(0, nodes - scored.scores.shape[1])
    scores = jnp.pad(scored.scores, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    best, order = (x[:, 0] for x in largest(scores[:, None], nodes))
    there = jnp.isfinite(best)
    padded = jnp.pad(scored.tokens, ((0, 0), (0, missing))), jnp.pad(scored.parents, ((0, 0), (0, missing)))
    tokens, parents = (_at(x, order) for x in padded)
    # Where each parent stands among the chosen; the anchor is none of them.
    same = parents[:, :, None] == order[:, None] + 1
    places = jnp.sum(jnp.where(same, 1 + jnp.arange(nodes, dtype=jnp.int32), 0), axis=2)
    return DraftTokens(jnp.where(there, tokens, -1), None, jnp.where(there, places, 0))


def _at(x: Array, index: Array) -> Array:
    """x [B, E, ...] at index [B, L]: [B, L, ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
