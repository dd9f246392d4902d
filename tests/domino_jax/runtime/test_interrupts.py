"""Signals at any moment end a command with its exit code, once, and nothing else changes."""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from domino_jax.runtime import interrupts
from domino_jax.runtime.command import exit_code

ROOT = Path(__file__).parents[3]
# What runs between two dispatches: tracing, compilation, caches that compare and hash static arguments, finalizers,
# weak references, the garbage collector with JAX's callback, waits for a device.
SCRIPT = """
import gc, json, os, random, signal, sys, threading, time, weakref
from dataclasses import dataclass
import jax, jax.numpy as jnp
import numpy as np
from domino_jax.runtime.command import exit_code
from domino_jax.runtime.interrupts import exit_on_sigterm

@dataclass(frozen=True)
class Config:
    size: int
    name: str

class Slow:
    def __init__(self): self.me = self
    def __del__(self): sum(range(3000))

@jax.tree_util.register_pytree_node_class
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
    def tree_flatten(self): return (self.a, self.b), None
    @classmethod
    def tree_unflatten(cls, _, both): return cls(*both)

def lines():
    try:
        while True:
            yield 1
    finally:
        sum(range(3000))

def work():
    step = jax.jit(lambda config, x: Pair(x.a * config.size, jnp.sin(x.b)), static_argnums=0)
    x, config, n = Pair(jnp.ones(4), jnp.ones(4)), Config(1, "c"), 0
    while True:
        n += 1
        x = step(Config(1, "c"), x)
        np.asarray(x.b), float(x.a[0])
        things = [Slow() for _ in range(5)]
        refs = [weakref.ref(thing, lambda _: sum(range(2000))) for thing in things]
        next(lines())
        del things
        if n % 20 == 0:
            gc.collect()
        if n % 40 == 0:
            jax.jit(lambda y: y * n)(x.a)
        if n % 200 == 0:
            jax.clear_caches()

count, seed, number = sys.argv[1:]
count, number = int(count), int(number)
if number == signal.SIGTERM:
    exit_on_sigterm()
random.seed(int(seed))
found, slowest = {}, 0.0
for _ in range(count):
    sent = []
    def send():
        sent.append(time.monotonic())
        os.kill(os.getpid(), number)
    def action():
        threading.Timer(0.01 + random.random() * 0.15, send).start()
        work()
    code = exit_code(action)
    slowest = max(slowest, time.monotonic() - sent[0])
    found[code] = found.get(code, 0) + 1
print(json.dumps([found, slowest]))
"""


@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@pytest.mark.parametrize("count", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_a_signal_at_any_moment_ends_the_work_with_its_exit_code(number, count):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(count), str(count), str(int(number))],
        cwd=ROOT, capture_output=True, text=True, timeout=60 + count, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found, slowest = json.loads(done.stdout)
    assert found == {str(128 + number): count} and slowest < 20
    assert "Exception ignored" not in done.stderr and "Traceback" not in done.stderr


BLOCKED = """
import ctypes, sys
from domino_jax.runtime import interrupts
from domino_jax.runtime.command import end_process, exit_code
interrupts.TERMINATE_SECONDS = 1.0

def wait_in_native_code():  # as a long compilation, or a collective that another process never joins
    lock = ctypes.create_string_buffer(256)
    ctypes.CDLL(None).pthread_mutex_lock(lock)
    interrupts.exit_on_sigterm()
    print("ready", flush=True)
    ctypes.CDLL(None).pthread_mutex_lock(lock)

end_process(exit_code(wait_in_native_code))
"""


@pytest.mark.e2e
@pytest.mark.skipif(sys.platform != "linux", reason="locks a mutex of glibc twice")
@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_where_native_code_does_not_return_the_process_ends_all_the_same(number, times):
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", BLOCKED], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "ready\n"
        time.sleep(0.5)  # until it waits
        process.send_signal(number)
        if times == 2:
            assert process.stderr and process.stderr.readline() == (
                "stopping as soon as JAX returns; Ctrl-C again ends at once\n"
            )
            process.send_signal(number)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, said) == (128 + number, "")


def jax_like(name: str, line: str) -> Callable[[], None]:
    """A function of a package that native code calls, which runs a line."""
    module = ModuleType(name)
    exec(f"import signal\ndef called():\n    {line}\n    return 1\n", module.__dict__)
    return module.__dict__["called"]


