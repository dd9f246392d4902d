"""Rows that verify unequal numbers of drafts: what is output stays what it is, whatever the numbers are."""

import dataclasses
from typing import Any

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
import test_slots
from factory import Pair
from test_auto_drafts import cycles_of
from test_slots import FLOAT32, MIX, afresh, alone, arriving, drafters, requests, result

from domino_jax import decode, sharding, verify
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.tree import TreeDrafter
from domino_jax.ragged import ragged
from domino_jax.runtime.auto import AutoDrafts, share_drafts
from domino_jax.runtime.auto_trees import auto_policy
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
        auto.observe(case, 6, 2, 1.0, {row: cycles_of([6, 6] if row in "ab" else [0, 0], 6) for row in rows})
    shares = auto.lengths(rows, 3)
    assert shares is not None and sum(shares) == 12
    assert min(shares[:2]) > max(shares[2:]) >= 1
    assert auto.lengths(rows, 6) is None and auto.lengths(rows, 0) is None and auto.lengths(rows[:1], 3) is None


def brute_force(scores: np.ndarray, most: np.ndarray, budget: int) -> float:
    """The most that can be had of prefixes, by trying all."""
    ways = np.ndindex(*(most + 1))
    return max(sum(scores[b, :n].sum() for b, n in enumerate(way)) for way in ways if sum(way) <= budget)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_verified_by_confidence_is_the_best_that_can_be(seed):
    rng = np.random.default_rng(seed)
    logits, most = rng.normal(0.5, 2.0, (3, 4)), np.array([4, rng.integers(0, 4), 3])
    logits[2] = 60.0  # certain in float32, all alike
    scores = np.cumprod(1 / (1 + np.exp(-logits)), axis=1)
    for budget in range(13):
        found = np.asarray(verify.likeliest_prefixes(jnp.asarray(logits, jnp.float32), jnp.asarray(most), budget))
        assert (found <= most).all() and found.sum() == min(budget, most.sum())
        assert sum(scores[b, :n].sum() for b, n in enumerate(found)) == pytest.approx(brute_force(scores, most, budget))
    broken = jnp.asarray(logits, jnp.float32).at[0].set(jnp.nan)
    assert verify.likeliest_prefixes(broken, jnp.asarray([4, 4, 4]), 8).tolist() == [0, 4, 4]


