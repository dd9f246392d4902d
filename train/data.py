"""Training sequences from JSONL, and batches as a pure function of the step, so that resuming needs no state.

A line is one of

    {"input_ids": [...], "tokens": [...]}       what `python -m infer --json` prints: loss on `tokens`
    {"input_ids": [...], "loss_mask": [...]}    loss where the mask is 1
    {"prompt": "...", "completion": "..."}      loss on the completion
    {"text": "..."}                             loss on all of it
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from domino_jax.errors import DominoError


class Batch(NamedTuple):
    """B sequences of S tokens, right-padded."""

    ids: np.ndarray  # [B, S] int32
    mask: np.ndarray  # [B, S] bool, True on the tokens to learn


class Dataset:
    """All sequences in memory, with a shuffled order that only the seed and the epoch decide."""

    def __init__(self, ids: np.ndarray, mask: np.ndarray, seed: int):
        self.ids, self.mask, self.seed = ids, mask, seed

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, step: int, size: int) -> Batch:
        """The batch of a step (from 0): sequences step·size onward of an endless run of shuffled epochs."""
        places = range(step * size, (step + 1) * size)
        epochs = {place // len(self) for place in places}
        orders = {e: np.random.default_rng([self.seed, e]).permutation(len(self)) for e in epochs}
        rows = [orders[place // len(self)][place % len(self)] for place in places]
        return Batch(self.ids[rows], self.mask[rows])


def read(path: Path, length: int, vocab_size: int, tokenizer: Any, seed: int) -> tuple[Dataset, int]:
    """Read a JSONL file into sequences of `length`, cut or padded.

    Returns:
        The dataset, and how many sequences were left out because no anchor fits into them.

    Raises:
        DominoError: the file is missing, a line is of no known form or holds an id outside the
            vocabulary, or no sequence is left.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise DominoError(f"the training data {path} can't be read: {error}.") from None
    ids, masks, skipped = [], [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            tokens, mask = _sequence(json.loads(line), tokenizer)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DominoError(f"{path} line {number} is not a training sequence: {error}.") from None
        if any(not 0 <= t < vocab_size for t in tokens):
            raise DominoError(f"{path} line {number} has an id outside the target's vocabulary of {vocab_size}.")
        row, on = np.zeros(length, np.int32), np.zeros(length, bool)
        tokens, mask = tokens[:length], mask[:length]
        row[: len(tokens)], on[: len(tokens)] = tokens, mask
        if not (on[:-1] & on[1:]).any():
            skipped += 1
            continue
        ids.append(row)
        masks.append(on)
    if not ids:
        raise DominoError(f"{path} has no sequence with two neighbouring tokens to learn in its first {length}.")
    return Dataset(np.stack(ids), np.stack(masks), seed), skipped


def _sequence(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids and loss mask of one line."""

    def encode(text: str) -> list[int]:
        if tokenizer is None:
            raise ValueError("it holds text, and the target's folder has no tokenizer")
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if "input_ids" in row:
        prompt = [int(t) for t in row["input_ids"]]
        if "tokens" in row:
            tokens = [int(t) for t in row["tokens"]]
            return prompt + tokens, [0] * len(prompt) + [1] * len(tokens)
        mask = [int(m) for m in row["loss_mask"]]
        if len(mask) != len(prompt):
            raise ValueError(f"loss_mask has {len(mask)} entries for {len(prompt)} ids")
        return prompt, mask
    if "completion" in row:
        prompt, tokens = encode(row["prompt"]), encode(row["completion"])
        return prompt + tokens, [0] * len(prompt) + [1] * len(tokens)
    if "text" in row:
        tokens = encode(row["text"])
        return tokens, [1] * len(tokens)
    raise ValueError("expected input_ids with tokens or loss_mask, prompt with completion, or text")
