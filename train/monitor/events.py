"""TensorBoard events of a run: what metrics.jsonl holds, step by step."""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Keys of a row -> the names under which TensorBoard groups them; others keep their own.
TAGS = {
    "loss": "loss/weighted",
    "final_loss": "loss/final",
    "base_loss": "loss/base",
    "final_acceptance": "acceptance/final_estimated",
    "base_acceptance": "acceptance/base_estimated",
    "validation_tau": "acceptance/final_true",
    "validation_tau_base": "acceptance/base_true",
    "validation_estimated": "acceptance/validation_estimated",
    "final_accuracy": "accuracy/final",
    "base_accuracy": "accuracy/base",
    "final_accuracy_by_position": "accuracy_final_by_proposal",
    "base_accuracy_by_position": "accuracy_base_by_proposal",
    "lambda": "schedule/lambda",
    "lr": "schedule/learning_rate",
    "gradient_norm": "optimizer/gradient_norm",
    "tokens_per_second": "speed/tokens_per_second",
}


class Events:
    """A writer of event files into a folder; without tensorboardX, or on a disk that is full, a note and no more."""

    def __init__(self, folder: Path, done: int, note: Callable[[str], None]):
        """
        Args:
            folder: for the event files; may hold those of earlier parts of the run.
            done: the step that the run goes on from; what was written for later ones is no longer shown.
            note: is told, once, why there are no events.
        """
        self._note = note
        self._writer: Any = None
        try:
            # The package's own SummaryWriter writes in a thread, which a full disk ends without a word.
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2
        except ImportError:
            note('no TensorBoard events: tensorboardX is not installed (pip install "domino-jax[train]").')
            return
        events: Any = event_pb2  # their classes are made when they are imported
        summaries: Any = summary_pb2
        self._event, self._summary, self._value = events.Event, summaries.Summary, summaries.Summary.Value
        try:
            folder.mkdir(parents=True, exist_ok=True)
            earlier = len(list(folder.glob("*.tfevents.*")))
            # The number: two parts that begin within a second would have the same name.
            self._writer = EventsWriter(str(folder / "events"), f".{earlier}")
            if earlier:
                start = events.SessionLog(status=events.SessionLog.START)
                self._writer.write_event(self._event(wall_time=time.time(), step=done + 1, session_log=start))
            self._writer.flush()
        except OSError as error:
            self._stop(error)

    def write(self, row: Mapping[str, Any]) -> None:
        """The figures of one row of metrics, under its `step`; it is on disk when this returns."""
        if self._writer is None:
            return
        values = [self._value(tag=tag, simple_value=value) for tag, value in scalars(row)]
        event = self._event(wall_time=time.time(), step=row["step"], summary=self._summary(value=values))
        try:
            self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            self._stop(error)

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._stop(error)
        self._writer = None

    def _stop(self, error: OSError) -> None:
        self._writer = None
        self._note(f"no more TensorBoard events: {error}.")


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a row with their tags; of a list each, from 1."""
    for key, value in row.items():
        tag = TAGS.get(key, key)
        if isinstance(value, list | tuple):
            yield from ((f"{tag}/{number:02}", float(one)) for number, one in enumerate(value, 1) if one is not None)
        elif isinstance(value, int | float) and key != "step":
            yield tag, float(value)
