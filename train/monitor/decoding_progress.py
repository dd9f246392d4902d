"""How decoding many prompts is going: a bar at a terminal, elsewhere a line now and then."""

import sys
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from domino_jax.runtime.slots import Completion
from train.monitor.progress import clock

EVERY = 30.0  # seconds between two lines


class DecodingProgress:
    """Counts answers, tokens and accepted drafts, and shows them on standard error."""

    def __init__(self, what: str, total: int, drafting: bool = False, quiet: bool = False):
        """Args: quiet: count, and show nothing."""
        self.what, self.total, self.drafting = what, total, drafting
        self.answers = self.tokens = self.cycles = self.accepted = 0
        self._known: dict[Completion, tuple[int, int]] = {}  # tokens and cycles that were counted
        self._began = self._said = time.perf_counter()
        console = Console(stderr=True)
        self._lines, self._quiet = not console.is_terminal, quiet
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=self._lines or quiet,
        )
        self._task = self._bar.add_task(what, total=total, rate="")

    @property
    def tau(self) -> float | None:
        """The mean acceptance length so far; None without cycles."""
        return self.accepted / self.cycles + 1 if self.cycles else None

    def decoded(self, tokens: int, accepted: list[int]) -> None:
        """A dispatch gave so many tokens, and accepted so many drafts in its cycles."""
        self.tokens += tokens
        if self.drafting:
            self.cycles += len(accepted)
            self.accepted += sum(accepted)
        self._show()

    def stepped(self, changed: Iterable[Completion]) -> None:
        """A step gave tokens to these requests."""
        tokens, accepted = 0, []
        for c in changed:
            before = self._known.pop(c, (0, 0))
            tokens += len(c.tokens) - before[0]
            accepted += [cycle.accepted for cycle in c.cycles[before[1] :]]
            if c.finish_reason is None:
                self._known[c] = len(c.tokens), len(c.cycles)
        self.decoded(tokens, accepted)

    def done(self) -> None:
        """An answer was written."""
        self.answers += 1
        self._show()

    def fewer(self, count: int) -> None:
        """So many answers of the total won't come."""
        self.total -= count
        self._show()

    def _rate(self) -> str:
        seconds = time.perf_counter() - self._began
        parts = [f"{self.tokens / seconds:,.0f} tokens/s"]
        if self.tau is not None:
            parts.append(f"τ {self.tau:.2f}")
        return "  ".join(parts)

    def _left(self) -> str:
        if not self.answers or self.answers >= self.total:
            return ""
        left = (time.perf_counter() - self._began) / self.answers * (self.total - self.answers)
        return f"  {clock(left)} left"

    def _show(self) -> None:
        if self._quiet:
            return
        if not self._lines:
            rate = self._rate() + self._left()
            self._bar.update(self._task, completed=self.answers, total=self.total, rate=rate)
        elif time.perf_counter() - self._said >= EVERY:
            self._said = time.perf_counter()
            print(f"{self.answers}/{self.total} {self.what}  {self._rate()}{self._left()}", file=sys.stderr, flush=True)

    def summary(self) -> str:
        """What this run did, in words that follow a sentence's beginning."""
        tau = "" if self.tau is None else f", τ {self.tau:.2f}"
        seconds = time.perf_counter() - self._began
        return f" ({self.answers} now: {self.tokens} tokens in {seconds:,.0f} s{tau})"

    def __enter__(self) -> "DecodingProgress":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._bar.stop()
