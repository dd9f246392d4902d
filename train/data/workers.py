"""Processes that tokenize: rendering a chat template is Python, so threads would wait for each other."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from domino_jax.errors import DominoError
from domino_jax.runtime.command import own_environment
from train.data.conversations import Template
from train.data.examples import Part, read_part

ALONE_SECONDS = 4.0  # of tokenizing, before workers are started: each takes seconds to import what it needs
MOST_WORKERS = 32
AHEAD = 3  # groups of rows that wait for a worker, for each of them

Rows = Sequence[tuple[str, Any]]


def tokenize(groups: Iterable[Rows], tokenizer: Any, vocab_size: int, length: int) -> Iterator[Part]:
    """What `read_part` makes of each group of rows, in order; in this process at first, then in one for each core.

    Raises:
        DominoError: as `read_part`, or a worker ended early.
    """
    template, spent = Template(tokenizer), 0.0
    waiting: deque[Future[Part]] = deque()
    workers: Workers | None = None
    count = min(_cores(), MOST_WORKERS)
    setup = None
    try:
        for rows in groups:
            if workers is None and spent > ALONE_SECONDS and count > 1 and any(map(_has_text, rows)):
                setup = setup or _pickled((tokenizer, vocab_size, length))
                if setup is None:
                    count = 1
                else:
                    workers = Workers(count, setup)
            if workers is None:
                began = time.monotonic()
                part = read_part(rows, template, vocab_size, length)
                spent += time.monotonic() - began
                yield part
                continue
            waiting.append(workers.submit(rows))
            while len(waiting) > AHEAD * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        if workers is not None:
            workers.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_text(row: tuple[str, Any]) -> bool:
    return isinstance(row[1], dict) and row[1].get("input_ids") is None


def _pickled(value: Any) -> bytes | None:
    try:
        return pickle.dumps(value)
    except Exception:  # of many kinds; a tokenizer that can't be sent stays here
        return None


class Workers:
    """Processes that each take a group of rows at a time.

    They are not multiprocessing's: those import the user's own script again, and forking is not safe beside JAX's
    threads.
    """

    def __init__(self, count: int, setup: bytes):
        environment = own_environment() | {"TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-P", "-c", "from train.data.workers import serve; serve()"]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            for _ in range(count)
        ]
        self._setup = setup
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._started: set[int] = set()
        self._threads = ThreadPoolExecutor(count, "tokenizing")

    def submit(self, rows: Rows) -> Future[Part]:
        """Give some rows to the next idle worker."""
        return self._threads.submit(self._ask, rows)

    def _ask(self, rows: Rows) -> Part:
        process = self._idle.get()
        assert process.stdin is not None and process.stdout is not None
        try:
            if process.pid not in self._started:
                self._started.add(process.pid)
                process.stdin.write(self._setup)
            pickle.dump(rows, process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise DominoError(
                f"a tokenizing process ended early ({error or type(error).__name__}); memory may be exhausted."
            ) from None
        finally:
            self._idle.put(process)  # one that has ended too: whoever takes it next fails, and does not wait for ever
        if isinstance(answer, str):
            raise DominoError(answer)
        return answer

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()


def serve() -> None:
    """What a worker runs: groups of rows from standard input, what they came to on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it decides what is done
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing that a library prints gets between the answers
    tokenizer, vocab_size, length = pickle.load(sys.stdin.buffer)
    template = Template(tokenizer)
    while True:
        try:
            rows = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Part | str = read_part(rows, template, vocab_size, length)
        except DominoError as error:
            answer = str(error)
        pickle.dump(answer, answers)
        answers.flush()
