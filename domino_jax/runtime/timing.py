"""Where a process's time goes: phases, with what JAX compiles meanwhile told apart."""

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

PHASES: tuple[str, ...] = ("compile", "prefill", "decode")


class _Spans(threading.local):
    """Disjoint times at which JAX traced, lowered or compiled in this thread."""

    def __init__(self):
        self.spans: list[tuple[float, float]] = []


_of_thread = _Spans()


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    if event.startswith("/jax/core/compile/"):
        spans, end = _of_thread.spans, time.perf_counter()
        begin = end - duration_secs
        while spans and spans[-1][1] > begin:  # tracing one function traces those it calls
            spans.pop()
        spans.append((begin, end))


jax.monitoring.register_event_duration_secs_listener(_listen)


def compile_seconds() -> float:
    """Time this thread has spent on tracing, lowering and compiling."""
    return sum(end - begin for begin, end in _of_thread.spans)


def no_seconds() -> dict[str, float]:
    """No time in any phase."""
    return dict.fromkeys(PHASES, 0.0)


@contextmanager
def timed(phase: str, clocks: Iterable[dict[str, float]]) -> Iterator[None]:
    """Add the time of the block to a phase of each clock, except what of it was compilation."""
    began, compiled = time.perf_counter(), compile_seconds()
    try:
        yield
    finally:
        compiled = compile_seconds() - compiled
        spent = time.perf_counter() - began - compiled
        for seconds in clocks:
            seconds["compile"] += compiled
            seconds[phase] += spent
