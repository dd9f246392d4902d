"""What a run tells while it goes on: metrics.jsonl, TensorBoard events, the report with its curves, and progress."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from train.monitor import curves, report
from train.monitor.events import Events
from train.monitor.progress import Progress

METRICS, EVENTS = "metrics.jsonl", "tensorboard"


class Log(AbstractContextManager["Log"]):
    """One run's books, kept by its first process; what they hold of steps that are run again is dropped."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], steps: int, done: int, events: bool):
        """
        Args:
            folder: the run's.
            settings: for the report.
            steps: of the whole run.
            done: the step it goes on from.
            events: write those too.
        """
        self.folder, self.settings, self.steps = folder, settings, steps
        self.progress = Progress()
        self._path = folder / METRICS
        self.rows = curves.resume_metrics(self._path, done)
        self._events = Events(folder / EVENTS, done, self.progress.note) if events else None
        self.progress.start(steps, done)

    def add(self, row: Mapping[str, Any]) -> None:
        """One row of metrics, with its `step`.

        Raises:
            OSError: the disk is full.
        """
        self.rows.append(dict(row))
        curves.append_metrics(self.rows[-1], self._path)
        if self._events:
            self._events.write(row)
        self.progress.update(row)

    def report(self, state: str = "running") -> None:
        """Write the report anew; that it can't be written is said and stops nothing."""
        left = self.progress.seconds_left
        problem = report.write_report(self.folder, self.rows, self.settings, self.steps, state=state, seconds_left=left)
        if problem:
            self.progress.note(problem)

    def __exit__(self, *_: object) -> None:
        if self._events:
            self._events.close()
        self.progress.__exit__()
