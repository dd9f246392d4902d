"""What people see: warnings and notes on standard error, text and its drafts on standard output."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from infer.engine import Sequence

ACCEPTED, ADDED, REJECTED = "green", "yellow", "dim strike"

_speaks = True


def keep_silent() -> None:
    """Say nothing but errors from here on: of several processes, only the first speaks."""
    global _speaks
    _speaks = False


def say(line: str) -> None:
    """One line on standard error, if anybody reads it."""
    with suppress(OSError):
        if _speaks or line.startswith("error"):
            print(line, file=sys.stderr, flush=True)


class Output(Console):
    """Standard output: a broken pipe is an error like any other (rich would exit)."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Notes(Console):
    """Standard error: nothing depends on anybody reading it."""

    def on_broken_pipe(self) -> None:
        pass


def warn(warnings: Iterable[str], most: int = 3) -> None:
    """The first few warnings, and how many more there are."""
    for i, warning in enumerate(warnings := list(warnings)):
        if i == most:
            say(f"warning: … and {len(warnings) - most} more.")
            return
        say(f"warning: {warning}")


class Printer:
    """Prints a sequence's text as it grows."""

    def __init__(self, sequence: "Sequence", before: Callable[[], None] | None = None):
        """Args: before: called when there is text for the first time."""
        self.sequence = sequence
        self.before = before
        self.shown = 0

    def more(self) -> None:
        """Print what is new."""
        if self.before:
            self.before()
            self.before = None
        text = self.sequence.text or ""
        print(text[self.shown :], end="", flush=True)
        self.shown = len(text)

    def end(self) -> None:
        """Print the rest, and end the line."""
        self.more()
        if not (self.sequence.text or "").endswith("\n"):
            print(flush=True)


def histogram(accepted: list[int], proposals: int, width: int = 40) -> list[str]:
    """Lines with a bar for each number of accepted drafts from 0 to `proposals`."""
    counts = Counter(accepted)
    most = max(counts.values())
    return [
        f"{n:3} {'█' * round(width * counts[n] / most) or ('▏' if counts[n] else '')} {counts[n]}"
        for n in range(proposals + 1)
    ]


def show_drafts(console: Console, s: "Sequence", tokenizer: Any) -> None:
    """Print a sequence with each token's origin in its colour, and a legend.

    Text appears with the token that completes its characters. A text that a stop string cut is
    shown whole here, as drafted.
    """
    from rich.text import Text

    from convert.tokenizer import decode
    from infer.text import Detokenizer

    stream = Detokenizer(tokenizer) if tokenizer is not None else None
    out = Text()

    def kept(tokens: list[int], style: str) -> None:
        for token in tokens:
            out.append(stream.feed([token]) if stream else f"{token} ", style)

    kept(s.tokens[:1], ADDED)
    for cycle in s.cycles:
        kept(cycle.tokens[: cycle.accepted], ACCEPTED)
        rejected = cycle.drafts[cycle.accepted :]
        if rejected and len(cycle.tokens) > cycle.accepted:
            text = decode(tokenizer, rejected) if stream else " ".join(map(str, rejected))
            out.append(text.replace("\n", "⏎").replace("\r", "␍"), REJECTED)
            if not stream:
                out.append(" ")
        kept(cycle.tokens[cycle.accepted :], ADDED)
    kept(s.tokens[1 + sum(len(cycle.tokens) for cycle in s.cycles) :], ADDED)  # plain steps after them
    if stream:
        out.append(stream.finish(), ADDED)
    console.print(out)
    legend = Text("drafted and accepted", ACCEPTED) + Text(" · ") + Text("rejected", REJECTED)
    console.print(legend + Text(" · ") + Text("the target's own", ADDED))
