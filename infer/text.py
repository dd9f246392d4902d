"""From token ids to text while they come: whole characters, stop strings. Encoding is convert.tokenizer's."""

from collections.abc import Sequence
from typing import Any

from convert.tokenizer import RefusedByTemplate, decode, encode, encode_chat, render, special_tokens
from domino_jax.errors import DominoError

__all__ = ["Detokenizer", "TextStream", "encode", "encode_chat", "knows_thinking", "overlap", "unmatched_stops"]

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

    Special tokens are no text, but a stop string may be one or have some in it: it is looked for in the text with
    them. A stop string without them is looked for in what is given out.

    `text` only ever grows by what is certain: whole characters, and nothing that may still turn out to
    be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.detokenizer = Detokenizer(tokenizer)
        self.special = {number: content for content, number in special_tokens(tokenizer).items()} if stops else {}
        self.stops = tuple(stops)
        self.crossing = [stop for stop in stops if any(content in stop for content in self.special.values())]
        self.plain = [stop for stop in stops if stop not in self.crossing]
        self.text = ""
        self.held = ""
        self.shown: list[bool] = []  # of each character held back, whether it is text
        self.stopped = False

    def feed(self, tokens: Sequence[int]) -> int:
        """Take tokens, and return how many count: all, or those up to a stop string's last."""
        if not self.stops:
            self.text += self.detokenizer.feed(tokens)
            return len(tokens)
        for used, token in enumerate(tokens, 1):
            special = self.special.get(token, "")
            if special in self.stops:
                self.finish()
                self.stopped = True
                return used
            self._take(self.detokenizer.feed([token]), special)
            if self.stopped:
                return used
        return len(tokens)

    def flush(self) -> None:
        """Take the first bytes of a character that will not become whole."""
        if not self.stopped:
            self._take(self.detokenizer.finish())

    def finish(self) -> None:
        """Release what was held back: the sequence is at its end."""
        self.flush()
        if not self.stopped:
            self._give(len(self.held))

    def _take(self, new: str, special: str = "") -> None:
        self.held += new + special
        self.shown += [True] * len(new) + [False] * len(special)
        places = [place for place, shown in enumerate(self.shown) if shown]
        text = "".join(self.held[place] for place in places)
        found = [self.held.find(stop) for stop in self.crossing]
        found += [places[at] if (at := text.find(stop)) >= 0 else -1 for stop in self.plain]
        found = [at for at in found if at >= 0]
        if found:
            self._give(min(found))
            self.held, self.shown, self.stopped = "", [], True
            return
        begun = [len(self.held) - overlap(self.held, stop) for stop in self.crossing]
        begun += [places[-length] for stop in self.plain if (length := overlap(text, stop))]
        self._give(min(begun, default=len(self.held)))

    def _give(self, count: int) -> None:
        """Give out the first characters of what is held."""
        self.text += "".join(c for c, shown in zip(self.held[:count], self.shown, strict=False) if shown)
        self.held, self.shown = self.held[count:], self.shown[count:]


def unmatched_stops(tokenizer: Any, stops: Sequence[str], end_ids: Sequence[int] = ()) -> list[str]:
    """Warnings of stop strings that can't come.

    Args:
        end_ids: the tokens that end an answer anyway.
    """
    found = []
    ends = [content for content, number in special_tokens(tokenizer).items() if number in end_ids]
    for stop in stops:
        try:
            written = tokenizer.decode(encode(tokenizer, stop, special=False), clean_up_tokenization_spaces=False)
        except DominoError:
            found.append(f"the stop string {stop!r} can't come: it is not valid Unicode.")
            continue
        within = [end for end in ends if 0 <= stop.find(end) < len(stop) - len(end)]
        if within:
            found.append(f"the stop string {stop!r} can't come: {within[0]} in it ends the answer before.")
        elif written.strip() != stop.strip():
            found.append(f"the stop string {stop!r} may never come: the tokenizer writes it as {written!r}.")
    return found


def overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
