"""Programs compiled beside decoding: what runs meanwhile gives the same answers, and no dispatch waits."""

import threading
import time
from dataclasses import replace
from typing import Any

import factory
import jax
import jax.numpy as jnp
import pytest
from factory import BYTE_TARGET, Pair

from domino_jax import sharding
from domino_jax.drafters.block import BlockDrafter
from domino_jax.runtime import background
from domino_jax.runtime.background import BackgroundCompiler
from domino_jax.runtime.slots import Completion, FixedDrafts, Request, Slots
from domino_jax.runtime.timing import compile_seconds
from domino_jax.sampling import SamplingParams
from domino_jax.weights import Params

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def pair() -> Pair:
    target = replace(BYTE_TARGET, tie_word_embeddings=False)
    return factory.good_pair(target, 3, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)


class Held:
    """What `lower` gives, which compiles once it is let go; `error` is raised then."""

    def __init__(self, lowered: Any, error: Exception | None = None):
        self.lowered, self.error, self.go = lowered, error, threading.Event()

    def compile(self) -> Any:
        assert self.go.wait(60)
        if self.error:
            raise self.error
        return self.lowered.compile()


def until(true: Any) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_program_is_ready_once_it_is_compiled_or_has_run():
    compiler, traced = BackgroundCompiler(), []
    held = Held(jax.jit(lambda x: x + 1).lower(jnp.zeros(3)))

    def lower() -> Any:
        traced.append(1)
        return lambda: held

    assert not compiler.ready("a", lower) and not compiler.ready("a", lower) and traced == [1]
    assert compiler.get("b") is None and compiler.ready("b", lower), "it has run"
    held.go.set()
    until(lambda: compiler.ready("a", lower))
    call = compiler.get("a")
    assert call is not None and call(jnp.ones(3)).tolist() == [2, 2, 2] and traced == [1]
    compiler.close()


def test_a_program_that_does_not_compile_is_never_ready():
    compiler, held = BackgroundCompiler(), Held(None, RuntimeError("too little memory"))
    held.go.set()
    assert not compiler.ready("a", lambda: lambda: held)  # type: ignore[arg-type]
    compiler.close()
    assert not compiler.ready("a", lambda: lambda: held)  # type: ignore[arg-type]
    assert compiler.get("a") is None, "it is run as any other"


def test_compiling_rests_while_others_decode_on_the_same_cores(monkeypatch):
    monkeypatch.setattr(background, "IDLE", 0.2)
    compiler, lowered = BackgroundCompiler(share=1e-9), jax.jit(lambda x: x + 2).lower(jnp.zeros(3))
    compiler.decoded()
    until(lambda: compiler.ready("first", lambda: lambda: lowered))  # no rest before it
    for _ in range(10):
        compiler.decoded()
        assert not compiler.ready("second", lambda: lambda: lowered)
        time.sleep(0.05)
    until(lambda: compiler.ready("second", lambda: lambda: lowered))  # nothing is decoded any more
    compiler.decoded()
    assert not compiler.ready("third", lambda: lambda: lowered)
    began = time.monotonic()
    compiler.close()
    assert time.monotonic() < began + 10, "a rest does not hold up the end"


class Wanting(FixedDrafts):
    """Two drafts wherever their program can be called, else all."""

    def next(self, case: Any, rows: Any, longest: int, ready: Any = None) -> tuple[int, int]:
        return (2 if ready(2) else self.drafts), longest


def completions(count: int) -> list[Completion]:
    how = SamplingParams(max_tokens=60)
    return [Completion(Request([5 + i, 9], how, (i,)), speculative=i != 2) for i in range(count)]


@pytest.fixture
def compiler(monkeypatch):
    """One whose programs are held until `go` is set."""
    made, submit = BackgroundCompiler(), BackgroundCompiler.ready
    made.go = threading.Event()  # type: ignore[attr-defined]

    def ready(self: BackgroundCompiler, key: Any, describe: Any) -> bool:
        def held() -> Any:
            lower = describe()

            def later() -> Held:
                found = Held(lower())
                found.go = made.go  # type: ignore[attr-defined]
                return found

            return later

        return submit(self, key, held)

    monkeypatch.setattr(BackgroundCompiler, "ready", ready)
    yield made
    made.go.set()  # type: ignore[attr-defined]
    made.close()


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_decoding_goes_on_without_a_program_until_it_is_compiled(pair, compiler, count):
    """With three rows of which one takes plain steps, all do until the rows may differ."""
    most, dtype = pair.configs.proposals, jnp.dtype("float32")
    how = {"cycles": 1, "policy": Wanting(most) if count == 1 else FixedDrafts(most)}
    expected = completions(count)
    for c in expected:
        list(Slots(pair.params, pair.configs, 1, dtype).run([c]))
    found = completions(count)
    batch = Slots(pair.params, pair.configs, count, dtype, **how, compiler=compiler)
    for c in found:
        batch.admit(c)
    for _ in range(3):
        batch.step()
    drafted = [c for c in found if c.cycles]
    assert len(drafted) == (count == 1) and all(len(c.drafts) == most for d in drafted for c in d.cycles)
    compiler.go.set()
    (compiled,) = compiler._compiled.values()
    compiled.result(60)
    before, spent = [(len(c.cycles), c.steps) for c in found], compile_seconds()
    batch.step()
    assert compile_seconds() == spent, "nothing is compiled in the dispatch"
    for c, (cycles, steps) in zip(found, before, strict=True):
        assert (len(c.cycles) > cycles) == c.speculative
        assert c.speculative or c.steps > steps
        assert all(len(cycle.drafts) == (2 if count == 1 else most) for cycle in c.cycles[cycles:])
    while batch.busy:
        batch.step()
    assert [c.tokens for c in found] == [c.tokens for c in expected]


@pytest.mark.slow
def test_on_a_mesh_the_program_is_for_arrays_as_they_lie(pair):
    """In the thread's own context; a state that lies otherwise has a program of its own."""
    target, draft = pair.configs.target, pair.configs.draft
    assert draft is not None
    mesh = sharding.make_mesh(1, 2)
    drafter = BlockDrafter(sharding.fit_to_mesh(draft, 2))
    configs = replace(pair.configs, target=sharding.fit_to_mesh(target, 2), drafter=drafter)
    params = Params(factory.place(pair.params.target, target, mesh), factory.place(pair.params.draft, draft, mesh))
    expected, dtype = completions(1), jnp.dtype("float32")
    list(Slots(pair.params, pair.configs, 1, dtype).run(expected))
    compiler = BackgroundCompiler(lambda: jax.set_mesh(mesh))
    with jax.set_mesh(mesh):
        policy, found = Wanting(configs.proposals), completions(1)
        batch = Slots(params, configs, 1, dtype, cycles=1, policy=policy, compiler=compiler)
        batch.admit(found[0])
        while batch.busy:
            batch.step()
            for compiled in compiler._compiled.values():
                compiled.result(120)
    compiler.close()
    assert found[0].tokens == expected[0].tokens
    assert {len(cycle.drafts) for cycle in found[0].cycles[-3:]} == {2}
