"""How far a run is: a bar with figures at a terminal, a line now and then anywhere else."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

# Keys of a row -> how they are shown.
SHOWN = {
    "loss": "loss {:.3f}",
    "final_loss": "final {:.3f}",
    "base_loss": "base {:.3f}",
    "final_acceptance": "acceptance {:.2f}",
    "base_acceptance": "(base {:.2f})",
    "validation_tau": "true τ {:.2f}",
    "validation_tau_base": "(base {:.2f})",
    "lambda": "λ {:.2f}",
    "lr": "lr {:.1e}",
    "tokens_per_second": "{:,.0f} tokens/s",
}
SHORT = ("loss", "final_acceptance", "validation_tau", "tokens_per_second")  # what fits beside a bar


SECONDS = 10.0  # between two lines of `counting`


def counting(what: str, say: Callable[[str], None]) -> Callable[[int], None]:
    """A function to call with the count so far of what has no known end: a line now and then, none at first."""
    told = time.perf_counter()

    def count(so_far: int) -> None:
        nonlocal told
        if time.perf_counter() - told >= SECONDS:
            told = time.perf_counter()
            say(f"{so_far:,} {what}")

    return count


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:05:09."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def step_figures(row: Mapping[str, Any], keys: tuple[str, ...] = tuple(SHOWN)) -> str:
    """The figures of a row of metrics for people; what it lacks is left out."""
    shown = [SHOWN[key].format(row[key]) for key in keys if row.get(key) is not None]
    return "  ".join(shown).replace("  (base", " (base")


class Progress(AbstractContextManager["Progress"]):
    """A run's progress on standard output; time left is measured from the first `advance` on, which compiles."""

    def __init__(self, unit: str = "step", console: Console | None = None):
        """
        Args:
            unit: what is counted.
            console: standard output when None.
        """
        self.unit = unit
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._bars = Bars(
            TextColumn("{task.description}"),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bars.add_task(unit, total=0, figures="", start=False)
        self._total = self._done = 0
        self._first: tuple[int, float] | None = None  # what was done when the first step ended, and when that was
        self._shown = ""

    def start(self, total: int, done: int = 0) -> None:
        """Begin, or begin anew, with `done` of `total`."""
        self._total, self._done, self._first = total, done, None
        self._bars.reset(self._task, total=total, completed=done, figures="")
        self._bars.start()

    def advance(self, done: int) -> None:
        """So many are done; cheap enough for every step."""
        self._done = done
        if self._first is None:
            self._first = done, time.perf_counter()
        shown = "  ".join(filter(None, (self._shown, self._left())))
        self._bars.update(self._task, completed=done, figures=shown)

    def update(self, row: Mapping[str, Any]) -> None:
        """A row of metrics, with its `step`: beside the bar, or as a line."""
        self._shown = step_figures(row, SHORT)
        self.advance(int(row["step"]))
        if not self.console.is_terminal:
            parts = (f"{self.unit} {self._done}/{self._total}", step_figures(row), self._left())
            self.note("  ".join(filter(None, parts)))

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        self.console.print(text, markup=False)
        self.console.file.flush()

    @property
    def seconds_left(self) -> float | None:
        """At the pace so far; None before a second step was timed."""
        if self._first is None or self._done <= self._first[0]:
            return None
        pace = (time.perf_counter() - self._first[1]) / (self._done - self._first[0])
        return pace * (self._total - self._done)

    def _left(self) -> str:
        left = self.seconds_left
        return "" if left is None else f"{clock(left)} left"

    def __exit__(self, *_: object) -> None:
        self._bars.stop()
