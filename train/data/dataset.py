"""Training sequences, and batches as a pure function of the step, so that resuming needs no state.

A line of a JSONL file, or a row of a dataset, is one of

    {"input_ids": [...], "tokens": [...]}       what `python -m infer --json` prints: loss on `tokens`
    {"input_ids": [...], "loss_mask": [...]}    loss where the mask is 1
    {"messages": [{"role": ..., "content": ...}, ...]}          loss on answers (train.data.conversations);
    {"conversations": [{"from": ..., "value": ...}, ...]}       both may come with "tools"
    {"prompt": "...", "completion": "..."}      loss on the completion
    {"text": "..."}                             loss on all of it
"""

import hashlib
import sys
from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from domino_jax.errors import DominoError
from domino_jax.runtime.extras import explain_missing_extra
from train.data.conversations import Template, Tokens, messages_of, tools_of
from train.data.sources import read_rows

REPORT_EVERY = 1000  # lines between two calls of `progress`


class Batch(NamedTuple):
    """B rows of S tokens on the host, right-padded."""

    ids: np.ndarray  # [B, S] int32
    mask: np.ndarray  # [B, S] bool, True on the tokens to learn
    starts: np.ndarray  # [B, S] int32, first position of the sequence a token belongs to; its own for padding
    rows: np.ndarray  # [B] int64, which rows of the corpus these are


class Corpus:
    """All rows in memory, 9 bytes a token, with an endless order that only a seed decides."""

    def __init__(self, ids: np.ndarray, mask: np.ndarray, starts: np.ndarray):
        self.ids, self.mask, self.starts = ids, mask, starts  # [N, S], as in Batch

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all rows in their order: what a resumed run and captured features are compared with."""
        digest = hashlib.sha256(repr(self.ids.shape).encode())
        for values, dtype in ((self.ids, "<i4"), (self.mask, "?"), (self.starts, "<i4")):
            digest.update(np.ascontiguousarray(values, dtype).data)
        return digest.hexdigest()

    def take(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The rows of these numbers."""
        places = np.asarray(rows, np.int64)
        return Batch(self.ids[places], self.mask[places], self.starts[places], places)

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
        order, own = _order(len(self), seed), size // count
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
def _order(count: int, seed: int) -> Any:
    """Row numbers by place, without end: a permutation of `count` rows for each epoch, computed place by place."""
    return _grain().MapDataset.range(count).seed(seed % 2**32).shuffle().repeat()


class Summary(NamedTuple):
    """What reading came to."""

    lines: int
    sequences: int  # that are learned from
    tokens: int  # of these sequences
    learned: int  # of these tokens, those under the loss
    left_out: int  # sequences without an anchor, and lines without a sequence
    truncated: int  # sequences that were cut
    rows: int
    length: int  # of a row

    @property
    def padding(self) -> float:
        """Share of all positions that hold no token."""
        return 1 - self.tokens / (self.rows * self.length)

    def __str__(self) -> str:
        packed = f"packed into {self.rows:,} rows" if self.rows < self.sequences else "a row each"
        left_out = f"; {self.left_out:,} left out, nothing to learn" if self.left_out else ""
        cut = f"; {self.truncated:,} cut" if self.truncated else ""
        tokens = f"{self.tokens:,} tokens ({self.learned:,} to learn)"
        return (
            f"{self.lines:,} lines, {self.sequences:,} sequences of {tokens}, "
            f"{packed} of {self.length:,}, {self.padding:.0%} padding{left_out}{cut}"
        )


