"""Rows of unequal numbers of tokens side by side: a pass over them costs what they have, not rows times the most.

Only attention looks at rows; whatever works on each token alone runs over the tokens of all rows in one line.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Ragged(NamedTuple):
    """Where the tokens of B rows of at most T stand in a line of Q."""

    row: Array  # [Q] int32, whose each one is; behind the last one it is repeated
    place: Array  # [Q] int32, its place in its row
    slot: Array  # [B, T] int32, where in the line it stands; behind a row's last token that one's

    def line(self, x: Array) -> Array:
        """[B, T, ...] -> [1, Q, ...]."""
        return x[self.row, self.place][None]

    def rows(self, x: Array) -> Array:
        """[1, Q, ...] -> [B, T, ...]; a row's last token is repeated."""
        return x[0][self.slot]


def ragged(counts: Array, most: int, size: int) -> Ragged:
    """Rows of so many tokens.

    Args:
        counts: [B] int32, each from 1 to `most`; together at most `size`.
        most: T.
        size: Q.
    """
    ends = jnp.cumsum(counts)
    begins = ends - counts
    line = jnp.arange(size, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, line, side="right"), counts.shape[0] - 1).astype(jnp.int32)
    place = jnp.minimum(line - begins[row], counts[row] - 1)
    slot = begins[:, None] + jnp.minimum(jnp.arange(most, dtype=jnp.int32), counts[:, None] - 1)
    return Ragged(row, place.astype(jnp.int32), slot.astype(jnp.int32))
