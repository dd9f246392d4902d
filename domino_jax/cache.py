"""KV caches whose rows have lengths of their own.

A cache is exactly one length bucket long: programs see what they need and no more, and `resize`
moves a buffer to another bucket. Which positions count is arithmetic on the lengths that the decode state
holds: a rejected draft stays in place, unseen, until its position is written again.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax.config import DecoderConfig
from domino_jax.sharding import constrain, spec, zeros

SMALLEST_BUCKET = 128
POSITIONS = 2  # the axis S of a buffer
FEW_ROWS = 16  # written one by one on a TPU; of more in a loop, since programs would grow long


class KVCache(NamedTuple):
    """One buffer a layer, so that an unrolled program updates each in place."""

    k: tuple[Array, ...]  # layers x [B, K, S, H]
    v: tuple[Array, ...]  # layers x [B, K, S, H]

    @property
    def capacity(self) -> int:
        """S, the number of positions a row can hold."""
        return self.k[0].shape[POSITIONS]

    @property
    def room(self) -> int:
        """Positions that each row may use: all."""
        return self.capacity

    def append(self, layer: int, k: Array, v: Array, start: Array) -> "KVCache":
        """The cache with `k` and `v` [B, T, K, H] of one layer written from start [B] on."""

        def put(buffers: tuple[Array, ...], new: Array) -> tuple[Array, ...]:
            written = constrain(write(buffers[layer], new, start), "B K S H")
            return (*buffers[:layer], written, *buffers[layer + 1 :])

        return KVCache(put(self.k, k), put(self.v, v))

    def compact(self, start: Array, places: Array, span: int) -> "KVCache":
        """What row b holds at start[b] + places[b, i] at start[b] + i.

        Only the positions that may be moved are read, and they are written whether or not they move: a program whose
        cache passes through a branch, or is gathered from whole, copies it.

        Args:
            start: [B] int32; each row has room for `span` positions from there.
            places: [B, T] int32, below `span`; others count as the nearest.
            span: static.
        """

        def moved(buffer: Array) -> Array:
            window = read(buffer, start, span).swapaxes(1, 2)  # [B, span, K, H]
            taken = jnp.take_along_axis(window, places[:, :, None, None], axis=1, mode="clip")
            return constrain(write(buffer, taken, start), "B K S H")

        return jax.tree.map(moved, self)

    def layer(self, layer: int) -> tuple[Array, Array]:
        """Keys and values of one layer, [B, K, S, H] each."""
        return self.k[layer], self.v[layer]


def length_bucket(positions: int) -> int:
    """The smallest bucket that holds `positions`: a power of two from 128 up."""
    return max(SMALLEST_BUCKET, 1 << (positions - 1).bit_length())


def init_cache(config: DecoderConfig, batch: int, capacity: int, dtype: Any) -> KVCache:
    """An empty cache for `batch` rows of `capacity` positions."""
    shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
    layers = range(config.num_hidden_layers)
    return KVCache(*(tuple(zeros(shape, dtype, "B K S H") for _ in layers) for _ in "kv"))


def write(buffer: Array, new: Array, start: Array) -> Array:
    """Write `new` [B, T, K, H] into `buffer` [B, K, S, H], row b from position start[b] on.

    A single position may be written with the one behind it, which nothing has seen yet. On a TPU rows are written one
    by one.

    The caller keeps start + max(T, 2) ≤ S for every row that still matters (XLA would clamp the start).
    """
    new = new.astype(buffer.dtype).swapaxes(1, 2)
    elsewhere = _write_row if buffer.shape[0] == 1 else jax.vmap(_update)
    return jax.lax.platform_dependent(buffer, new, start, tpu=_write_on_tpu, default=elsewhere)


def _update(buffer: Array, new: Array, start: Array) -> Array:
    """One row, [K, S, H], with `new` [K, T, H] from position `start` on."""
    return jax.lax.dynamic_update_slice(buffer, new, (0, start, 0))


def _write_row(buffer: Array, new: Array, start: Array) -> Array:
    """`write` of a single row, a plain slice update instead of a scatter; `new` is [1, K, T, H]."""
    if new.shape[2] == 1:
        # XLA on a CPU fuses the update of one position into both of its readers, and then copies the whole buffer four
        # times a step to do so (0.10, 0.11; tests/domino_jax/test_decode.py counts).
        new = jnp.concatenate([new, new], axis=2)
    return jax.lax.dynamic_update_slice(buffer, new, (0, 0, start[0], 0))


def _write_on_tpu(buffer: Array, new: Array, start: Array) -> Array:
    """`write` row by row, on each device its own; `new` is [B, K, T, H].

    A scatter for all rows would become a loop with seven operations around each row's update.
    """

    def put(b: Any, buffer: Array, new: Array, start: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(new, b, 1)
        return jax.lax.dynamic_update_slice(buffer, row, (b, 0, start[b], 0))

    def run(buffer: Array, new: Array, start: Array) -> Array:
        if buffer.shape[0] > FEW_ROWS:
            return jax.lax.fori_loop(0, buffer.shape[0], lambda b, buffer: put(b, buffer, new, start), buffer)
        for b in range(buffer.shape[0]):
            buffer = put(b, buffer, new, start)
        return buffer

    if jax.sharding.get_abstract_mesh().empty:
        return run(buffer, new, start)
    rows = spec("B K S H")
    return jax.shard_map(run, in_specs=(rows, rows, spec("B")), out_specs=rows)(buffer, new, start)


def read(buffer: Array, start: Array, count: int) -> Array:
    """`count` positions of `buffer` [B, K, S, H], row b's from start[b] on: [B, K, count, H]. On a TPU row by row."""

    def one(b: int, buffer: Array, start: Array) -> Array:
        row = jax.lax.slice_in_dim(buffer, b, b + 1)
        return jax.lax.dynamic_slice_in_dim(row, start[b], count, axis=POSITIONS)

    def single(buffer: Array, start: Array) -> Array:
        return one(0, buffer, start)

    def rows(buffer: Array, start: Array) -> Array:
        return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, count, axis=POSITIONS - 1))(buffer, start)

    def on_tpu(buffer: Array, start: Array) -> Array:
        def run(buffer: Array, start: Array) -> Array:
            return jnp.concatenate([one(b, buffer, start) for b in range(buffer.shape[0])])

        if jax.sharding.get_abstract_mesh().empty:
            return run(buffer, start)
        places = spec("B K S H")
        return jax.shard_map(run, in_specs=(places, spec("B")), out_specs=places)(buffer, start)

    elsewhere = single if buffer.shape[0] == 1 else rows
    return jax.lax.platform_dependent(buffer, start, tpu=on_tpu, default=elsewhere)


def resize(buffer: Array, capacity: int, axis: int = POSITIONS) -> Array:
    """A buffer whose `axis` of positions has the size `capacity`: new ones are zero, those beyond it are dropped."""
    extra = capacity - buffer.shape[axis]
    if extra <= 0:
        return jax.lax.slice_in_dim(buffer, 0, capacity, axis=axis)
    widths = [(0, 0)] * buffer.ndim
    widths[axis] = (0, extra)
    return jnp.pad(buffer, widths)
