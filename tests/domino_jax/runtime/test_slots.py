"""The host loop: whatever comes and goes beside it, a request's answer is the one that it has alone."""

from dataclasses import replace
from typing import Any

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
from factory import BYTE_TARGET, Pair

from domino_jax import cache as kv
from domino_jax import decode, sharding
from domino_jax.drafters.assistant import AssistantDrafter
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.combined import CombinedDrafter
from domino_jax.drafters.dual_view import DualViewConfig, DualViewDrafter
from domino_jax.drafters.ngram import NgramDrafter
from domino_jax.drafters.tree import TreeDrafter
from domino_jax.errors import DominoError
from domino_jax.finite import drafter_is_finite
from domino_jax.runtime import slots
from domino_jax.runtime.slots import Completion, FixedDrafts, Request, Slots
from domino_jax.sampling import SamplingParams
from domino_jax.weights import Params

pytestmark = pytest.mark.usefixtures("quick_compilation")
FLOAT32 = jnp.dtype("float32")
HOT = SamplingParams(1.0, top_k=40, top_p=0.95)


@pytest.fixture(scope="module")
def pair() -> Pair:
    """A drafter that is often right."""
    target = replace(BYTE_TARGET, tie_word_embeddings=False, max_position_embeddings=4096)
    return factory.good_pair(target, 3, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture
def small(monkeypatch) -> None:
    """Buckets and chunks of a few positions, so that short prompts grow caches and have many chunks."""
    monkeypatch.setattr(kv, "SMALLEST_BUCKET", 32)
    monkeypatch.setattr(decode, "LARGEST_CHUNK", 16)


def ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(4, BYTE_TARGET.vocab_size, count).tolist()


def requests(kinds: list[SamplingParams], seed: int = 0) -> list[Completion]:
    """One of each kind, with prompts and limits of any lengths."""
    rng = np.random.default_rng(seed)
    return [
        Completion(
            Request(ids(int(rng.integers(1, 60)), i), replace(how, max_tokens=int(rng.integers(1, 40))), (i, seed))
        )
        for i, how in enumerate(kinds)
    ]


def afresh(completion: Completion) -> Completion:
    return Completion(completion.request)


def alone(pair: Pair, completion: Completion, **how: Any) -> Completion:
    """The same request with nothing beside it."""
    one = afresh(completion)
    list(Slots(pair.params, pair.configs, 1, FLOAT32, **how).run([one]))
    return one


def result(completion: Completion) -> tuple[list[int], str | None]:
    return completion.tokens, completion.finish_reason


def arriving(batch: Slots, arrivals: list[list[Completion]]) -> None:
    """Admit a few requests before each step, then run until all are at their ends."""
    for some in arrivals:
        for completion in some:
            batch.admit(completion)
        batch.step()
    while batch.busy:
        batch.step()


MIX = [
    SamplingParams(),
    SamplingParams(0.8, seed=1),
    HOT,
    SamplingParams(1.3, min_p=0.02, seed=7, stop_token_ids=(*range(200, 208), 9, 31, 77)),
    SamplingParams(stop_token_ids=(4, 5)),
    SamplingParams(0.7, top_p=0.9, sampler="coupled"),
]


@pytest.mark.e2e
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(17, marks=pytest.mark.slow)])
def test_every_answer_is_the_one_that_the_request_has_alone(pair, small, size):
    """Greedy and sampled rows of any settings, in any order, arriving at any time, in slots that others have used."""
    expected = [result(alone(pair, c)) for c in requests(MIX * 2)]
    assert len({tuple(tokens) for tokens, _ in expected}) > 8
    for order in range(2):
        found, rng = requests(MIX * 2), np.random.default_rng(order)
        queue = [found[i] for i in rng.permutation(len(found))]
        arrivals = [queue[i : i + 4] for i in range(0, len(queue), 4)]
        batch = Slots(pair.params, pair.configs, size, FLOAT32, sizes=(1,) if order else (), cycles=2)
        arriving(batch, arrivals)
        assert [result(c) for c in found] == expected
        assert all(len(c.tokens) == 1 + sum(len(cycle.tokens) for cycle in c.cycles) for c in found)


