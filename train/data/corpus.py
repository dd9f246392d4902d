"""A corpus in memory, and batches as a pure function of the step, so that resuming needs no state."""

import hashlib
import sys
from collections.abc import Generator, Iterator, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np

from domino_jax.errors import DominoError
from domino_jax.runtime.extras import explain_missing_extra
from train.data.packing import best_fit

HASHED_ROWS = 256  # at a time, for the fingerprint


class Batch(NamedTuple):
    """B rows of S tokens on the host, right-padded."""

    ids: np.ndarray  # [B, S] int32
    mask: np.ndarray  # [B, S] bool, True on the tokens to learn
    starts: np.ndarray  # [B, S] int32, first position of the sequence a token belongs to; its own for padding
    rows: np.ndarray  # [B] int64, which rows of the corpus these are


class Corpus:
    """All sequences in memory, 5 bytes a token, in rows of S tokens; padding is made when rows are taken.

    The order of batches is without end, and only a seed decides it.
    """

    def __init__(
        self, ids: np.ndarray, mask: np.ndarray, ends: np.ndarray, order: np.ndarray, rows: np.ndarray, length: int
    ):
        """Args:
        ids: [T] int32, the sequences one after another.
        mask: [T] bool, True on the tokens to learn.
        ends: [M + 1], sequence i has the tokens ends[i] to ends[i + 1] - 1.
        order: [M], the sequences in the order of the rows.
        rows: [N + 1], row r has the sequences order[rows[r]] to order[rows[r + 1] - 1].
        length: S; the sequences of a row have so many tokens at most.
        """
        self.ids, self.mask, self.ends, self.order, self.rows, self.length = ids, mask, ends, order, rows, length

    @classmethod
    def of_sequences(cls, ids: np.ndarray, mask: np.ndarray, ends: np.ndarray, length: int, pack: bool) -> "Corpus":
        """A row for each sequence, or with `pack` rows that several share (`best_fit`)."""
        sizes = np.diff(ends)
        if pack:
            members = best_fit(sizes.tolist(), length)
            order = np.fromiter((member for row in members for member in row), np.int64, len(sizes))
            rows = np.cumsum([0, *map(len, members)])
        else:
            order, rows = np.arange(len(sizes)), np.arange(len(sizes) + 1)
        return cls(ids, mask, ends, order, rows, length)

    def __len__(self) -> int:
        return len(self.rows) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[N], tokens of each row without its padding."""
        return np.add.reduceat(np.diff(self.ends)[self.order], self.rows[:-1]) if len(self) else np.zeros(0, np.int64)

    def packed(self, rows: slice) -> bool:
        """Whether one of these rows holds several sequences."""
        return bool((np.diff(self.rows)[rows] > 1).any())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all padded rows in their order: what a resumed run and captured features are compared with."""
        digest = hashlib.sha256(repr((len(self), self.length)).encode())
        for field, dtype in (("ids", "<i4"), ("mask", "?"), ("starts", "<i4")):
            for first in range(0, len(self), HASHED_ROWS):
                batch = self.take(range(first, min(first + HASHED_ROWS, len(self))))
                digest.update(np.ascontiguousarray(getattr(batch, field), dtype).data)
        return digest.hexdigest()

    def take(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The rows of these numbers, padded."""
        places = np.asarray(rows, np.int64)
        shape = len(places), self.length
        ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        starts = np.zeros(shape, np.int32)
        for row, place in enumerate(places):
            at = 0
            for begin, end in self._sequences(int(place)):
                here = slice(at, at + end - begin)
                ids[row, here], mask[row, here], starts[row, here] = self.ids[begin:end], self.mask[begin:end], at
                at = here.stop
            starts[row, at:] = np.arange(at, self.length)
        return Batch(ids, mask, starts, places)

    def _sequences(self, row: int) -> Iterator[tuple[int, int]]:
        """Where the sequences of a row begin and end."""
        for member in self.order[self.rows[row] : self.rows[row + 1]]:
            yield int(self.ends[member]), int(self.ends[member + 1])

    def batch(self, step: int, size: int, seed: int, part: tuple[int, int] = (0, 1)) -> Batch:
        """The batch of a step (from 0): rows step·size onward of an endless run of epochs, each shuffled anew.

        Args:
            size: rows of the whole batch.
            part: (i, n) for the i-th of n equal pieces, one for each host; together they are the whole batch.

        Raises:
            DominoError: n does not divide the size.
        """
        index, count = part
        if size % count:
            raise DominoError(f"a batch of {size} rows can't be split evenly over {count} hosts.")
        order, own = endless_order(len(self), seed), size // count
        begin = step * size + index * own
        return self.take([order[place] for place in range(begin, begin + own)])

    def batches(
        self, first_step: int, size: int, seed: int, part: tuple[int, int] = (0, 1)
    ) -> Generator[Batch, None, None]:
        """The same for all steps from `first_step` on, the next ones read ahead in a thread until it is closed."""
        grain = _grain()
        steps = grain.MapDataset.range(first_step, sys.maxsize).map(lambda step: self.batch(step, size, seed, part))
        ahead = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
        try:
            yield from ahead
        finally:
            ahead.close()


def _grain() -> Any:
    with explain_missing_extra():
        import grain
    return grain


@cache
def endless_order(count: int, seed: int) -> Any:
    """Row numbers by place, without end: a permutation of `count` rows for each epoch, computed place by place."""
    return _grain().MapDataset.range(count).seed(seed % 2**32).shuffle().repeat()
