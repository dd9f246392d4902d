"""Which of the questions that a model asked itself are worth an answer."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from convert.tokenizer import THOUGHTS_START

GRAM = 4  # words that are looked for again in the same text
MIN_DISTINCT = 0.7  # share of a text's runs of so many words that must differ; less is a loop
BEGINNING = 6  # words of a text's beginning that few questions may share


@dataclass(frozen=True)
class Rules:
    """What a question must be."""

    min_tokens: int
    min_ascii: float  # share of its characters
    most_alike: int  # questions with one beginning


class Selection:
    """Takes questions one after another; what is taken depends on those before it."""

    def __init__(self, rules: Rules):
        self.rules = rules
        self.taken: set[str] = set()
        self.beginnings: dict[str, int] = {}

    def refusal(self, text: str, tokens: int, whole: bool, special: bool) -> str | None:
        """Why a question is left out, in words that follow "they"; None where it is taken.

        Args:
            tokens: its number of them.
            whole: it came to its end.
            special: it has tokens in it that belong to templates.
        """
        if not whole:
            return "have no end"
        if special or THOUGHTS_START in text:
            return "have special tokens in them"
        if tokens < self.rules.min_tokens or not text.strip():
            return "are short"
        if sum(map(str.isascii, text)) < self.rules.min_ascii * len(text):
            return "are of other scripts"
        words = text.split()
        runs = [tuple(words[at : at + GRAM]) for at in range(len(words) - GRAM + 1)]
        if len(set(runs)) < MIN_DISTINCT * len(runs):
            return "repeat themselves"
        plain = normalized(text)
        beginning = " ".join(plain.split()[:BEGINNING])
        if plain in self.taken:
            return "came before"
        if self.beginnings.get(beginning, 0) >= self.rules.most_alike:
            return "begin as many others do"
        self.taken.add(plain)
        self.beginnings[beginning] = self.beginnings.get(beginning, 0) + 1
        return None


def normalized(text: str) -> str:
    """A text without case, spaces and signs: two that are the same so are one question."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def is_held_out(text: str, share: float) -> bool:
    """Whether a question belongs to the held-out ones: a share of all, by the text alone."""
    digest = hashlib.sha256(normalized(text).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def header_of(rendered: str, mark: str) -> tuple[str, str]:
    """What a template writes before a user's text and after it.

    Raises:
        ValueError: it does not write the text once.
    """
    before, found, after = rendered.partition(mark)
    if not found or mark in after:
        raise ValueError("the chat template does not write a user's text once")
    return before, after


def ending(after: Sequence[int], special: Sequence[int]) -> int | None:
    """The token that ends a user's turn: the first after it, if that is a special one."""
    return after[0] if after and after[0] in special else None
