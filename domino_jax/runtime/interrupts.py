"""Ctrl-C and SIGTERM while a command runs: they become exceptions in our own code, and not within JAX's.

Python raises wherever it happens to be. In a finalizer the exception is lost; in a callback of JAX's C++ it may abort
the process. So a signal that comes there waits: for the end of our call of JAX, or for a moment. A process that imports
us keeps its own ways: only commands do this (`domino_jax.runtime.command.exit_code`).
"""

import inspect
import os
import select
import signal
import socket
import sys
import threading
import time
from _thread import interrupt_main
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

CALLED_BY_NATIVE_CODE = ("jax", "jaxlib", "flax", "importlib", "_frozen_importlib")  # packages
CALLED_ANYWHERE = ("__del__", "__eq__", "__hash__")  # by the garbage collector, or by JAX's caches
RETRY_SECONDS = 0.05
HINT_SECONDS, AGAIN_SECONDS, TERMINATE_SECONDS = 2.0, 1.0, 10.0

_answered = float("-inf")  # when a signal was last raised, or noted by who stops by himself
_at_return: int | None = None  # the signal that is raised when a call of JAX returns
_retries = 0  # signals that are not the user's
_watched: socket.socket | None = None  # where signals are written for the thread that watches


@contextmanager
def careful_interrupts() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt in a safe place; where none is reached, a second one ends the process.

    Nothing changes where Ctrl-C is ignored, as in a shell's background job, or has a handler of the user's own.
    """
    main = threading.main_thread()
    ours = threading.current_thread() is main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    usual, wakeup = sys.unraisablehook, -1

    def hook(unraisable: Any) -> None:
        """An interrupt that is lost all the same, in a generator that is collected, say, comes again."""
        if threading.current_thread() is main and issubclass(unraisable.exc_type, KeyboardInterrupt | SystemExit):
            _retry(signal.SIGINT if issubclass(unraisable.exc_type, KeyboardInterrupt) else signal.SIGTERM)
        else:
            usual(unraisable)

    sys.unraisablehook = hook
    if ours:
        signal.signal(signal.SIGINT, _handle)
        wakeup = signal.set_wakeup_fd(_watch_signals(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        sys.unraisablehook = usual
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.set_wakeup_fd(wakeup)


def exit_on_sigterm() -> None:
    """From now on SIGTERM raises SystemExit(143) in a safe place, and ends the process where none is reached."""
    signal.signal(signal.SIGTERM, _handle)


def note_signal() -> None:
    """Say that a signal was heard, by a handler that does not raise: the work stops by itself."""
    global _answered
    _answered = time.monotonic()


def _handle(number: int, frame: FrameType | None) -> None:
    if not _may_raise(frame):
        _retry(number)
    elif (called := _call_of_jax(frame)) is None:
        _raise(number)
    else:
        _raise_at_return(number, called)


def _raise(number: int) -> NoReturn:
    note_signal()
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _retry(number: int) -> None:
    """Send the signal once more, soon: an exception of here and now would be lost, or do harm."""

    lost = time.monotonic()

    def again() -> None:
        global _retries
        if signal.getsignal(number) is _handle and _answered < lost:
            _retries += 1
            if hasattr(signal, "pthread_kill"):
                signal.pthread_kill(threading.main_thread().ident or 0, number)  # it ends a wait, too
            else:
                interrupt_main(signal.Signals(number))

    timer = threading.Timer(RETRY_SECONDS, again)
    timer.daemon = True
    timer.start()


def _may_raise(frame: FrameType | None) -> bool:
    """Whether an exception that begins here would reach the command: not from a finalizer, nor from within a cache."""
    while frame is not None:
        # This module's own functions run in handlers and hooks.
        if frame.f_code.co_name in CALLED_ANYWHERE or frame.f_globals.get("__name__") in ("weakref", __name__):
            return False
        frame = frame.f_back
    return True


def _call_of_jax(frame: FrameType | None) -> FrameType | None:
    """The outermost frame of the call of JAX that is running; None where the innermost code is not JAX's."""
    called = None
    while frame is not None:
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package in CALLED_BY_NATIVE_CODE:
            called = frame
        elif package not in sys.stdlib_module_names:
            break
        frame = frame.f_back
    return called


def _raise_at_return(number: int, called: FrameType) -> None:
    """Let a call go on to its end, and raise then, as if it had."""
    if called.f_code.co_flags & inspect.CO_GENERATOR:  # it may return in its middle, with things to do later
        _retry(number)
        return
    global _at_return
    waits, _at_return = _at_return is not None, number
    if waits:  # a second signal within the same call
        return
    before = sys.gettrace()  # a debugger's, say

    def trace(_: FrameType, event: str, __: Any) -> Any:
        global _at_return
        if event == "return" and _at_return is not None:
            sys.settrace(before)
            number, _at_return = _at_return, None
            _raise(number)
        return trace

    called.f_trace, called.f_trace_lines = trace, False
    sys.settrace(lambda *_: None)


def _watch_signals() -> int:
    """The file descriptor to which Python is to write signals as they come, whatever the main thread is doing."""
    global _watched
    if _watched is None:
        reader, _watched = socket.socketpair()
        _watched.setblocking(False)
        threading.Thread(target=_watch, args=(reader,), name="watching signals", daemon=True).start()
    return _watched.fileno()


def _watch(reader: socket.socket) -> None:
    """End the process where the main thread does not come back from a long compilation, or waits for ever."""
    global _retries
    unanswered: dict[int, float] = {}  # signals, and when they came
    told = False
    while True:
        ready, _, _ = select.select([reader], [], [], 0.2 if unanswered else None)
        now = time.monotonic()
        # The main thread may have raised just before this one woke.
        unanswered = {number: came for number, came in unanswered.items() if _answered < came - AGAIN_SECONDS}
        told = told and bool(unanswered)
        for number in reader.recv(64) if ready else ():
            if _retries:
                _retries -= 1
            elif signal.getsignal(number) is _handle and now - unanswered.setdefault(number, now) > AGAIN_SECONDS:
                _end_at_once(128 + number)
        for number, came in unanswered.items():
            if number == signal.SIGTERM and now - came > TERMINATE_SECONDS:
                _end_at_once(128 + number)
            if number == signal.SIGINT and now - came > HINT_SECONDS and not told:
                told = True
                with suppress(OSError, ValueError):
                    print("stopping as soon as JAX returns; Ctrl-C again ends at once", file=sys.stderr, flush=True)


def _end_at_once(code: int) -> NoReturn:
    processes = sys.modules.get("domino_jax.runtime.processes")
    if processes is not None:
        processes.end_others(code)
    os._exit(code)
