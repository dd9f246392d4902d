"""Programs compiled beside decoding, so that no request waits for a program that another can stand in for."""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from jax.stages import Compiled, Lowered

IDLE = 1.0  # seconds without decoding after which nobody is slowed


class BackgroundCompiler:
    """The programs that can be called without a wait: those that have run, and those compiled by a thread of its own.

    Calls come from one thread. A program that does not compile is never ready.

    Args:
        context: what programs are traced in: a mesh, say. A thread does not have that of another.
        share: of the time that it compiles while others decode. Where both need the same processors, compiling slows
            decoding; a program that took a second to compile is then followed by a rest of 1 / share - 1 seconds.
    """

    def __init__(self, context: Callable[[], AbstractContextManager[Any]] = nullcontext, share: float = 1.0):
        self._context, self._share = context, share
        self._rested = self._decoded = -math.inf  # seconds of `time.monotonic`
        self._closed = threading.Event()
        self._known: set[Hashable] = set()
        self._compiled: dict[Hashable, Future[Compiled]] = {}
        self._thread = ThreadPoolExecutor(1, "compile", _yield_to_others)

    def ready(self, key: Hashable, describe: Callable[[], Callable[[], Lowered]]) -> bool:
        """Whether a program can be called at once; if not it is compiled meanwhile.

        Args:
            describe: called where it has to be compiled; gives what traces it in the other thread.
        """
        if key in self._known:
            return True
        if key not in self._compiled:
            self._compiled[key] = self._thread.submit(self._compile, describe())
        return self._finished(key) is not None

    def get(self, key: Hashable) -> Callable[..., Any] | None:
        """What `ready` has compiled, called without static arguments; None where nothing was, which is noted as run."""
        finished = self._finished(key)
        if finished is None:
            self._known.add(key)
        return finished

    def _finished(self, key: Hashable) -> Compiled | None:
        compiled = self._compiled.get(key)
        return compiled.result() if compiled and compiled.done() and compiled.exception() is None else None

    def _compile(self, lower: Callable[[], Lowered]) -> Compiled:
        while time.monotonic() < self._rested and time.monotonic() < self._decoded + IDLE:
            if self._closed.wait(IDLE / 4):
                raise CancelledError
        began = time.monotonic()
        with self._context():
            compiled = lower().compile()
        now = time.monotonic()
        self._rested = now + (now - began) * (1 / self._share - 1)
        return compiled

    def decoded(self) -> None:
        """Something has been decoded; rests end early where nothing is for a second."""
        self._decoded = time.monotonic()

    def close(self) -> None:
        """Compile nothing more; what is being compiled is waited for."""
        self._closed.set()
        self._thread.shutdown(cancel_futures=True)


def _yield_to_others() -> None:
    """Give this thread, which traces, the lowest priority where a thread has one. XLA compiles in its own threads."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
