"""From token ids to text while they come: whole characters, stop strings. Encoding is convert.tokenizer's."""

from collections.abc import Sequence
from typing import Any

from convert.tokenizer import RefusedByTemplate, decode, encode, encode_chat, render
from domino_jax.errors import DominoError

__all__ = ["Detokenizer", "TextStream", "encode", "encode_chat", "knows_thinking"]

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of the first bytes of a character


def knows_thinking(tokenizer: Any) -> bool:
    """Whether the model's template does anything with `enable_thinking`.

    Raises:
        DominoError: there is no template, or it refuses even a greeting.
    """
    greeting = [{"role": "user", "content": "Hello"}]
    try:
        return render(tokenizer, greeting, thinking=True) != render(tokenizer, greeting)
    except RefusedByTemplate as error:
        raise DominoError(f"the model's chat template refuses a greeting: {error.why}.") from None


class Detokenizer:
    """Text of tokens as they come, in whole characters.

    Only a window of recent tokens is decoded: `tokens[start:]`, of which `tokens[start:given]` have
    been given out. They stay in the window because some tokenizers drop a leading space.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.start = self.given = 0

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` add, nothing yet where it ends within a character."""
        self.tokens += tokens
        return self._advance(hold=True)

    def finish(self) -> str:
        """What was held back: the bytes of a character that never became whole."""
        return self._advance(hold=False)

    def _advance(self, hold: bool) -> str:
        window = decode(self.tokenizer, self.tokens[self.start :])
        if hold and window.endswith(INCOMPLETE):
            return ""
        new = window[len(decode(self.tokenizer, self.tokens[self.start : self.given])) :]
        self.start, self.given = self.given, len(self.tokens)
        return new


class TextStream:
    """Growing text of one sequence, cut before its first stop string.

    A stop string that is a special token is no text: it stops where the token comes.

    `text` only ever grows by what is certain: whole characters, and nothing that may still turn out to
    be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.detokenizer = Detokenizer(tokenizer)
        special = [stop for stop in stops if stop in tokenizer.all_special_tokens]
        self.stop_ids = set(tokenizer.convert_tokens_to_ids(special))
        self.stops = tuple(stops)
        self.text = ""
        self.held = ""
        self.stopped = False

    def feed(self, tokens: Sequence[int]) -> int:
        """Take tokens, and return how many count: all, or those up to a stop string's last."""
        if not self.stops:
            self.text += self.detokenizer.feed(tokens)
            return len(tokens)
        for used, token in enumerate(tokens, 1):
            if token in self.stop_ids:
                self.finish()
                self.stopped = True
                return used
            self._take(self.detokenizer.feed([token]))
            if self.stopped:
                return used
        return len(tokens)

    def finish(self) -> None:
        """Release what was held back: the sequence is at its end."""
        if not self.stopped:
            self._take(self.detokenizer.finish())
        if not self.stopped:
            self.text += self.held
        self.held = ""

    def _take(self, new: str) -> None:
        self.held += new
        found = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.text += self.held[: min(found)]
            self.held, self.stopped = "", True
            return
        certain = len(self.held) - max((_overlap(self.held, stop) for stop in self.stops), default=0)
        self.text += self.held[:certain]
        self.held = self.held[certain:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