def test_a_batch_has_as_many_rows_as_it_needs(pair, small):
    """It grows as requests come, and becomes small again once they have gone for some dispatches."""
    kinds = [Completion(Request(ids(9, i), SamplingParams(max_tokens=60 - 12 * i), (i,))) for i in range(4)]
    expected, rows = [result(alone(pair, c)) for c in kinds], []
    batch = Slots(pair.params, pair.configs, 4, FLOAT32, sizes=(1, 2, 9), cycles=1)
    assert batch.sizes == [1, 2, 4] and batch.rows == 0
    found = [afresh(c) for c in kinds]
    batch.admit(found[0])
    while batch.busy:
        batch.step()
        rows.append(batch.rows)
        if len(rows) == 2:
            for c in found[1:]:
                batch.admit(c)
    assert [result(c) for c in found] == expected
    assert rows[0] == 1 and max(rows) == 4 and rows[-1] == 1 and 2 in rows[rows.index(4) :]
    assert Slots(pair.params, pair.configs, 3, FLOAT32).sizes == [3], "without being asked the size is one"


@pytest.mark.parametrize(
    "name", ["assistant", "tree", *(pytest.param(n, marks=pytest.mark.slow) for n in ("Domino", "n-gram", "random"))]
)
def test_drafts_that_look_broken_are_looked_at_with_any_drafter(pair, name):
    """They may be alike by chance: what is then asked of the drafter must be what it is asked otherwise."""
    other = drafters(pair)[name]
    state = loops.begin(other.params, other.configs, [[5, 6, 7], [8]], 9)
    assert drafter_is_finite(other.params, other.configs, state)


class Changing(FixedDrafts):
    """All drafts, plain steps, one draft, all but one, and so on."""

    def next(self, case: Any, rows: Any, longest: int, ready: Any = None) -> tuple[int, int]:
        done = sum(len(row.cycles) + row.steps for row in rows)
        return [self.drafts, 0, 1, max(1, self.drafts - 1)][done % 4], 1 + done % longest


def drafters(pair: Pair) -> dict[str, Pair]:
    """Good, random, and always wrong ones."""
    target, most = pair.configs.target, pair.configs.proposals
    other = factory.random_weights(target, 12)
    view = DualViewConfig(**target.geometry(), block_size=7, mask_token_id=target.vocab_size - 1)
    assert pair.configs.drafter is not None and pair.configs.draft is not None
    made: dict[str, tuple[Any, Any]] = {
        "tree": (TreeDrafter(pair.configs.draft, nodes=6), pair.params.draft),
        "random": (pair.configs.drafter, Pair.make(pair.configs.draft, target, 9).params.draft),
        "n-gram": (NgramDrafter(5, 3, 1), None),
        "Domino and n-gram": (CombinedDrafter(pair.configs.drafter, NgramDrafter(most, 4, 2)), pair.params.draft),
        "assistant": (AssistantDrafter(target, 3), other),
        "Orthrus": (DualViewDrafter(view), factory.random_weights(view, 13)),
        "one token": (loops.TableDrafter(3), jnp.full((3, 4096), 7, jnp.int32)),
    }
    rest = {
        name: Pair(Params(pair.params.target, weights), decode.DecodeConfig(target, drafter))
        for name, (drafter, weights) in made.items()
    }
    return {"Domino": pair, **rest}


@pytest.mark.e2e
@pytest.mark.parametrize(
    "name", ["Domino", "one token", "random", "tree", "n-gram", "Domino and n-gram", "assistant", "Orthrus"]
)
@pytest.mark.slow  # tests/domino_jax/test_processors.py has it for one drafter
def test_neither_the_drafter_nor_the_number_of_drafts_changes_an_answer(pair, small, name):
    """Greedy ones and coupled samples."""
    plain = Pair(pair.params.without_drafter, pair.configs.without_drafter)
    kinds = [how for how in MIX if how.temperature == 0 or how.coupled] * 2
    expected, found = requests(kinds), requests(kinds)
    list(Slots(plain.params, plain.configs, 3, FLOAT32).run(expected))
    ours = drafters(pair)[name]
    batch = Slots(ours.params, ours.configs, 3, FLOAT32, policy=Changing(ours.configs.proposals))
    arriving(batch, [found[:2], found[2:5], found[5:]])
    assert [result(c) for c in found] == [result(c) for c in expected]
    assert any(c.steps for c in found) and any(c.cycles for c in found)


