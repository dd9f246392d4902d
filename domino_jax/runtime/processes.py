"""Several processes that run one model: `jax.distributed`, set up by flags, the environment or a TPU pod."""

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.interrupts import exit_on_sigterm

VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}

ENDED = "domino_jax/ended"  # the exit code of a process that ended early, for the others
LEFT = "domino_jax/left"  # by number, those that have heard of it and end
ENDED_EARLY = "another process of this run has ended early, so this one ends too."
LOST = "JAX has aborted, as it does when another process of this run has vanished: its own words are above."
WATCH_SECONDS, GRACE_SECONDS = 0.5, 2.0
HEARTBEAT_SECONDS = 100  # JAX's own default
FORGET = 64  # messages after which those that all have read are forgotten

_joined = _ending = False
_on_abort: Any = None  # kept, since C calls it


@dataclass(frozen=True)
class ProcessConfig:
    """This process's place among the others."""

    coordinator: str
    num_processes: int
    process_id: int


def resolve_processes(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> ProcessConfig | None:
    """The place of this process by the flags, or by the environment where a flag is None; None for a single process.

    Raises:
        DominoError: only some of the three are given, or one is out of range.
    """
    flags = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    given = {name: os.environ.get(VARIABLES[name]) if flag is None else str(flag) for name, flag in flags.items()}
    missing = [name for name, value in given.items() if not value]
    if len(missing) == len(given):
        return None
    if missing:
        words = " and ".join(f"--{name.replace('_', '-')} (or {VARIABLES[name]})" for name in missing)
        raise DominoError(f"several processes need {words} too.")
    try:
        hosts = ProcessConfig(
            str(given["coordinator"]), int(str(given["num_processes"])), int(str(given["process_id"]))
        )
    except ValueError as error:
        raise DominoError(f"--num-processes and --process-id are whole numbers: {error}.") from None
    if not 0 <= hosts.process_id < hosts.num_processes:
        raise DominoError(
            f"--process-id must be from 0 to {hosts.num_processes - 1} (of --num-processes), found {hosts.process_id}."
        )
    return hosts


def join_processes(hosts: ProcessConfig | None, saves: bool = False, heartbeat: int = HEARTBEAT_SECONDS) -> bool:
    """Join the other processes, before JAX looks for devices; returns whether this is the first one, which prints.

    Args:
        saves: SIGTERM is left to JAX, and all processes stop after the same step (`train.stopping`); else it ends this
            process, and so all.
        heartbeat: seconds after which a process that says nothing, because it was killed, say, ends all others.

    Raises:
        DominoError: the coordinator can't be reached.
    """
    pod = os.environ.get("TPU_WORKER_HOSTNAMES", "").count(",") > 0
    if hosts is None and not pod:
        return True
    # Libraries write to file descriptor 1, where --json promises nothing but JSON. It becomes standard error's here,
    # and Python keeps a copy of the real one.
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    os.dup2(2, 1)
    import jax

    try:
        jax.distributed.initialize(
            hosts.coordinator if hosts else None,
            hosts.num_processes if hosts else None,
            hosts.process_id if hosts else None,
            heartbeat_timeout_seconds=heartbeat,
        )
    except (RuntimeError, ValueError) as error:
        raise DominoError(f"the other processes can't be reached: {first_line(error)}.") from None
    if not saves:  # JAX has taken it
        exit_on_sigterm()
    _end_on_abort()
    _watch_others()
    return jax.process_index() == 0


def _end_on_abort() -> None:
    """From now on SIGABRT ends this process with a sentence and exit code 1.

    With it JAX ends a process when another one has vanished; its own callback for that can't be one of Python's (it
    fails on what it is called with), nor can a handler of Python's, which runs after a signal and not within it.
    """
    global _on_abort

    def end(_: int) -> None:
        with suppress(OSError):
            os.write(2, f"error: {LOST}\n".encode())
        os._exit(1)

    with suppress(OSError, AttributeError, TypeError):  # not POSIX
        _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
        ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)


def _store() -> Any:
    """What JAX's processes know in common: short texts by name."""
    from jax._src.distributed import global_state

    return global_state.client


