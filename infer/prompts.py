"""Prompts: from a file, the command line or Python, and the token ids that the model is given for them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.messages import Message, valid_unicode
from convert.tokenizer import has_template
from convert.values import json_kind, text_of, token_ids
from domino_jax.errors import DominoError
from domino_jax.runtime.files import read_jsonl
from infer.rows import conversation_in_row, max_new_tokens

KEYS = ("prompt", "messages", "conversations", "input_ids")  # of a row: one of them


@dataclass(frozen=True)
class Prompt:
    """One thing to generate from: text, messages or ids, exactly one of them."""

    text: str | None = None
    messages: list[Message] | None = None
    ids: list[int] | None = None
    tools: list[Any] | None = None  # that the messages may call
    max_new_tokens: int | None = None
    where: str = ""  # in a file, for errors and warnings


@dataclass(frozen=True)
class Encoder:
    """Turns prompts into the token ids of one model."""

    tokenizer: Any  # a transformers tokenizer, or None
    raw: bool = False
    thinking: bool = False
    system: str | None = None

    @property
    def is_chat(self) -> bool:
        """Whether prompts go through the model's chat template."""
        return not self.raw and has_template(self.tokenizer)

    def check(self, drafter: bool) -> list[str]:
        """Check that the model can do what is asked; returns warnings.

        Args:
            drafter: there is one.

        Raises:
            DominoError: the model has no chat template, and one is needed.
        """
        from infer import text

        if self.system is not None and not self.is_chat:
            raise DominoError("this model has no chat template, so --system has no place to go.")
        if not self.thinking:
            return []
        if not self.is_chat:
            raise DominoError("this model has no chat template, which --thinking needs.")
        if not text.knows_thinking(self.tokenizer):
            return ["--thinking changes nothing: this model's chat template knows no enable_thinking."]
        if drafter:
            return ["drafters are trained with thinking off: with --thinking fewer drafts will be accepted."]
        return []

    def ids(self, prompt: Prompt) -> list[int]:
        """The ids that the model is given.

        Raises:
            DominoError: the prompt is empty or not valid Unicode, or needs a tokenizer or template that is not there.
        """
        from infer import text

        if prompt.ids is not None:
            return prompt.ids
        if self.tokenizer is None:
            raise DominoError("the model's folder has no tokenizer: give the prompt with --input-ids.")
        messages: Sequence[Message] | None = prompt.messages
        if messages is None:
            if not prompt.text:
                raise DominoError("the prompt is empty.")
            if not self.is_chat:
                return text.encode(self.tokenizer, prompt.text)
            messages = [{"role": "user", "content": prompt.text}]
        elif self.raw:
            raise DominoError("messages need the chat template, which --raw turns off.")
        if self.system is not None and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return text.encode_chat(self.tokenizer, messages, self.thinking, prompt.tools)


def parse_ids(text: str) -> list[int]:
    """ "1,2,3" as a list; raises ValueError."""
    if not re.fullmatch(r"\s*[0-9]+\s*(,\s*[0-9]+\s*)*", text):
        raise ValueError
    return [int(part) for part in text.split(",")]


def read_prompts(path: Path) -> list[Prompt]:
    """The rows of a JSON lines file.

    Raises:
        DominoError: it can't be read, or a row is not of the form that --prompts takes.
    """
    return [_parse_row(line.value, line.where) for line in read_jsonl(path, "prompts")]


def _parse_row(row: Any, where: str) -> Prompt:
    given = [key for key in KEYS if isinstance(row, dict) and row.get(key) is not None]
    if len(given) != 1:
        found = f"found {' and '.join(given)}" if given else "found none of them"
        raise DominoError(
            f'{where} must have one of "prompt" (text, or messages), "messages" or "conversations" (lists of objects) '
            f'and "input_ids" (integers); {found if isinstance(row, dict) else "found " + json_kind(row)}.'
        )
    limit = max_new_tokens(row, where)
    conversation = conversation_in_row(row, where)
    try:
        if conversation is not None:
            return Prompt(messages=conversation[0], tools=conversation[1], max_new_tokens=limit, where=where)
        if given == ["prompt"]:
            return Prompt(valid_unicode(text_of(row, "prompt")), max_new_tokens=limit, where=where)
        return Prompt(ids=token_ids(row["input_ids"]), max_new_tokens=limit, where=where)
    except ValueError as error:
        raise DominoError(f"{where}: {error}.") from None
