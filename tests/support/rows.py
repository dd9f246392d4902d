"""Corpora from padded rows, for tests of what takes a corpus."""

import numpy as np

from train.data.corpus import Corpus


def corpus_of_rows(ids: np.ndarray, mask: np.ndarray, starts: np.ndarray) -> Corpus:
    """The corpus whose rows these are, [N, S] each; a padding token's start is its own position."""
    kept = starts < np.arange(starts.shape[1])
    lengths = np.where(kept.any(1), starts.shape[1] - kept[:, ::-1].argmax(1), 1)
    real = np.arange(starts.shape[1]) < lengths[:, None]
    begins = real & (starts == np.arange(starts.shape[1]))
    flat = np.flatnonzero(begins[real])
    ends = np.append(flat, real.sum())
    rows = np.cumsum([0, *begins.sum(1)])
    return Corpus(ids[real].astype(np.int32), mask[real], ends, np.arange(len(flat)), rows, starts.shape[1])
