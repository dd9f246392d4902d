"""Rows that verify unequal numbers of drafts: what is output stays what it is, whatever the numbers are."""

import dataclasses
from typing import Any

import factory
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_slots
from factory import Pair
from test_slots import FLOAT32, MIX, afresh, alone, arriving, drafters, requests, result

from domino_jax import decode, sharding
from domino_jax.ragged import ragged
from domino_jax.runtime.auto import AutoDrafts, share_drafts
from domino_jax.runtime.slots import Completion, FixedDrafts, Request, Slots, rows_of
from domino_jax.sampling import SamplingParams
from domino_jax.weights import Params

pytestmark = pytest.mark.usefixtures("quick_compilation")
pair, small = test_slots.pair, test_slots.small  # fixtures


@pytest.mark.parametrize("seed", range(4))
def test_rows_go_into_a_line_and_come_back(seed):
    rng = np.random.default_rng(seed)
    batch, most = int(rng.integers(1, 7)), int(rng.integers(1, 9))
    counts = rng.integers(1, most + 1, batch)
    size = int(counts.sum() + rng.integers(0, 5))
    x = rng.normal(size=(batch, most, 3)).astype(np.float32)
    packed = ragged(jnp.asarray(counts, jnp.int32), most, size)
    line = packed.line(jnp.asarray(x))
    whole = np.concatenate([x[b, :count] for b, count in enumerate(counts)])
    assert line.shape == (1, size, 3)
    np.testing.assert_array_equal(line[0, : len(whole)], whole)
    back = np.asarray(packed.rows(line))
    for b, count in enumerate(counts):
        np.testing.assert_array_equal(back[b, :count], x[b, :count])
        np.testing.assert_array_equal(back[b, count:], np.broadcast_to(x[b, count - 1], (most - count, 3)))


class Uneven(FixedDrafts):
    """Another number of drafts for each row, none for some, in each dispatch."""

    def lengths(self, rows: Any, drafts: int) -> list[int]:
        rng = np.random.default_rng([len(row.tokens) for row in rows])
        return rng.integers(0, drafts + 1, len(rows)).tolist()


@pytest.mark.slow
@pytest.mark.e2e
def test_every_answer_is_the_one_that_the_request_has_alone(pair, small):
    """Greedy and seeded rows of any settings: what they verify beside each other changes none of them."""
    kinds = [how for how in MIX if how.temperature == 0 or how.coupled]
    expected, found = [result(alone(pair, c)) for c in requests(kinds)], requests(kinds)
    batch = Slots(pair.params, pair.configs, 4, FLOAT32, policy=Uneven(pair.configs.proposals), cycles=2)
    arriving(batch, [found[i : i + 4] for i in range(0, len(found), 4)])
    assert [result(c) for c in found] == expected
    lengths = {len(cycle.drafts) for c in found for cycle in c.cycles}
    assert len(lengths) > 3 and all(cycle.accepted <= len(cycle.drafts) for c in found for cycle in c.cycles)
    assert any(c.steps for c in found), "a row without drafts takes plain steps"


def test_the_target_runs_no_more_than_is_verified(pair):
    """The products of a cycle with lengths have as many rows as tokens that are verified."""
    configs, batch, widths, original = pair.configs, 4, {}, decode.target.logits
    drafts = jnp.zeros((batch, 3), jnp.int32)
    for verified in (batch * 2, batch * 4):
        seen: list[int] = []

        def note(x: Any, seen: list[int] = seen) -> Any:
            seen.append(x.shape[0] * x.shape[1])
            return x

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode.target, "logits", lambda p, c, h, *r, note=note: original(p, c, note(h), *r))
            state = jax.eval_shape(lambda: begin(pair, batch))
            some = dataclasses.replace(configs, verified=verified)
            jax.eval_shape(
                lambda s, n, some=some: decode.run_target(pair.params, some, s, drafts, lengths=n),
                state,
                jax.ShapeDtypeStruct((batch,), jnp.int32),
            )
        widths[verified] = seen
    assert widths == {batch * 2: [batch * 2], batch * 4: [batch * 4]}


def begin(pair: Pair, batch: int) -> decode.DecodeState:
    kinds = [Request([1], SamplingParams(max_tokens=4))] * batch
    return decode.begin(rows_of(kinds), [1] * batch, decode.init_caches(pair.configs, batch, 128, FLOAT32))