def read_corpus(
    sources: Sequence[str | Path],
    length: int,
    vocab_size: int,
    tokenizer: Any,
    *,
    split: str = "train",
    pack: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[Corpus, Summary]:
    """Read sources into rows of `length` tokens.

    Args:
        sources: files, folders or datasets of the Hub, as train.data.sources.read_rows takes them.
        length: S; longer sequences are cut.
        tokenizer: the target's, with its chat template; None where all lines hold ids.
        split: which part of a dataset to read.
        pack: put several sequences into a row, each whole.
        progress: called with the number of lines now and then, and in the end.

    Raises:
        DominoError: a source is missing, a line is of no known form or holds an id outside the vocabulary, or no
            sequence is left.
    """
    template = Template(tokenizer)
    ids, mask, ends = array("i"), bytearray(), [0]
    lines = left_out = truncated = 0
    for source in sources:
        for where, row in read_rows(source, split):
            lines += 1
            try:
                found = _sequences(row, template)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                said = f"it has no {error}" if isinstance(error, KeyError) else error
                raise DominoError(f"{where} is not a training sequence: {said}.") from None
            left_out += not found
            for tokens, on in found:
                if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
                    raise DominoError(f"{where} has an id outside the target's vocabulary of {vocab_size}.")
                kept, learned = tokens[:length], bytes(map(bool, on[:length]))
                if b"\1\1" not in learned:
                    left_out += 1
                    continue
                truncated += len(tokens) > length
                ids.extend(kept)
                mask += learned
                ends.append(len(ids))
            if progress and lines % REPORT_EVERY == 0:
                progress(lines)
    if progress:
        progress(lines)
    if len(ends) == 1:
        names = " and ".join(map(str, sources))
        raise DominoError(f"{names} has no sequence with two neighbouring tokens to learn in its first {length}.")
    corpus = _fill(np.frombuffer(ids, np.int32), np.frombuffer(mask, bool), np.asarray(ends), length, pack)
    counts = len(ends) - 1, len(ids), int(corpus.mask.sum())
    return corpus, Summary(lines, *counts, left_out, truncated, len(corpus), length)


def _fill(ids: np.ndarray, mask: np.ndarray, ends: np.ndarray, length: int, pack: bool) -> Corpus:
    """Rows from sequences that stand one after another, sequence i at ends[i] to ends[i + 1]."""
    sizes = np.diff(ends)
    places = best_fit(sizes.tolist(), length) if pack else [[i] for i in range(len(sizes))]
    shape = len(places), length
    corpus = Corpus(np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, np.int32))
    for row, members in enumerate(places):
        at = 0
        for member in members:
            here, there = slice(at, at + sizes[member]), slice(ends[member], ends[member + 1])
            corpus.ids[row, here], corpus.mask[row, here], corpus.starts[row, here] = ids[there], mask[there], at
            at += sizes[member]
        corpus.starts[row, at:] = np.arange(at, length)
    return corpus


def best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which sequences share a row: the longest first, each into the fullest row that still has room for it.

    Args:
        sizes: tokens of each sequence, 1 to `length`.

    Returns:
        Members of each row; every sequence is in one of them.
    """
    rows: list[list[int]] = []
    free: dict[int, list[int]] = {}  # rows by the room they have
    rooms: list[int] = []  # the keys of `free`, rising
    for member in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[member]
        found = bisect_left(rooms, size)
        if found == len(rooms):
            row, room = len(rows), length
            rows.append([])
        else:
            room = rooms[found]
            row = free[room].pop()
            if not free[room]:
                del free[room], rooms[found]
        rows[row].append(member)
        left = room - size
        if left:
            if left not in free:
                free[left] = []
                insort(rooms, left)
            free[left].append(row)
    return rows


def _sequences(row: Any, template: Template) -> list[Tokens]:
    """Ids and loss masks of one line: one sequence, or for a conversation perhaps several or none."""
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    if "input_ids" in row:
        prompt = [int(t) for t in row["input_ids"]]
        if "tokens" in row:
            return [_continued(prompt, [int(t) for t in row["tokens"]])]
        mask = [int(m) for m in row["loss_mask"]]
        if len(mask) != len(prompt):
            raise ValueError(f"loss_mask has {len(mask)} entries for {len(prompt)} ids")
        return [(prompt, mask)]
    if "messages" in row or "conversations" in row:
        return template.sequences(messages_of(row), tools_of(row))
    if "completion" in row:
        return [_continued(template.encode(row["prompt"]), template.encode(row["completion"]))]
    if "text" in row:
        return [_continued([], template.encode(row["text"]))]
    raise ValueError(
        "expected input_ids with tokens or loss_mask, messages, conversations, prompt with completion, or text"
    )


def _continued(prompt: list[int], tokens: list[int]) -> Tokens:
    return prompt + tokens, [0] * len(prompt) + [1] * len(tokens)
