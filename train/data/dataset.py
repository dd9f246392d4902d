"""From files and datasets to a corpus of training sequences (train.data.examples says which rows they may hold)."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from convert.identity import tokenizer_fingerprint
from convert.messages import left_out_words
from domino_jax.errors import DominoError
from train.data.cache import cached_corpus, corpus_key
from train.data.corpus import Corpus
from train.data.sources import read_rows, source_fingerprint
from train.data.workers import tokenize

REPORT_EVERY = 1000  # lines between two calls of `progress`
GROUP_LINES = 64  # lines that are tokenized at a time


class CorpusSummary(NamedTuple):
    """What reading came to."""

    lines: int
    sequences: int  # that are learned from
    tokens: int  # of these sequences
    learned: int  # of these tokens, those under the loss
    left_out: int  # sequences without an anchor, and lines without a sequence
    truncated: int  # sequences that were cut
    rows: int
    length: int  # of a row
    refused: tuple[tuple[str, int], ...] = ()  # conversations among those left out that can't be used, by the reason

    @property
    def padding(self) -> float:
        """Share of all positions that hold no token."""
        return 1 - self.tokens / (self.rows * self.length)

    def __str__(self) -> str:
        packed = f"packed into {self.rows:,} rows" if self.rows < self.sequences else "a row each"
        refused = Counter(dict(self.refused))
        nothing = self.left_out - refused.total()
        left_out = f"; {nothing:,} left out, nothing to learn" if nothing else ""
        cut = f"; {self.truncated:,} cut" if self.truncated else ""
        tokens = f"{self.tokens:,} tokens ({self.learned:,} to learn)"
        return (
            f"{self.lines:,} lines, {self.sequences:,} sequences of {tokens}, "
            f"{packed} of {self.length:,}, {self.padding:.0%} padding{left_out}{left_out_words(refused)}{cut}"
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
    cache: Path | None = None,
) -> tuple[Corpus, CorpusSummary]:
    """Read sources into rows of `length` tokens.

    Args:
        sources: files, folders or datasets of the Hub, as train.data.sources.read_rows takes them.
        length: S; longer sequences are cut.
        tokenizer: the target's, with its chat template; None where all lines hold ids.
        split: which part of a dataset to read.
        pack: put several sequences into one row.
        progress: called with the number of lines now and then, and in the end.
        cache: a folder that keeps corpora, by the sources, the tokenizer and these arguments; None keeps nothing.

    Raises:
        DominoError: a source is missing, a line is of no known form or holds an id outside the vocabulary, or no
            sequence is left.
    """

    def make() -> tuple[Corpus, dict[str, Any]]:
        corpus, summary = _read(sources, length, vocab_size, tokenizer, split, pack, progress)
        return corpus, summary._asdict()

    key = _cache_key(sources, length, vocab_size, tokenizer, split, pack) if cache else None
    if cache is None or key is None:
        corpus, about = make()
    else:
        corpus, about = cached_corpus(cache, key, make)
    if progress:
        progress(about["lines"])
    refused = tuple((reason, count) for reason, count in about["refused"])  # lists, in JSON
    return corpus, CorpusSummary(**about)._replace(refused=refused)


def _cache_key(
    sources: Sequence[str | Path], length: int, vocab_size: int, tokenizer: Any, split: str, pack: bool
) -> str | None:
    """None where the tokenizer or a source can't be known again."""
    known, data = tokenizer_fingerprint(tokenizer), [source_fingerprint(source, split) for source in sources]
    if known is None or None in data:
        return None
    return corpus_key({"tokenizer": known, "data": data, "length": length, "vocab_size": vocab_size, "pack": pack})


def _read(
    sources: Sequence[str | Path],
    length: int,
    vocab_size: int,
    tokenizer: Any,
    split: str,
    pack: bool,
    progress: Callable[[int], None] | None,
) -> tuple[Corpus, CorpusSummary]:
    ids, mask, ends = array("i"), bytearray(), array("q", [0])
    lines = left_out = truncated = told = 0
    refused: Counter[str] = Counter()
    first_refusal = None
    rows = (row for source in sources for row in read_rows(source, split))
    groups = _grouped(rows, min(GROUP_LINES, REPORT_EVERY))
    for part in tokenize(groups, tokenizer, vocab_size, length):
        lines += part.lines
        ids.frombytes(part.ids.tobytes())
        mask += part.mask.tobytes()
        ends.extend((ends[-1] + np.cumsum(part.sizes)).tolist())
        left_out, truncated = left_out + part.left_out, truncated + part.truncated
        refused += part.refused
        first_refusal = first_refusal or part.first_refusal
        if progress and lines // REPORT_EVERY > told:
            told = lines // REPORT_EVERY
            progress(lines)
    if len(ends) == 1:
        names = " and ".join(map(str, sources))
        raise DominoError(
            first_refusal or f"{names} has no sequence with two neighbouring tokens to learn in its first {length}."
        )
    flat = np.frombuffer(ids, np.int32), np.frombuffer(mask, bool), np.frombuffer(ends, np.int64)
    corpus = Corpus.of_sequences(*flat, length, pack)
    counts = len(ends) - 1, len(ids), int(flat[1].sum())
    summary = CorpusSummary(lines, *counts, left_out, truncated, len(corpus), length, tuple(refused.most_common()))
    return corpus, summary


_Item = TypeVar("_Item")


def _grouped(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    group: list[_Item] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
