"""Stopping between the steps of a training run, or the dispatches of other long work."""

import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from domino_jax.runtime.interrupts import note_signal

_calls = itertools.count()  # of `agreed_stop`, by which JAX tells the processes' moments apart: never twice the same


@contextmanager
def stop_signals(several: bool = False) -> Iterator[threading.Event]:
    """Within the block, the first Ctrl-C or SIGTERM sets the event instead of breaking into a step.

    A step that is broken into has given its donated state away and not returned the next: nothing
    would be left to save. A second signal, of either kind, acts as usual.

    Args:
        several: this is one of several processes, which must stop after the same step. JAX agrees on it: its own
            handler takes SIGTERM as the notice (`reached_preemption_sync_point`), and Ctrl-C is passed on as one.
    """
    event = threading.Event()
    previous = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, _: Any) -> None:
        note_signal()
        event.set()
        restore()
        print("stopping after this step, and saving; once more to stop at once", file=sys.stderr)
        if several:
            signal.raise_signal(signal.SIGTERM)

    for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, note)
    try:
        yield event
    finally:
        restore()


def agreed_stop(event: threading.Event) -> Callable[[], bool]:
    """A function that says whether to stop, to be called equally often by all processes, which then agree.

    Where each has called it after every step, all stop after the same one, within a step or two of the signal.

    Args:
        event: of `stop_signals`.
    """
    import jax
    from jax.experimental.multihost_utils import reached_preemption_sync_point

    if jax.process_count() == 1:
        return event.is_set
    stopped = False

    def ask() -> bool:
        nonlocal stopped
        stopped = stopped or reached_preemption_sync_point(next(_calls))
        return stopped

    return ask