def _watch_others() -> None:
    """End this process soon after another one has ended early: it may be waiting for that one for ever."""
    global _joined
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(WATCH_SECONDS):
            code = code_of_others(0)
            if code is None or stop.wait(GRACE_SECONDS) or _ending:  # by itself, with a sentence of its own
                continue
            with suppress(OSError, ValueError):
                print(f"error: {ENDED_EARLY}", file=sys.stderr, flush=True)
            end_others(code)
            os._exit(code)

    thread = threading.Thread(target=watch, name="watching other processes", daemon=True)
    thread.start()

    def end() -> None:
        stop.set()
        thread.join()

    atexit.register(end)
    _joined = True


def among_others() -> bool:
    """Whether this process has joined others."""
    return _joined


def code_of_others(seconds: float = GRACE_SECONDS) -> int | None:
    """The exit code of another process that has ended early; None where none has within these seconds."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(Exception):  # nobody has ended, or the first process is gone
            return int(_store().key_value_try_get(ENDED))
        if time.monotonic() >= deadline:
            return None
        time.sleep(WATCH_SECONDS / 2)


def end_others(code: int) -> None:
    """Tell the other processes of this run, if there are any, that this one ends early with that code."""
    global _ending
    if not _joined:
        return
    _ending = True
    import jax

    with suppress(Exception, KeyboardInterrupt):  # another one has told them already, or the first one is gone
        _store().key_value_set(ENDED, str(code))
    with suppress(Exception, KeyboardInterrupt):
        _store().key_value_set(f"{LEFT}/{jax.process_index()}", "")
        deadline = time.monotonic() + 2 * GRACE_SECONDS
        while jax.process_index() == 0 and time.monotonic() < deadline:  # it keeps what the others ask for
            if len(_store().key_value_dir_get(LEFT)) == jax.process_count():
                return
            time.sleep(WATCH_SECONDS / 2)


def publish(name: str, text: str) -> None:
    """Let all processes know a text of this one under a name; another one of it takes its place."""
    import jax

    _store().key_value_set(f"domino_jax/{name}/{jax.process_index()}", text, allow_overwrite=True)


def read_published(name: str) -> list[str]:
    """The texts of all processes that have one under a name."""
    return [text for _, text in _store().key_value_dir_get(f"domino_jax/{name}")]


class Messages:
    """Texts of the first process, which every other one reads in their order."""

    def __init__(self, name: str):
        """Args: name: the same in all processes, and used once."""
        self._name, self._count = name, 0
        self._forgotten = 0

    def send(self, text: str) -> None:
        """Send one: the first process alone does."""
        import jax

        _store().key_value_set(self._key(self._count), text)
        self._count += 1
        if self._count % FORGET == 0:
            read = list(map(int, read_published(f"{self._name}/read")))
            if len(read) >= max(1, jax.process_count() - 1):
                for number in range(self._forgotten, min(read)):
                    _store().key_value_delete(self._key(number))
                self._forgotten = min(read)

    def receive(self, seconds: float) -> str | None:
        """The next one; None where none comes within so many seconds."""
        try:
            text = _store().blocking_key_value_get(self._key(self._count), int(seconds * 1000))
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            return None
        self._count += 1
        if self._count % FORGET == 0:
            publish(f"{self._name}/read", str(self._count))
        return text

    def _key(self, number: int) -> str:
        return f"domino_jax/{self._name}/{number}"


def wait_for_others(name: str) -> None:
    """Go on when all processes are here.

    Args:
        name: of this place, the same in all of them.
    """
    import jax

    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(name)


def broadcast_from_first(numbers: list[float]) -> list[float]:
    """The first process's numbers, in all processes, so that all decide alike: else they would wait for each other."""
    import jax

    if jax.process_count() == 1:
        return numbers
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return [float(x) for x in broadcast_one_to_all(np.array(numbers, np.float32))]


def max_over_processes(numbers: list[float]) -> list[float]:
    """The largest value of each number over the processes, all of which must call this."""
    import jax

    if jax.process_count() == 1:
        return numbers
    from jax.experimental.multihost_utils import process_allgather

    return [float(x) for x in np.max(process_allgather(np.array(numbers, np.float32)), axis=0)]