@pytest.mark.e2e
@pytest.mark.parametrize(("data", "model"), [(2, 2), (2, 4), (1, 2)])
@pytest.mark.slow  # so has it meshes
def test_on_a_mesh(pair, small, data, model):
    target, draft = pair.configs.target, pair.configs.draft
    assert draft is not None
    mesh = sharding.make_mesh(data, model)
    drafter = BlockDrafter(sharding.fit_to_mesh(draft, model))
    configs = replace(pair.configs, target=sharding.fit_to_mesh(target, model), drafter=drafter)
    params = Params(factory.place(pair.params.target, target, mesh), factory.place(pair.params.draft, draft, mesh))
    expected = [result(alone(pair, c)) for c in requests(MIX)]
    found = requests(MIX)
    with jax.set_mesh(mesh):
        batch = Slots(params, configs, 3, FLOAT32, cycles=2)
        assert batch.size == 4 if data == 2 else 3
        arriving(batch, [found[:1], found[1:4], found[4:]])
    assert [result(c) for c in found] == expected


def test_a_long_prompt_delays_the_others_by_a_chunk_at_most(pair, small):
    batch = Slots(pair.params, pair.configs, 2, FLOAT32, cycles=1)
    first = Completion(Request(ids(5, 1), SamplingParams(max_tokens=60)))
    long = Completion(Request(ids(400, 2), SamplingParams(max_tokens=3)))
    run: list[int] = []
    prefill = decode.prefill

    def counting(params: Any, configs: Any, state: Any, tokens: jax.Array, *rest: Any) -> Any:
        run.append(tokens.size)
        return prefill(params, configs, state, tokens, *rest)

    batch.admit(first)
    batch.step()
    batch.admit(long)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "prefill", counting)
        while not long.tokens and first.finish_reason is None:
            before, count = len(first.tokens), len(run)
            batch.step()
            assert len(first.tokens) > before, "the row that decodes goes on at every step"
            assert sum(run[count:]) <= decode.LARGEST_CHUNK
    assert len(run) > 5


def test_a_slot_is_filled_again_at_the_next_step(pair):
    batch = Slots(pair.params, pair.configs, 2, FLOAT32, cycles=1)
    short = [Completion(Request(ids(8, i), SamplingParams(max_tokens=2), (i,))) for i in range(5)]
    long = Completion(Request(ids(8, 9), SamplingParams(max_tokens=60)))
    for completion in (long, *short):
        batch.admit(completion)
    batch.step()
    assert [bool(c.tokens) for c in short] == [True, False, False, False, False]
    for i in range(1, 5):
        batch.step()
        assert short[i].tokens and short[i - 1].finish_reason == "length"
    while batch.busy:
        batch.step()
    assert result(long) == result(alone(pair, long))


@pytest.mark.e2e
@pytest.mark.slow
def test_requests_can_leave_at_any_time(pair, small):
    """While they wait, while their prompt is run, and while they decode; the others stay as they are."""
    batch = Slots(pair.params, pair.configs, 2, FLOAT32, cycles=1)
    kept = Completion(Request(ids(9, 1), SamplingParams(max_tokens=40)))
    decoding = Completion(Request(ids(7, 2), SamplingParams(max_tokens=40), (1,)))
    prefilling = Completion(Request(ids(60, 3), SamplingParams(max_tokens=40), (2,)))
    waiting = Completion(Request(ids(7, 4), SamplingParams(max_tokens=40), (3,)))
    last = Completion(Request(ids(50, 5), HOT, (4,)))
    for completion in (kept, decoding):
        batch.admit(completion)
    batch.step()
    batch.evict(decoding)
    assert decoding.finish_reason == "cancelled" and decoding.tokens
    for completion in (prefilling, waiting, last):
        batch.admit(completion)
    batch.step()
    batch.evict(prefilling)
    batch.evict(waiting)
    batch.evict(waiting)
    while batch.busy:
        batch.step()
    assert not prefilling.tokens and not waiting.tokens
    assert [c.finish_reason for c in (prefilling, waiting)] == ["cancelled"] * 2
    assert [result(c) for c in (kept, last)] == [result(alone(pair, c)) for c in (kept, last)]


