"""Prompts: from a file, the command line or Python, and the token ids that the model is given for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.messages import Message
from convert.tokenizer import has_template
from domino_jax.errors import DominoError
from domino_jax.runtime.files import read_jsonl
from infer.rows import max_new_tokens, messages_of_row


@dataclass(frozen=True)
class Prompt:
    """One thing to generate from: text, messages or ids, exactly one of them."""

    text: str | None = None
    messages: list[Message] | None = None
    ids: list[int] | None = None
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
        return text.encode_chat(self.tokenizer, messages, self.thinking)


def parse_ids(text: str) -> list[int]:
    """ "1,2,3" as a list; raises ValueError."""
    return [int(part) for part in text.split(",")]


def read_prompts(path: Path) -> list[Prompt]:
    """The rows of a JSON lines file.

    Raises:
        DominoError: it can't be read, or a row is not of the form that --prompts takes.
    """
    return [_parse_row(line.value, line.where) for line in read_jsonl(path, "prompts")]


def _parse_row(row: Any, where: str) -> Prompt:
    kinds = {
        "prompt": lambda v: isinstance(v, str),
        "messages": lambda v: isinstance(v, list) and bool(v) and all(isinstance(m, dict) for m in v),
        "input_ids": lambda v: isinstance(v, list) and all(type(i) is int for i in v),
    }
    given = [key for key in kinds if isinstance(row, dict) and key in row]
    if len(given) != 1 or not kinds[given[0]](row[given[0]]):
        raise DominoError(
            f'{where} must have one of "prompt" (a string), "messages" (a list of objects) and "input_ids" (integers).'
        )
    limit = max_new_tokens(row, where)
    messages = messages_of_row(row, where) if "messages" in row else None
    return Prompt(row.get("prompt"), messages, row.get("input_ids"), limit, where)