@pytest.mark.parametrize("low", [-2.0, 3.0, 14.0], ids=["doubtful", "sure", "nearly certain"])
def test_whether_a_draft_is_verified_depends_on_those_before_it_alone(low):
    """Of its own row; in float32, where products of what is nearly 1 are rounded."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.uniform(low, low + 4, (3, 15)), jnp.float32)
    verified = jax.jit(verify.likeliest_prefixes, static_argnums=2)
    most = jnp.full(3, 15, jnp.int32)
    for budget in (1, 7, 20, 33, 44):
        found = verified(logits, most, budget)
        assert int(found.sum()) == budget
        for place in range(15):
            for later in (-60.0, 60.0):  # a draft's own confidence was known before it was drawn
                changed = verified(logits.at[0, place + 1 :].set(later), most, budget)
                assert (int(changed[0]) > place) == (int(found[0]) > place)


@pytest.mark.parametrize("own", [False, True], ids=["those before", "its own, which is wrong"])
def test_two_rows_that_share_a_budget_are_each_distributed_as_the_target(own):
    """Confidences may depend on the drafts before, and on the other row; by its own token the output is skewed."""
    rng, trials = np.random.default_rng(0), 60000
    q, p = (jnp.asarray(rng.dirichlet(np.ones(3), 3), jnp.float32) for _ in range(2))  # [token before, token]
    sure = jnp.asarray(rng.normal(0, 3, 3), jnp.float32)

    def trial(key: jax.Array) -> jax.Array:
        draws, keys = jax.random.split(key)
        first, second = jax.random.split(draws)
        x1 = jax.random.categorical(first, jnp.log(q[0]), shape=(2,))
        x2 = jax.vmap(lambda k, x: jax.random.categorical(k, jnp.log(q[x])))(jax.random.split(second), x1)
        drafts = jnp.stack([x1, x2], axis=1).astype(jnp.int32)
        before = jnp.stack([jnp.zeros_like(x1), x1], axis=1)
        confidence = sure[drafts if own else before]
        lengths = verify.likeliest_prefixes(confidence, jnp.full(2, 2), 2)
        probs = q[before]
        target = jnp.stack([p[0] * jnp.ones((2, 1)), p[x1], p[x2]], axis=1)
        count, token = verify.accept_sampled(jax.random.split(keys, (2, 3)), drafts, probs, target, lengths)
        return jnp.where(count > 0, drafts[:, 0], token)[0]  # the first output of the first row

    found = np.asarray(jax.vmap(trial)(jax.random.split(jax.random.key(1), trials)))
    counts, expected = np.bincount(found, minlength=3), trials * np.asarray(p[0])
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert (chi_square > 100) if own else (chi_square < 14)  # of two degrees of freedom, 14 in one of 1000


def calibrated(pair: Pair) -> Pair:
    """The same drafter with temperatures, by which its confidences are chances."""
    config = pair.configs.draft
    assert config is not None
    config = dataclasses.replace(config, confidence_temperatures=(1.5,) * config.num_proposals)
    return pair._replace(configs=decode.DecodeConfig(pair.configs.target, BlockDrafter(config)))


@pytest.mark.e2e
def test_rows_share_by_confidence_and_no_answer_changes(pair, small):
    """Budgets of one and three drafts a row, in slots that requests come to and leave."""
    kinds = [how for how in MIX if how.temperature == 0 or how.coupled]
    ours = calibrated(pair)
    expected = [result(alone(pair, c)) for c in requests(kinds)]
    for budget in (1, 3):
        found = requests(kinds)
        batch = Slots(ours.params, ours.configs, 4, FLOAT32, policy=FixedDrafts(budget, by_confidence=True), cycles=2)
        arriving(batch, [found[i : i + 4] for i in range(0, len(found), 4)])
        assert [result(c) for c in found] == expected
        lengths = [len(cycle.drafts) for c in found for cycle in c.cycles]
        assert len(set(lengths)) > 2 and all(c.accepted <= len(c.drafts) for a in found for c in a.cycles)
        # Alone a row has no one to share with, and verifies as many.
        assert np.mean(lengths) < budget + 2


@pytest.mark.e2e
def test_auto_shares_as_rows_drain_to_one(pair, small):
    """Cycles of the whole block, of shares and of a lone row's few drafts, in turn; answers stay what they are."""
    ours = calibrated(pair)

    class InTurn(AutoDrafts):
        def next(self, case: Any, rows: Any, longest: int, ready: Any = None) -> tuple[int, int]:
            self._last = case
            self.count = getattr(self, "count", 0) + 1
            return (5, 3, 1, 0)[self.count % 4], 2

    kinds = [how for how in MIX if how.temperature == 0 or how.coupled]
    expected, found = [result(alone(pair, c)) for c in requests(kinds)], requests(kinds)
    policy = InTurn(ours.configs.proposals, by_confidence=True)
    arriving(Slots(ours.params, ours.configs, 3, FLOAT32, policy=policy, cycles=2), [found])
    assert [result(c) for c in found] == expected
    assert set(policy.used) == {0, 1, 3, 5} and policy._chances[False].cycles


def test_which_drafters_rows_share_by_confidence(pair):
    ours = calibrated(pair)
    drafter = ours.configs.drafter
    assert isinstance(drafter, BlockDrafter)
    assert auto_policy(ours.configs).by_confidence and not auto_policy(pair.configs).by_confidence
    tree = decode.DecodeConfig(pair.configs.target, TreeDrafter(drafter.config, None, 1))
    early = decode.DecodeConfig(pair.configs.target, dataclasses.replace(drafter, confidence_threshold=0.3))
    assert not auto_policy(tree).by_confidence and not auto_policy(early).by_confidence
    with sharding.mesh_context(sharding.make_mesh(2, 1)):
        assert not auto_policy(ours.configs).by_confidence


def test_the_cycle_that_shares_spends_its_budget_by_what_it_is_told(pair):
    """What is emitted is what the confidences of the same cycle say, of the rows that are not done."""
    ours = calibrated(pair)
    configs = dataclasses.replace(ours.configs, verified=3 * 4, by_confidence=True, confidence=True)
    prompts = [[5, 9, 11], [7] * 9, [30, 31]]
    state = loops.begin(ours.params, configs, prompts, [12, 12, 1])
    most = jnp.asarray([configs.proposals] * 3, jnp.int32)
    _, emitted = decode.speculate(ours.params, configs, state, 4, True, lengths=most)
    ran = int(emitted.cycles)
    verified, sure = np.asarray(emitted.verified[:ran]), np.asarray(emitted.confidence[:ran])
    assert ran > 1 and (verified[:, 2] == 0).all() and (verified.sum(axis=1) == 9).all()
    for each, logits in zip(verified, sure, strict=True):
        scores = np.cumprod(1 / (1 + np.exp(-logits[:2].astype(np.float64))), axis=1)
        told = sum(scores[b, :n].sum() for b, n in enumerate(each[:2]))
        assert told == pytest.approx(brute_force(scores, np.full(2, configs.proposals), 9), rel=1e-5)


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