@pytest.mark.e2e
def test_no_mix_of_requests_compiles_anything(pair):
    def run(seed: int) -> None:
        found = requests(MIX * 2, seed)
        arriving(Slots(pair.params, pair.configs, 4, FLOAT32), [found[:1], found[1:6], found[6:]])

    for seed in range(6):  # every bucket and chunk
        run(seed)
    with loops.compilations() as seen:
        run(3)
        run(1)
    assert not seen


def test_a_dispatch_has_one_transfer(pair, monkeypatch):
    """And a prompt another one, at its end."""
    calls, fetch = [], slots.fetch
    monkeypatch.setattr(slots, "fetch", lambda tree: calls.append(1) or fetch(tree))
    dispatches = []
    for name in ("speculate", "autoregress"):
        plain = getattr(decode, name)
        monkeypatch.setattr(decode, name, lambda *a, run=plain: dispatches.append(1) or run(*a))
    found = requests([SamplingParams()] * 9)
    arriving(Slots(pair.params, pair.configs, 3, FLOAT32, cycles=2), [found[:1], found[1:]])
    assert len(calls) == len(dispatches) + len(found)


def test_numbers_that_are_not_finite_end_their_own_request_alone(pair):
    target = jax.tree.map(lambda x: x, pair.params.target)
    target.embed = target.embed.at[33].set(np.nan)
    broken = Pair(Params(target, pair.params.draft), pair.configs)
    sound = Completion(Request([50, 60, 70], SamplingParams(max_tokens=20)))
    harmed = Completion(Request([50, 33, 70], SamplingParams(max_tokens=20), (1,)))
    found = list(Slots(broken.params, broken.configs, 2, FLOAT32).run([sound, harmed]))
    assert set(found) == {sound, harmed}
    assert (harmed.finite, harmed.finish_reason, harmed.tokens) == (False, None, [])
    assert result(sound) == result(alone(pair, sound))


@pytest.mark.slow
def test_caches_shrink_where_short_requests_follow_long_ones(pair, small):
    batch, capacities = Slots(pair.params, pair.configs, 2, FLOAT32), []
    grow = decode.grow_caches

    def resized(configs: Any, state: Any, capacity: int) -> Any:
        capacities.append(capacity)
        return grow(configs, state, capacity)

    found = [Completion(Request(ids(n, n), SamplingParams(max_tokens=30), (n,))) for n in (5, 200, 6, 7, 8)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "grow_caches", resized)
        arriving(batch, [found[:1], found[1:2], [], [], [], found[2:]])
    assert max(capacities) == 256 and capacities[-1] < 256
    assert [result(c) for c in found] == [result(alone(pair, c)) for c in found]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request([]), "the prompt is empty"),
        (Request([3, 999]), "id 999, outside the vocabulary"),
        (Request([3, -1]), "id -1, outside the vocabulary"),
        (Request([3] * 4097), "4097 tokens, but the model has 4096 positions"),
        (Request([3] * 4090, SamplingParams(max_tokens=8)), "1 to 7 new tokens"),
        (Request([3], SamplingParams(max_tokens=0)), "and 0 are asked for"),
    ],
)
def test_what_can_not_be_run_is_refused(pair, request_, said):
    batch = Slots(pair.params, pair.configs, 2, FLOAT32)
    with pytest.raises(DominoError, match=said):
        batch.admit(Completion(request_))
    assert not batch.busy


def test_a_request_goes_by_its_seed_and_its_numbers_alone(pair):
    def tokens(how: SamplingParams, *numbers: int) -> list[int]:
        return alone(pair, Completion(Request([80, 81, 82], replace(how, max_tokens=12), numbers))).tokens

    for how in (HOT, replace(HOT, seed=0)):
        same = [tokens(replace(how, seed=seed), 5, 2) for seed in (how.seed, how.seed)]
        others = [tokens(how, 6, 2), tokens(how, 5, 1), tokens(replace(how, seed=9), 5, 2)]
        assert same[0] == same[1] and len({tuple(t) for t in (*others, same[0])}) == 4
