"""What the target is to answer: the conversations or prompts of a JSONL file, turn by turn.

A line is one of

    {"messages": [{"role": "user", "content": "..."}, ...]}              OpenAI's form
    {"conversations": [{"from": "human", "value": "..."}, ...]}          ShareGPT's
    {"prompt": "..."}                                                    text to continue
    {"input_ids": [...]}                                                 the same as ids

Every assistant message of a conversation is a turn, and so is its end after a user's message. Assistant messages
without one between them are one turn; what an assistant says before any user does stays as it is.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.template import has_template, render
from domino_jax.errors import DominoError

Message = dict[str, str]  # {"role": "user", "content": "..."}

SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class LeftOut(Exception):
    """Why a line, or the rest of its conversation, can't be answered; the message goes on "3 left out that ..."."""


class Source(NamedTuple):
    """One line. Exactly one field is not None."""

    given: list[list[Message]] | None = None  # for each turn the messages between the answer before and this one's
    text: str | None = None
    ids: list[int] | None = None

    @property
    def turns(self) -> int:
        """Answers to write."""
        return 1 if self.given is None else len(self.given)

    def messages(self, turn: int, answers: Sequence[str]) -> list[Message]:
        """The conversation before the answer of that turn, with the answers of the turns before it."""
        assert self.given is not None
        found = list(self.given[0])
        for answer, given in zip(answers[:turn], self.given[1 : turn + 1], strict=True):
            found += [{"role": "assistant", "content": answer}, *given]
        return found


def parse_row(row: Any, vocab_size: int) -> Source:
    """A line's conversation or prompt.

    Raises:
        ValueError: it is of none of the forms.
        LeftOut: it is, but there is nothing that the target could answer.
    """
    if not isinstance(row, dict):
        raise ValueError(f"it holds a {type(row).__name__}")
    if isinstance(row.get("messages"), list):
        return Source(given=_turns([_message(m, "role", "content") for m in row["messages"]]))
    if isinstance(row.get("conversations"), list):
        return Source(given=_turns([_message(m, "from", "value") for m in row["conversations"]]))
    if isinstance(row.get("prompt"), str):
        if not row["prompt"]:
            raise LeftOut("are empty")
        return Source(text=_text(row["prompt"]))
    ids = row.get("input_ids")
    if isinstance(ids, list) and all(type(i) is int for i in ids):
        if not ids:
            raise LeftOut("are empty")
        outside = [i for i in ids if not 0 <= i < vocab_size]
        if outside:
            raise ValueError(f"it has id {outside[0]}, outside the target's vocabulary of {vocab_size}")
        return Source(ids=ids)
    raise ValueError("expected messages, conversations, prompt or input_ids")


def _message(message: Any, role: str, content: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get(role), str):
        raise ValueError(f'each message is an object with "{role}" and "{content}"')
    if not isinstance(message.get(content), str) or message.get("tool_calls"):
        raise LeftOut("call tools, or have content that is no text")
    name = SHAREGPT.get(message[role])
    if name is None or (role == "role" and name != message[role]):
        raise LeftOut(f"have messages of a {message[role]!r}")
    return {"role": name, "content": _text(message[content])}


def _text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # a lone half of a UTF-16 pair
        raise ValueError(f"its text is not valid Unicode: {error}") from None
    return text


def _turns(messages: list[Message]) -> list[list[Message]]:
    given: list[list[Message]] = []
    current: list[Message] = []
    asked = False
    for message in messages:
        if message["role"] == "assistant" and (asked or given):
            if current:
                given.append(current)
            current, asked = [], False
        else:
            current.append(message)
            asked |= message["role"] == "user"
    if asked:
        given.append(current)
    if not given:
        raise LeftOut("ask nothing")
    return given


def encode_turn(source: Source, turn: int, answers: Sequence[str], tokenizer: Any, thinking: bool) -> list[int]:
    """The ids that the target goes on from: the model's own template up to where the assistant answers, or the prompt.

    Args:
        answers: the texts of the turns before this one.

    Raises:
        LeftOut: the template refuses the messages.
        DominoError: there is no tokenizer or no template.
    """
    if source.ids is not None:
        return source.ids
    if tokenizer is None:
        raise DominoError("the data holds text, and the target's folder has no tokenizer.")
    if source.text is not None:
        return list(tokenizer(source.text)["input_ids"])
    if not has_template(tokenizer):
        raise DominoError("the target has no chat template, so it takes prompts and no conversations.")
    try:
        rendered = render(tokenizer, source.messages(turn, answers), thinking=thinking)
    except ValueError as error:
        raise LeftOut(f"are refused by the chat template ({error})") from None
    # The template has written the special tokens itself.
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


class Lines:
    """The lines of a JSONL file, checked once and then read from disk as they are needed.

    Lines are counted from 0 without the blank ones; that is the number by which an answer's line is known.
    """

    def __init__(self, path: Path, vocab_size: int):
        """Reads the whole file.

        Raises:
            DominoError: it can't be read, a line is of no known form, or none can be answered.
        """
        self.path, self.vocab_size = path, vocab_size
        self.left_out: Counter[str] = Counter()  # reasons
        digest = hashlib.sha256()
        offsets, turns, offset = [], [], 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    digest.update(line)
                    if line.strip():
                        offsets.append(offset)
                        turns.append(self._check(line, number))
                    offset += len(line)
        except OSError as error:
            raise DominoError(f"the data {path} can't be read: {error}.") from None
        self.sha256 = digest.hexdigest()
        self.turns = np.array(turns, np.int32)  # [lines] answers to write
        self._offsets = np.array(offsets, np.int64)
        if not self.turns.any():
            raise DominoError(f"{path} has nothing to answer" + said(self.left_out) + ".")

    def _check(self, line: bytes, number: int) -> int:
        try:
            return parse_row(json.loads(line), self.vocab_size).turns
        except LeftOut as reason:
            self.left_out[str(reason)] += 1
            return 0
        except (ValueError, RecursionError) as error:
            raise DominoError(f"{self.path} line {number} is no conversation and no prompt: {error}.") from None

    def __len__(self) -> int:
        return len(self.turns)

    def sources(self, first: int, end: int) -> Iterator[tuple[int, Source]]:
        """Those of the lines first ... end - 1 that can be answered, with their numbers."""
        with self.path.open("rb") as file:
            for number in range(first, end):
                if self.turns[number]:
                    file.seek(self._offsets[number])
                    yield number, parse_row(json.loads(file.readline()), self.vocab_size)


def said(reasons: Counter[str]) -> str:
    """What was left out and why, in words that follow a sentence's beginning; nothing if nothing was."""
    return "".join(f"; {count} left out that {reason}" for reason, count in reasons.most_common(5))
