"""Rows of data as training sequences: ids, and which of them are learned.

A line of a JSONL file, or a row of a dataset, is one of

    {"input_ids": [...], "tokens": [...]}       what `python -m infer --json` prints: loss on `tokens`
    {"input_ids": [...], "loss_mask": [...]}    loss where the mask is 1
    {"messages": [{"role": ..., "content": ...}, ...]}          loss on answers (train.data.conversations);
    {"conversations": [{"from": ..., "value": ...}, ...]}       both may come with "tools" (convert.messages)
    {"prompt": [{"role": ...}, ...], "completion": [...]}       TRL's lists of messages: loss on completion's
    {"prompt": "...", "completion": "..."}      loss on the completion, after the prompt's ids in use
    {"text": "..."}                             loss on all of it, after what use puts before a raw prompt (a BOS, say)
"""

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from convert.messages import LeftOut, conversation_of
from convert.tokenizer import encode
from convert.values import check_vocabulary, fields_of, json_kind, loss_mask, text_of, token_ids
from domino_jax.errors import DominoError
from train.data.conversations import Template, Tokens

FORMS = "input_ids with tokens or loss_mask, messages, conversations, prompt with completion, or text"  # of a row


class Part(NamedTuple):
    """What some rows came to: sequences one after another."""

    ids: np.ndarray  # [T] int32
    mask: np.ndarray  # [T] bool
    sizes: np.ndarray  # [M] int64, tokens of each sequence
    lines: int  # rows that were read
    left_out: int  # sequences without two neighbouring tokens to learn, and rows without a sequence
    truncated: int  # sequences that were cut
    refused: Counter[str]  # conversations that can't be used, by the reason; they count as left out
    first_refusal: str | None  # where, and why, as a sentence


def read_part(rows: Sequence[tuple[str, Any]], template: Template, vocab_size: int, length: int) -> Part:
    """The sequences of some rows, cut to `length` tokens.

    Args:
        rows: each with the words that say where it stands.

    Raises:
        DominoError: a row is of no known form, or holds an id outside the vocabulary.
    """
    ids, mask, sizes = array("i"), bytearray(), []
    left_out = truncated = 0
    refused: Counter[str] = Counter()
    first_refusal = None
    for where, row in rows:
        try:
            found = sequences_of(row, template)
            for tokens, _ in found:
                check_vocabulary(tokens, vocab_size)
        except LeftOut as reason:
            refused[str(reason)] += 1
            first_refusal = first_refusal or f"{where} is not a training sequence: {reason.sentence}."
            found = []
        except (DominoError, ValueError) as error:
            raise DominoError(f"{where} is not a training sequence: {str(error).rstrip('.')}.") from None
        left_out += not found
        for tokens, on in found:
            kept, learned = tokens[:length], bytes(map(bool, on[:length]))
            if b"\1\1" not in learned:
                left_out += 1
                continue
            truncated += len(tokens) > length
            ids.extend(kept)
            mask += learned
            sizes.append(len(kept))
    arrays = np.frombuffer(ids, np.int32), np.frombuffer(bytes(mask), bool), np.array(sizes, np.int64)
    return Part(*arrays, len(rows), left_out, truncated, refused, first_refusal)


def sequences_of(row: Any, template: Template) -> list[Tokens]:
    """Ids and loss masks of one row: one sequence, or for a conversation perhaps several or none.

    Raises:
        DominoError, ValueError: it is of no known form.
        LeftOut: it is a conversation that can't be used.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object, found {json_kind(row)}")
    if row.get("input_ids") is not None:
        return [_of_ids(row)]
    conversation = conversation_of(row)
    if conversation is not None:
        return template.sequences(*conversation)
    if row.get("completion") is not None:
        before, text = text_of(row, "prompt"), text_of(row, "completion")
    elif row.get("text") is not None:
        before, text = "", text_of(row, "text")
    else:
        raise ValueError(f"expected {FORMS}; found {fields_of(row)}")
    return [_continued(encode(template.tokenizer, before), encode(template.tokenizer, text, special=False))]


def _of_ids(row: Mapping[str, Any]) -> Tokens:
    ids = token_ids(row["input_ids"])
    if row.get("tokens") is not None:
        return _continued(ids, token_ids(row["tokens"], "tokens"))
    if row.get("loss_mask") is None:
        raise ValueError("it has input_ids, and neither tokens nor loss_mask, which say what is to be learned")
    mask = loss_mask(row["loss_mask"])
    if len(mask) != len(ids):
        raise ValueError(f"loss_mask has {len(mask)} entries for {len(ids)} ids")
    return ids, mask


def _continued(prompt: list[int], tokens: list[int]) -> Tokens:
    return prompt + tokens, [0] * len(prompt) + [1] * len(tokens)