@pytest.mark.parametrize("seed", range(5))
def test_drafts_are_spent_where_they_are_likeliest_to_be_accepted(seed):
    """The best of all ways to spend them, by trying all."""
    rng = np.random.default_rng(seed)
    survival = np.cumprod(rng.uniform(0.2, 1.0, (3, 4)), axis=1)
    for total in range(3, 13):
        shares = share_drafts(survival, total)
        assert sum(shares) == total and all(1 <= n <= 4 for n in shares)
        gains = [
            sum(survival[row, :n].sum() for row, n in enumerate(way))
            for way in np.ndindex(4, 4, 4)
            for way in [tuple(n + 1 for n in way)]
            if sum(way) == total
        ]
        found = sum(survival[row, :n].sum() for row, n in enumerate(shares))
        assert found == pytest.approx(max(gains))


def test_auto_gives_the_rows_that_accept_more_the_drafts(pair):
    """Two rows whose drafts all stand, two whose never do: a budget goes to the first."""
    auto, rows, case = AutoDrafts(6), ["a", "b", "c", "d"], (4, True, 128)
    for _ in range(30):
        auto.next(case, rows, 4)
        auto.observe(case, 6, 2, 1.0, {"a": [6, 6], "b": [6, 6], "c": [0, 0], "d": [0, 0]})
    shares = auto.lengths(rows, 3)
    assert shares is not None and sum(shares) == 12
    assert min(shares[:2]) > max(shares[2:]) >= 1
    assert auto.lengths(rows, 6) is None and auto.lengths(rows, 0) is None and auto.lengths(rows[:1], 3) is None


class EvenOdd:
    """Allows even and odd tokens in turn; a grammar in short."""

    is_done = False

    def __init__(self, vocab_size: int):
        self._words, self._count = -(-vocab_size // 32), 0

    def allowed(self) -> np.ndarray:
        bits = np.array([0x55555555, 0xAAAAAAAA], np.uint32).view(np.int32)
        return np.full(self._words, bits[self._count % 2], np.int32)

    def accept(self, tokens: Any) -> None:
        for token in tokens:
            assert token % 2 == self._count % 2
            self._count += 1


def restricted(pair: Pair) -> Completion:
    """A request whose tokens are even and odd in turn."""
    request = Request([7, 9, 11], SamplingParams(max_tokens=20))
    return Completion(request, guide=EvenOdd(pair.configs.target.vocab_size))


@pytest.mark.e2e
def test_plain_and_guided_rows_hold_no_other_back(pair, small):
    """A request for plain steps takes them while others draft; one whose next token is restricted does too."""
    drafted, plain = (Completion(Request([5 + i, 9, 11], SamplingParams(max_tokens=20))) for i in range(2))
    plain.speculative, guided = False, restricted(pair)
    expected = [result(alone(pair, c)) for c in (drafted, plain)]
    batch = Slots(pair.params, pair.configs, 3, FLOAT32, processors=True)
    arriving(batch, [[drafted, plain, guided]])
    assert [result(c) for c in (drafted, plain)] == expected
    assert drafted.cycles and not plain.cycles and plain.steps == 19
    assert guided.steps == 19 and [token % 2 for token in guided.tokens] == [0, 1] * 10
    only, again = Slots(pair.params, pair.configs, 3, FLOAT32, processors=True), restricted(pair)
    arriving(only, [[again]])
    assert again.tokens == guided.tokens, "what stands beside it changes nothing"


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["tree", pytest.param("mesh", marks=pytest.mark.slow)])
def test_where_rows_can_not_differ_a_guided_one_has_all_take_plain_steps(pair, small, name):
    """Drafts of a tree, and of a mesh that divides the batch: a grammar says what may come next, not what after it."""
    expected = restricted(pair)
    arriving(Slots(pair.params, pair.configs, 1, FLOAT32, processors=True), [[expected]])
    ours, mesh = drafters(pair)["tree"], sharding.make_mesh(2, 1)
    if name == "mesh":
        models = (pair.params.target, pair.configs.target), (pair.params.draft, pair.configs.draft)
        ours = Pair(Params(*(factory.place(weights, config, mesh) for weights, config in models)), pair.configs)
    with sharding.mesh_context(mesh if name == "mesh" else None):
        guided, beside = restricted(pair), Completion(Request([5, 9, 11], SamplingParams(max_tokens=12)))
        batch = Slots(ours.params, ours.configs, 2, FLOAT32, processors=True, cycles=2)
        arriving(batch, [[guided, beside]])
        asking = [afresh(beside), afresh(beside)]
        for c in asking:
            c.speculative = False
        arriving(batch, [asking])
        drafting = afresh(beside)
        arriving(batch, [[drafting]])
    assert guided.tokens == expected.tokens
    assert result(beside) == result(alone(pair, beside)) == result(drafting)
    assert not guided.cycles and drafting.cycles
    assert not any(c.cycles for c in asking), "all that run ask for plain steps"
