"""Conversations that keep their caches: the tokens and accepted drafts of fresh runs, from fewer tokens run."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
from factory import BYTE_TARGET, make_tokenizer

from convert.loading import LoadedModel
from domino_jax import cache as kv
from domino_jax import decode, prepare, sharding
from domino_jax.drafters.block import BlockDrafter
from domino_jax.errors import DominoError
from domino_jax.runtime import slots
from domino_jax.runtime.slots import Slots
from domino_jax.sampling import SamplingParams, settings
from domino_jax.weights import Params
from infer.engine import Decoding, Engine, Sequence

pytestmark = pytest.mark.usefixtures("quick_compilation")
LIMIT = 40


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """A drafter that is often right, and a tokenizer of bytes."""
    target = replace(BYTE_TARGET, tie_word_embeddings=False, max_position_embeddings=4096)
    pair = factory.good_pair(target, 3, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    return LoadedModel(pair.configs, pair.params, make_tokenizer(), (), jnp.dtype(jnp.float32), (), 0.0)


@pytest.fixture(scope="module")
def fresh(loaded) -> Engine:
    return Engine(loaded)


def turn(
    running: Engine,
    prompt: list[int],
    conversation: Slots | None = None,
    speculative: bool = True,
    limit: int = LIMIT,
    stop: str = "",
    choose: SamplingParams | None = None,
) -> Sequence:
    sequence, _ = running.sequence(prompt, limit, 0, (stop,) if stop else ())
    running.generate([sequence], Decoding(choose or SamplingParams(), speculative=speculative), conversation)
    return sequence


def result(s: Sequence) -> tuple[list[int], list[int], int, str | None]:
    return s.tokens, s.accepted, s.steps, s.finish_reason


def some(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(4, BYTE_TARGET.vocab_size, count).tolist()


def talk(say: Callable[[list[int]], Sequence]) -> list[tuple[list[int], int]]:
    """Turns of every kind, each made from the answers before: what was said, and how much of it is held."""
    turns = []

    def next_turn(prompt: list[int], held: int) -> Sequence:
        turns.append((prompt, held))
        return say(prompt)

    first = next_turn(some(80, 1), 0)
    second = next_turn([*first.ids, *some(20, 2)], len(first.ids) - 1)  # an extension; the last token was never run
    # As Qwen3's template: the end of the last prompt is rendered in another way, and so the answer moves.
    third = next_turn([*second.prompt[:-4], *second.tokens, *some(10, 3)], len(second.prompt) - 4)
    fourth = next_turn([*third.ids, *some(300, 4)], len(third.ids) - 1)  # long
    next_turn(fourth.prompt, len(fourth.prompt) - 1)  # again: the last token is run for its hidden state
    next_turn([*first.prompt, 7], len(first.prompt))  # much is gone, and the bucket is smaller
    next_turn(some(35, 5), 0)  # another conversation
    return turns


def assert_alike(ours: Slots, theirs: Slots) -> None:
    """The same ids, and caches that hold the same of each, the target's and the drafter's."""
    assert ours.held == theirs.held
    states, valid = [of._state for of in (ours, theirs)], len(ours.held)
    held = (jax.device_get(jax.tree.leaves((state.cache, state.drafter))) for state in states if state)
    for x, y in zip(*held, strict=True):
        np.testing.assert_allclose(x[:1, :, :valid], y[:1, :, :valid], atol=1e-4, rtol=0)


def check_talk(ours: Engine, theirs: Engine, speculative: bool = True, choose: SamplingParams | None = None) -> None:
    """Every turn of a talk on `ours` gives what a fresh run on `theirs` gives, and leaves the same behind."""
    conversation, seen = ours.slots(1, speculative), []

    def say(prompt: list[int]) -> Sequence:
        answer = turn(ours, prompt, conversation, speculative, choose=choose)
        alone = theirs.slots(1, speculative)
        expected = turn(theirs, prompt, alone, speculative, choose=choose)
        assert result(answer) == result(expected)
        assert_alike(conversation, alone)
        seen.append((answer.reused, expected.reused, answer.accepted))
        return answer

    reach = (ours.loaded.configs if speculative else ours.loaded.configs.without_drafter).lookahead
    exactly = 0
    for (reused, alone, _), (prompt, held) in zip(seen, talk(say), strict=True):
        assert alone == 0
        assert reused == decode.prefill_chunks(len(prompt), held, kv.length_bucket(len(prompt) + reach)).start
        exactly += 0 < reused == held
    assert exactly >= 3
    if speculative:
        assert {m for *_, accepted in seen for m in accepted} >= {0, 1, 2, 3}


@pytest.mark.e2e
@pytest.mark.parametrize(
    "speculative", [pytest.param(True, id="drafts"), pytest.param(False, id="plain", marks=pytest.mark.slow)]
)
def test_every_turn_gives_what_a_fresh_run_of_its_ids_gives(loaded, fresh, speculative):
    """Tokens, and accepted drafts cycle by cycle."""
    check_talk(fresh, fresh, speculative)


@pytest.mark.slow
def test_samples_follow_the_seed_as_in_a_fresh_run(fresh):
    conversation, choose = fresh.slots(1), SamplingParams(temperature=0.7, top_p=0.9)
    first = turn(fresh, some(30, 1), conversation, choose=choose)
    prompt = [*first.ids, *some(20, 2)]
    second = turn(fresh, prompt, conversation, choose=choose)
    assert second.reused > 0
    assert result(second) == result(turn(fresh, prompt, choose=choose))


def test_tokens_of_earlier_turns_are_not_run_again(loaded, fresh, monkeypatch):
    """Counted in what the prefill programs are given."""
    turn(fresh, some(300, 9))  # tracing what it compiles is not running it
    run: list[int] = []
    prefill = decode.prefill

    def counting(params: Any, configs: Any, state: Any, tokens: jax.Array, *rest: Any) -> Any:
        run.append(tokens.shape[1])
        return prefill(params, configs, state, tokens, *rest)

    monkeypatch.setattr(decode, "prefill", counting)
    conversation = fresh.slots(1)
    first = turn(fresh, some(300, 1), conversation)
    assert sum(run) == 512
    run.clear()
    second = [*first.ids, *some(20, 2)]
    assert turn(fresh, second, conversation).reused == len(first.ids) - 1
    assert run == [decode.CONTINUED_CHUNK]
    run.clear()
    assert turn(fresh, second).reused == 0
    assert sum(run) == 512


# --- Other forms and places of the same ----------------------------------------------------------------------------


def test_a_prompt_is_run_in_chunks_that_fit_and_cover_it():
    for capacity in (128, 1024, 4096):
        for longest, held in itertools.product((1, 2, 63, 64, 65, 100, 120, 700, 1000, 4000), (0, 1, 63, 90, 119, 999)):
            if held > longest or longest > capacity:
                continue
            chunks = decode.prefill_chunks(longest, held, capacity)
            assert 0 <= chunks.start <= min(held, longest - 1) and chunks.stop <= capacity
            assert longest <= chunks.stop < longest + decode.LARGEST_CHUNK
            afresh = decode.prefill_chunks(longest, 0, capacity)
            if chunks.start:
                assert chunks.start == min(held, longest - 1) or chunks.stop == capacity
                assert chunks.step in (decode.CONTINUED_CHUNK, decode.LARGEST_CHUNK)
                assert chunks.stop - chunks.start < afresh.stop
            else:
                assert chunks == afresh
                assert held == 0 or longest - held > afresh.stop - decode.LARGEST_CHUNK or longest <= 64


def test_several_rows_go_on_from_what_all_hold(loaded):
    """`decode.prefill_batch` on another state's caches: all rows from one position on, the shorter ones as well."""
    params, configs = loaded.params, loaded.configs
    prompts = [some(90, 1), some(40, 2), some(35, 3)]
    state = loops.begin(params, configs, prompts, 9)
    longer = [[*prompts[0][:40], *some(44, 4)], [*prompts[1], 7, 8], prompts[2][:34]]
    caches = decode.Caches(state.cache, state.drafter)
    rows = decode.new_rows(jax.random.split(jax.random.key(7), 3), [20] * 3, (), settings(3))
    more = decode.prefill_batch(params, configs, longer, rows, loaded.dtype, caches, 33)
    assert state.cache.layer(0)[0].is_deleted(), "what was held is donated"
    fresh = loops.begin(params, configs, longer, 20)
    assert loops.speculate(params, configs, more) == loops.speculate(params, configs, fresh)