class Unsafe:
    """Methods that run where an exception would be lost, or hurt."""

    def __init__(self, seen: list[str]):
        self.seen = seen

    def interrupt(self) -> None:
        signal.raise_signal(signal.SIGINT)
        self.seen.append("went on")

    def __del__(self) -> None:
        if sys._getframe(1).f_code.co_name == "finalizer":
            self.interrupt()

    def __hash__(self) -> int:
        self.interrupt()
        return 1

    def __eq__(self, other: object) -> bool:
        self.interrupt()
        return self is other


def finalizer(seen: list[str]) -> None:
    thing = Unsafe(seen)
    del thing


def hashing(seen: list[str]) -> None:
    hash(Unsafe(seen))


def comparing(seen: list[str]) -> None:
    [Unsafe(seen)].count(object())  # type: ignore[arg-type]


def reference(seen: list[str]) -> None:
    thing = ModuleType("thing")
    weakref.finalize(thing, lambda: (signal.raise_signal(signal.SIGINT), seen.append("went on")))
    del thing


def within(name: str) -> Callable[[list[str]], None]:
    def inside(seen: list[str]) -> None:
        jax_like(name, "signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)")()
        seen.append("within")

    return inside


def an_import(seen: list[str]) -> None:
    importlib._bootstrap._call_with_frames_removed(signal.raise_signal, signal.SIGINT)  # type: ignore[attr-defined]
    seen.append("within")


@pytest.mark.parametrize(
    ("place", "at_once"),
    [
        (finalizer, False),
        (hashing, False),
        (comparing, False),
        (reference, False),
        (within("jax._src.core"), True),
        (within("jaxlib.xla_client"), True),
        (within("flax.nnx.graph"), True),
        (an_import, True),
    ],
    ids=["__del__", "__hash__", "__eq__", "weakref", "jax", "jaxlib", "flax", "import"],
)
def test_an_interrupt_in_an_unsafe_place_is_raised_outside(place, at_once):
    """As if the call had raised it: what stands in `finally` and `with` around the call is done."""
    seen: list[str] = []

    def action() -> None:
        try:
            place(seen)
            seen.append("after the call")
            time.sleep(60)
        finally:
            seen.append("cleaned up")

    before, began = sys.gettrace(), time.monotonic()
    assert exit_code(action) == 130
    assert seen == (["cleaned up"] if at_once else ["went on", "after the call", "cleaned up"])
    assert sys.gettrace() is before and time.monotonic() - began < 10


WAITS = {"event": threading.Event().wait, "sleep": lambda: time.sleep(60), "input": lambda: input()}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_an_interrupt_ends_a_wait_at_once(wait, monkeypatch):
    reader, writer = os.pipe()
    with os.fdopen(reader) as nothing, os.fdopen(writer, "w"):
        monkeypatch.setattr(sys, "stdin", nothing)

        def interrupted() -> None:  # by then Ctrl-C is the command's, and not pytest's
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            wait()

        began = time.monotonic()
        assert exit_code(interrupted) == 130
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("own", [signal.SIG_IGN, signal.SIG_DFL, lambda *_: None])
def test_ctrl_c_stays_as_the_user_has_it(own):
    before = signal.signal(signal.SIGINT, own)
    try:
        found: list[object] = []
        exit_code(lambda: found.append(signal.getsignal(signal.SIGINT)))
        assert found == [own] and signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


def test_after_a_command_and_in_a_process_that_imports_us_ctrl_c_is_pythons():
    hook = sys.unraisablehook
    found: list[object] = []
    exit_code(lambda: found.append(signal.getsignal(signal.SIGINT)))
    assert found == [interrupts._handle]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and sys.unraisablehook is hook
    assert signal.set_wakeup_fd(-1) == -1


def test_an_interrupt_in_a_generator_that_is_collected_comes_again():
    def lines():
        try:
            yield 1
        finally:
            signal.raise_signal(signal.SIGINT)

    def action() -> None:
        next(lines())
        gc.collect()
        time.sleep(20)
        pytest.fail("the interrupt was lost")

    assert exit_code(action) == 130


def test_a_retry_that_comes_before_its_own_hook_has_ended_is_not_lost(monkeypatch):
    """On a machine so busy that the timer is faster than who set it."""
    start = threading.Timer.start

    def slow_start(timer: threading.Timer) -> None:
        monkeypatch.setattr(threading.Timer, "start", start)
        start(timer)
        time.sleep(0.3)

    monkeypatch.setattr(threading.Timer, "start", slow_start)
    monkeypatch.setattr(interrupts, "RETRY_SECONDS", 0.1)

    def action() -> None:
        thing = ModuleType("thing")
        kept = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
        del thing
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            time.sleep(0.5)
        pytest.fail(f"the interrupt was lost {kept}")

    assert exit_code(action) == 130
