"""Programs compiled beside decoding, so that no request waits for a program that another can stand in for."""

import os
import sys
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from jax.stages import Compiled, Lowered


class BackgroundCompiler:
    """The programs that can be called without a wait: those that have run, and those compiled by a thread of its own.

    Calls come from one thread. A program that does not compile is never ready.

    Args:
        context: what programs are traced in: a mesh, say. A thread does not have that of another.
    """

    def __init__(self, context: Callable[[], AbstractContextManager[Any]] = nullcontext):
        self._context = context
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
        with self._context():
            return lower().compile()

    def close(self) -> None:
        """Compile nothing more; what is being compiled is waited for."""
        self._thread.shutdown(cancel_futures=True)


def _yield_to_others() -> None:
    """Give this thread, which traces, the lowest priority where a thread has one. XLA compiles in its own threads."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