def spread(loaded: LoadedModel, data: int, model: int) -> LoadedModel:
    """The same model on a mesh."""
    mesh = sharding.make_mesh(data, model)
    target, draft = loaded.configs.target, loaded.configs.draft
    assert draft is not None

    drafter = BlockDrafter(sharding.fit_to_mesh(draft, model))
    configs = replace(loaded.configs, target=sharding.fit_to_mesh(target, model), drafter=drafter)
    return replace(
        loaded,
        configs=configs,
        params=Params(
            factory.place(loaded.params.target, target, mesh), factory.place(loaded.params.draft, draft, mesh)
        ),
        mesh=mesh,
    )


def check_two_turns(running: Engine, expected: Engine, **how: Any) -> None:
    """Two turns, the second on what the first left, give what fresh runs on the other engine give."""
    conversation = running.slots(1)
    first = turn(running, some(30, 1), conversation, **how)
    second = turn(running, [*first.ids[:-1], *some(80, 2)], conversation, **how)
    assert second.reused == len(first.ids) - 1
    for answer in (first, second):
        assert result(answer) == result(turn(expected, answer.prompt, **how))


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize(("data", "model"), [(2, 2), pytest.param(1, 2, marks=pytest.mark.slow)], ids=lambda n: str(n))
def test_on_a_mesh_with_a_row_that_only_fills_it(loaded, fresh, data, model):
    check_two_turns(Engine(spread(loaded, data, model)), fresh)


