"""What the target is to answer: the conversations or prompts of a JSONL file, turn by turn.

A line is one of

    {"messages": [{"role": "user", "content": "..."}, ...]}              OpenAI's form
    {"conversations": [{"from": "human", "value": "..."}, ...]}          ShareGPT's
    {"prompt": "..."}                                                    text to continue
    {"prompt": [{...}, ...], "completion": [{...}, ...]}                 TRL's lists of messages
    {"input_ids": [...]}                                                 ids to continue

Messages are read as training reads them (convert.messages). Every assistant message of a conversation is a turn, and so
is its end after a user's or a tool's message. Assistant messages without one between them are one turn. What an
assistant says before anybody asks stays as it is, and so do its calls of tools, since what the tools said belongs to
them, and what is not to be learned (`weight` 0, and TRL's prompts).
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.messages import (
    LeftOut,
    Message,
    asks,
    conversation_of,
    left_out_words,
    unknown_roles,
    valid_unicode,
)
from convert.tokenizer import encode, render
from convert.values import check_vocabulary, json_kind, text_of, token_ids
from domino_jax.errors import DominoError
from domino_jax.runtime.files import JsonLine, read_jsonl, read_line

NEITHER = "no conversation and no prompt"


class RowShard(NamedTuple):
    """Every `count`-th line, from line `index` on: what one worker of several answers."""

    index: int
    count: int

    def has(self, number: int) -> bool:
        """Whether a line is in it."""
        return number % self.count == self.index

    def path(self, path: Path) -> Path:
        """The file of this shard's answers, in the place of the file of all: data-00001-of-00004.jsonl."""
        name = f"{path.stem}-{self.index:05}-of-{self.count:05}{path.suffix}"
        return path.parent / name if self.count > 1 else path

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = RowShard(0, 1)


def parse_shard(text: str) -> RowShard:
    """The shard of "1/4".

    Raises:
        DominoError: it is not of this form.
    """
    found = re.fullmatch("([0-9]{1,5})/([0-9]{1,5})", text)
    shard = RowShard(*map(int, found.groups())) if found else RowShard(0, 0)
    if not shard.index < shard.count:
        raise DominoError(f"a shard is given as I/N, with I from 0 to N - 1, such as 0/4; found {text[:80]!r}.")
    return shard


class Source(NamedTuple):
    """One line. Exactly one of the first three fields is not None."""

    given: list[list[Message]] | None = None  # for each turn the messages between the answer before and this one's
    text: str | None = None
    ids: list[int] | None = None
    tools: list[Any] | None = None  # that the conversation declares

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
        raise ValueError(f"expected an object, found {json_kind(row)}")
    conversation = conversation_of(row)
    if conversation is not None:
        messages, tools = conversation
        return Source(given=_turns(messages), tools=tools)
    if row.get("prompt") is not None:
        if not text_of(row, "prompt"):
            raise LeftOut("are empty")
        return Source(text=valid_unicode(row["prompt"]))
    if row.get("input_ids") is not None:
        ids = token_ids(row["input_ids"])
        if not ids:
            raise LeftOut("are empty")
        check_vocabulary(ids, vocab_size)
        return Source(ids=ids)
    raise ValueError("expected messages, conversations, prompt or input_ids")


def _turns(messages: list[Message]) -> list[list[Message]]:
    given: list[list[Message]] = []
    current: list[Message] = []
    asked = False
    for message in messages:
        kept = "tool_calls" in message or message.get("weight", 1) == 0
        if message["role"] == "assistant" and (asked or given) and not kept:
            if current:
                given.append(current)
            current, asked = [], False
        else:
            current.append(message)
            asked = (asked or asks(message)) and not (message["role"] == "assistant" and message.get("weight", 1) == 0)
    if asked and current[-1]["role"] != "assistant":
        given.append(current)
    if not given:
        raise LeftOut(f"ask nothing{unknown_roles(messages)}")
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
    if source.text is not None:
        return encode(tokenizer, source.text)
    rendered = render(tokenizer, source.messages(turn, answers), thinking=thinking, tools=source.tools)
    return encode(tokenizer, rendered, special=False)


class Lines:
    """The lines of a JSONL file, checked once and then read from disk as they are needed.

    Lines are counted from 0 without the blank ones; that is the number by which an answer's line is known.
    """

    def __init__(self, path: Path, vocab_size: int, shard: RowShard = WHOLE):
        """Reads the whole file.

        Args:
            shard: of the lines; to the others nothing is to be answered.

        Raises:
            DominoError: it can't be read, a line is of no known form, or none can be answered.
        """
        self.path, self.vocab_size = path, vocab_size
        self.left_out: Counter[str] = Counter()  # reasons
        starts, turns = [], []
        for line in read_jsonl(path, invalid=NEITHER):
            turns.append(self._check(line) if shard.has(len(starts)) else 0)
            starts.append(line.start)
        with path.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.turns = np.array(turns, np.int32)  # [lines] answers to write
        self._starts = np.array(starts, np.int64)
        if not self.turns.any():
            of = f" in shard {shard}" if shard.count > 1 else ""
            raise DominoError(f"{path} has nothing to answer{of}" + left_out_words(self.left_out) + ".")

    def _check(self, line: JsonLine) -> int:
        try:
            return parse_row(line.value, self.vocab_size).turns
        except LeftOut as reason:
            self.left_out[str(reason)] += 1
            return 0
        except ValueError as error:
            raise DominoError(f"{line.where} is {NEITHER}: {error}.") from None

    def __len__(self) -> int:
        return len(self.turns)

    def sources(self, first: int, end: int) -> Iterator[tuple[int, Source]]:
        """Those of the lines first ... end - 1 that can be answered, with their numbers."""
        for number in range(first, end):
            if self.turns[number]:
                yield number, parse_row(read_line(self.path, int(self._starts[number])), self.vocab_size)
