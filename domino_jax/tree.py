"""Trees of drafts in one pass of the target: who sees whom, and the path that the target takes (algorithm, section 10).

A tree is the anchor, which is node 0, and N nodes after it, parents before children. Its contents vary from cycle to
cycle, its shapes never.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Tree(NamedTuple):
    """The form of a tree; T = N + 1 nodes, the anchor's among them."""

    parents: Array  # [B, T] int32; the anchor is its own
    sees: Array  # [B, T, T] bool: [b, i, j] says that j is i itself, or before it on its path
    depth: Array  # [B, T] int32, 0 for the anchor


class TreePath(NamedTuple):
    """The way from the anchor that the target's own choices take; P is the greatest depth of a node."""

    nodes: Array  # [B, P + 1] int32, the node at each depth; beyond the path's end anything
    accepted: Array  # [B] int32, nodes on the path besides the anchor
    stands: Array  # [B, T] bool, whether a node is on it


def tree_of(parents: Array, depth: int) -> Tree:
    """The tree of N nodes.

    Args:
        parents: [B, N] int32, see `DraftTokens`.
        depth: P, static, which no node exceeds.
    """
    parents = jnp.pad(parents, ((0, 0), (1, 0)))
    places = jnp.arange(parents.shape[1], dtype=jnp.int32)
    sees = (parents[:, :, None] == places) | (places[:, None] == places)
    for _ in range((depth - 1).bit_length()):  # each doubles the steps that a path may have
        sees = jnp.einsum("bij,bjk->bik", sees.astype(jnp.float32), sees.astype(jnp.float32)) > 0
    return Tree(parents, sees, jnp.sum(sees, axis=2, dtype=jnp.int32) - 1)


def walk(tree: Tree, tokens: Array, choices: Array, depth: int) -> TreePath:
    """Follow the target: from each node to the child that carries its choice, as long as there is one.

    Args:
        tokens: [B, T] int32, the nodes'; siblings differ.
        choices: [B, T] int32, the target's own token after each node.
        depth: P, static.
    """
    right = tokens == jnp.take_along_axis(choices, tree.parents, axis=1)
    right = right.at[:, 0].set(True)
    stands = (right[:, None] | ~tree.sees).all(axis=2)
    accepted = jnp.sum(stands, axis=1, dtype=jnp.int32) - 1
    levels, places = jnp.arange(depth + 1, dtype=jnp.int32), jnp.arange(tokens.shape[1], dtype=jnp.int32)
    here = stands[:, None] & (tree.depth[:, None] == levels[:, None])  # [B, P + 1, T], one node in each of the path's
    nodes = jnp.sum(jnp.where(here, places, 0), axis=2)
    return TreePath(jnp.where(levels <= accepted[:, None], nodes, levels), accepted, stands)


def along(x: Array, nodes: Array) -> Array:
    """What x [B, T, ...] has for nodes [B, P + 1]: [B, P + 1, ...]."""
    return jnp.take_along_axis(x, nodes.reshape(*nodes.shape, *[1] * (x.ndim - 2)), axis=1)