@pytest.mark.slow
def test_with_an_8_bit_drafter(loaded, fresh):
    assert loaded.configs.draft is not None
    params = prepare.quantize_drafter(loaded.params, loaded.configs.draft, "int8")
    cheap = Engine(
        replace(loaded, params=params, configs=replace(loaded.configs, drafter=BlockDrafter(loaded.configs.draft, 5)))
    )
    check_two_turns(cheap, cheap)


@pytest.mark.slow
def test_with_the_pallas_kernel(loaded):
    other = Engine(replace(loaded, configs=replace(loaded.configs, attention="pallas")))
    check_two_turns(other, other)


# --- Plain steps among drafts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scripted(slots.FixedDrafts):
    """Goes through what it is given, then has always as many drafts."""

    script: Iterator[tuple[int, int]]

    def next(self, case: Any, rows: Any, longest: int, ready: Any = None) -> tuple[int, int]:
        return next(self.script, (self.drafts, longest))


def test_an_answer_may_change_between_drafts_and_plain_steps(loaded, fresh, monkeypatch):
    """`--num-draft-tokens auto`, scripted: the drafter knows what plain steps wrote, in the same turn and the next."""
    monkeypatch.setattr(slots, "STEPS_PER_CYCLE", 1)
    running = Engine(loaded, auto=True)
    monkeypatch.setattr(running, "auto", Scripted(5, iter([(4, 1), (0, 8), (2, 1), (0, 8)])))
    conversation, alone = running.slots(1), fresh.slots(1)
    first = turn(running, some(30, 1), conversation)
    assert [len(cycle.drafts) for cycle in first.cycles][:3] == [4, 2, 5] and first.steps == 16
    assert first.tokens == turn(fresh, some(30, 1), alone).tokens
    assert_alike(conversation, alone)
    prompt, alone = [*first.ids, *some(20, 2)], fresh.slots(1)
    second = turn(running, prompt, conversation)
    expected = turn(fresh, prompt, alone)
    assert second.reused == min(len(first.ids) - 1, 128 - decode.CONTINUED_CHUNK)
    assert [c.accepted for c in second.cycles] == expected.accepted and second.tokens == expected.tokens
    assert_alike(conversation, alone)


# --- Answers that end otherwise ------------------------------------------------------------------------------------


def test_a_stop_string_ends_the_answer_and_not_the_conversation(fresh):
    free = turn(fresh, some(100, 1))
    assert free.text is not None
    stop = next(c for i, c in enumerate(free.text) if i > 4 and c.isprintable() and c != "�" and c not in free.text[:i])
    conversation = fresh.slots(1)
    first = turn(fresh, free.prompt, conversation, stop=stop)
    assert first.finish_reason == "stop" and len(first.tokens) < LIMIT
    assert conversation.held == first.ids[:-1]
    prompt, alone = [*first.ids[:-1], *some(20, 2)], fresh.slots(1)
    second = turn(fresh, prompt, conversation)
    assert second.reused == len(first.ids) - 1
    assert result(second) == result(turn(fresh, prompt, alone))
    assert_alike(conversation, alone)


