"""A KV cache in pages: rows share one pool, and a row holds as many pages as its text needs (vLLM's PagedAttention).

A page holds the keys and values of `page_size` positions of one row, or of several rows whose texts begin alike. Which
page holds which positions is the row's line of the page table. The host decides it (`runtime.pages`); programs read it.
Page 0 is never given to a row and never written: it stands where a row has no page, and is always zero.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from domino_jax.cache import KVCache
from domino_jax.sharding import constrain, shard_copy, zeros


class PagedKVCache(NamedTuple):
    """The counterpart of `cache.KVCache` in pages. The layout of a page is that of JAX's ragged paged attention."""

    pages: tuple[Array, ...]  # layers x [P, page_size, 2K, H]: keys and values of a head lie side by side
    table: Array  # [B, S / page_size] int32: the page of each page_size positions of a row, 0 where it has none

    @property
    def page_size(self) -> int:
        """Positions of a page."""
        return self.pages[0].shape[1]

    @property
    def capacity(self) -> int:
        """S, the number of positions that the table has place for."""
        return self.table.shape[1] * self.page_size

    @property
    def room(self) -> Array:
        """Positions of each row that have pages [B]."""
        return (self.table > 0).sum(axis=1, dtype=jnp.int32) * self.page_size

    def append(self, layer: int, k: Array, v: Array, start: Array) -> "PagedKVCache":
        """The cache with `k` and `v` [B, T, K, H] of one layer written from start [B] on.

        What has no page is dropped.
        """
        batch, tokens, heads, width = k.shape
        place = self._find(start[:, None] + jnp.arange(tokens, dtype=jnp.int32))
        new = jnp.stack([k, v], axis=3).reshape(batch, tokens, 2 * heads, width)
        written = _written(self.pages[layer], place, new)
        return self._replace(pages=(*self.pages[:layer], written, *self.pages[layer + 1 :]))

    def compact(self, start: Array, places: Array, span: int) -> "PagedKVCache":
        """What row b holds at start[b] + places[b, i] at start[b] + i; see `cache.KVCache.compact`."""
        ahead = jnp.arange(places.shape[1], dtype=jnp.int32)
        source = self._find(start[:, None] + jnp.clip(places, 0, span - 1))
        place = self._find(start[:, None] + ahead)
        moved = (_written(layer, place, layer.at[source].get(mode="fill", fill_value=0)) for layer in self.pages)
        return self._replace(pages=tuple(moved))

    def _find(self, positions: Array) -> tuple[Array, Array]:
        """The page of each position [B, T] and its place there; a page that does not exist where a row has none."""
        size, width = self.page_size, self.table.shape[1]
        page = jnp.take_along_axis(self.table, jnp.minimum(positions // size, width - 1), axis=1)
        there = (page > 0) & (positions < width * size)
        return jnp.where(there, page, self.pages[0].shape[0]), positions % size

    def layer(self, layer: int) -> tuple[Array, Array]:
        """Keys and values of one layer, gathered: [B, K, S, H] each. It copies them."""
        k, v = gather_pages(self.pages[layer], self.table)
        return constrain(k, "B K S H"), constrain(v, "B K S H")


AnyKVCache = KVCache | PagedKVCache


def _written(pages: Array, place: tuple[Array, Array], new: Array) -> Array:
    """One layer's pages with `new` [B, T, 2K, H] at these places; what has none is dropped."""
    return constrain(pages.at[place].set(new.astype(pages.dtype), mode="drop"), "- - K H")


def gather_pages(pages: Array, table: Array) -> tuple[Array, Array]:
    """Keys and values of rows, [B, K, S, H] each, from one layer's pages and the page table."""
    found = pages[table]  # [B, S / page_size, page_size, 2K, H]
    batch, count, size, heads, width = found.shape
    pairs = found.reshape(batch, count * size, heads // 2, 2, width).transpose(3, 0, 2, 1, 4)
    return pairs[0], pairs[1]


def is_paged(tree: Any) -> bool:
    """Whether a node of a state is a cache in pages."""
    return isinstance(tree, PagedKVCache)


def without_pages(tree: Any) -> Any:
    """A state whose caches in pages are only tables, for programs that leave the pages alone."""
    return jax.tree.map(lambda node: node._replace(pages=()) if is_paged(node) else node, tree, is_leaf=is_paged)


def with_pages(tree: Any, other: Any) -> Any:
    """A state with the pages of another one of the same drafter, whose rows and table are its own."""

    def put(node: Any, holder: Any) -> Any:
        return node._replace(pages=holder.pages) if is_paged(node) else node

    return jax.tree.map(put, tree, other, is_leaf=is_paged)


def with_table(tree: Any, table: np.ndarray) -> Any:
    """A state with another table [B, S / page_size], from the host."""

    def put(node: Any) -> Any:
        # A copy for each: states are donated, and no array may be given away twice.
        return node._replace(table=shard_copy(table.astype(np.int32), "B -")) if is_paged(node) else node

    return jax.tree.map(put, tree, is_leaf=is_paged)


@partial(jax.jit, donate_argnums=0)
def _zeroed(pages: Any, which: Array) -> Any:
    return jax.tree.map(lambda held: held.at[which].set(0, mode="drop"), pages)


def zero_pages(tree: Any, pages: Sequence[int]) -> Any:
    """A state whose pages of these numbers are zero; its old pages are donated."""
    if not pages:
        return tree
    held = [node.pages for node in jax.tree.leaves(tree, is_leaf=is_paged) if is_paged(node)]
    which = np.full(1 << (len(pages) - 1).bit_length(), held[0][0].shape[0], np.int32)  # few sizes, few programs
    which[: len(pages)] = pages
    new = iter(_zeroed(held, shard_copy(which, "-")))
    return jax.tree.map(lambda n: n._replace(pages=next(new)) if is_paged(n) else n, tree, is_leaf=is_paged)


def in_pages(tree: Any, count: int, page_size: int, dtype: Any) -> Any:
    """The shapes of a state (`jax.eval_shape`), with a new cache in pages in the place of each contiguous one.

    Args:
        count: pages; 0 for a table alone.
    """

    def put(node: Any) -> Any:
        if not isinstance(node, KVCache):
            return node
        batch, heads, capacity, width = node.k[0].shape
        shape = (count, page_size, 2 * heads, width)
        pages = tuple(zeros(shape, dtype, "- - K H") for _ in node.k) if count else ()
        return PagedKVCache(pages, zeros((batch, capacity // page_size), jnp.int32, "B -"))

    return jax.tree.map(put, tree, is_leaf=lambda node: isinstance(node, KVCache))