def interrupted_while_printing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    calls = itertools.count()

    def printing() -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt

    return printing


def interrupted_while_waiting(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    fetch, calls = slots.fetch, itertools.count()

    def impatient(tree: Any) -> Any:
        if next(calls) == 2:  # the first token, a dispatch, another
            raise KeyboardInterrupt
        return fetch(tree)

    monkeypatch.setattr(slots, "fetch", impatient)
    return lambda: None


def interrupted_while_the_program_has_the_state(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    speculate, calls = decode.speculate, itertools.count()

    def lost(*arguments: Any) -> Any:
        given = speculate(*arguments)
        if next(calls) == 1:
            raise KeyboardInterrupt
        return given

    monkeypatch.setattr(decode, "speculate", lost)
    return lambda: None


@pytest.mark.parametrize(
    ("interrupt", "kept"),
    [
        (interrupted_while_printing, True),
        (interrupted_while_waiting, True),
        (interrupted_while_the_program_has_the_state, False),
    ],
)
def test_after_an_interruption_what_is_whole_is_kept_and_no_more(loaded, fresh, monkeypatch, interrupt, kept):
    running = Engine(loaded, cycles=2)
    conversation = running.slots(1)
    first, _ = running.sequence(some(100, 1), LIMIT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        printing = interrupt(patch)
        with closing(running.stream([first], slots=conversation)) as chunks:
            for _ in chunks:
                printing()
    assert first.finish_reason == "cancelled" and 1 < len(first.tokens) < LIMIT
    assert conversation.held == (first.ids[:-1] if kept else [])
    prompt, alone = [*first.ids, *some(20, 2)], fresh.slots(1)
    second = turn(fresh, prompt, conversation)
    assert second.reused == (len(first.ids) - 1 if kept else 0)
    assert result(second) == result(turn(fresh, prompt, alone))
    assert_alike(conversation, alone)


@pytest.mark.parametrize("program", [pytest.param("prefill", marks=pytest.mark.slow), "speculate"])
def test_after_a_memory_error_nothing_is_kept(fresh, monkeypatch, program):
    conversation = fresh.slots(1)
    first = turn(fresh, some(30, 1), conversation)
    prompt = [*first.ids, *some(20, 2)]

    def exhausted(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with monkeypatch.context() as patch, pytest.raises(DominoError, match="too little memory"):
        patch.setattr(decode, program, exhausted)
        turn(fresh, prompt, conversation)
    assert conversation.held == [] and conversation._state is None
    second = turn(fresh, prompt, conversation)
    assert second.reused == 0
    assert result(second) == result(turn(fresh, prompt))


# --- Programs ------------------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_turns_compile_nothing_but_what_a_new_bucket_needs(loaded):
    jax.clear_caches()
    running, ids, seen = Engine(loaded), some(100, 1), []
    conversation = running.slots(1)
    for i in range(12):
        with loops.compilations() as compiled:
            answer = turn(running, ids, conversation, limit=16)
        buckets = (
            kv.length_bucket(len(ids) + loaded.configs.lookahead),
            kv.length_bucket(len(answer.ids) - 1 + loaded.configs.lookahead),
        )
        seen.append((buckets, bool(compiled)))
        assert answer.reused > 0 or i == 0
        ids = [*answer.ids[:-2], *some(5 + 2 * i, i)]
    again = [compiled for i, (buckets, compiled) in enumerate(seen) if i > 1 and buckets == seen[i - 1][0]]
    assert len(again) >= 6 and not any(again), seen
    assert sum(compiled for _, compiled in seen) >= 4, "the counter must see what it is for"


@pytest.mark.e2e
def test_on_a_mesh_turns_of_one_bucket_compile_nothing(loaded):
    jax.clear_caches()
    running, ids = Engine(spread(loaded, 2, 2)), some(130, 1)
    conversation = running.slots(1)
    for i in range(4):
        with loops.compilations() as compiled:
            answer = turn(running, ids, conversation, limit=6)
        ids = [*answer.ids, *some(3, i)]
        assert bool(compiled) == (i < 2)
