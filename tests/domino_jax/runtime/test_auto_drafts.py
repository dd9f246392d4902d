"""`AutoDrafts` on a simulated machine: what it learns from real work, and what learning costs."""

import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from domino_jax.runtime.auto import (
    ENOUGH,
    FIRST_PROBE,
    LAST_PROBE,
    ROW_HALF_LIFE,
    SOON,
    TRIES,
    AutoDrafts,
    _Acceptance,
    _Chances,
)
from domino_jax.runtime.slots import STEPS_PER_CYCLE, Cycle, every_program

LONGEST = 8
CASE = (4, True, 256)


def cycles_of(accepted: list[int], drafts: int) -> list[Cycle]:
    """Cycles of so many drafts each, of which these were accepted."""
    return [Cycle(0, [0] * (count + 1), count, [0] * drafts) for count in accepted]


class Machine:
    """Runs dispatches in simulated time, one plain step of which takes about 1.

    Args:
        ratio: a cycle of `most` drafts over a plain step, of which part is the drafter's and the rest grows with J.
        chance: that a draft is accepted, by row.
        slow: the numbers of the dispatches that something else holds up by ten plain steps.
    """

    def __init__(
        self,
        most: int,
        ratio: float | Callable[[], float],
        chance: Callable[[int], float],
        seed: int = 0,
        *,
        timed: bool = True,
        slow: tuple[int, ...] = (),
    ):
        self.most, self.chance, self.timed, self.slow = most, chance, timed, slow
        self.ratio = ratio if callable(ratio) else lambda: ratio
        self.rng = np.random.default_rng(seed)
        self.compiled, self.uses, self.log = set(), Counter(), []
        self.ready: Callable[[int], bool] = every_program  # as `DraftPolicy.next` is told

    def run(self, policy: AutoDrafts | int, case, rows: list[int], left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One dispatch. `left`: tokens that each row still needs. Seconds [cycles] and tokens [cycles, rows]."""
        auto = isinstance(policy, AutoDrafts)
        j, cycles = policy.next(case, rows, LONGEST, self.ready) if auto else (policy, LONGEST)
        assert 1 <= cycles <= LONGEST
        steps = cycles if j else cycles * STEPS_PER_CYCLE
        seconds = 1 + (self.ratio() - 1) * (0.3 + 0.7 * j / self.most) if j else 1.0
        seconds = seconds * np.exp(0.05 * self.rng.normal(size=steps))
        rejected = np.array([1 - self.chance(row) for row in rows])
        accepted = np.minimum(self.rng.geometric(rejected, (steps, len(rows))) - 1, j)
        running = np.cumsum(accepted + 1, axis=0) - (accepted + 1) < left  # before the cycle
        ran = int(running.any(axis=1).sum())
        if isinstance(policy, AutoDrafts):
            told = {row: cycles_of(accepted[running[:, i], i].tolist(), j) for i, row in enumerate(rows)} if j else {}
            whole = seconds[:ran].sum() + (10 if len(self.log) in self.slow else 0)
            known = self.timed and (case, j) in self.compiled
            policy.observe(case, j, ran, float(whole) if known else None, told)
        self.compiled.add((case, j))
        self.uses[j] += 1
        self.log.append((j, cycles))
        return seconds[:ran], ((accepted + 1) * running)[:ran]


def closed_batch(policy: AutoDrafts | int, machine: Machine, rows: int, need: int = 200) -> tuple[float, float]:
    """Time until every row has `need` tokens, and until the mean row has 64."""
    got, clock, early = np.zeros(rows), 0.0, 0.0
    while (live := np.flatnonzero(got < need)).size:
        seconds, tokens = machine.run(policy, (rows, True, 256), live.tolist(), need - got[live])
        for second, each in zip(seconds, tokens, strict=True):
            got[live] += each
            clock += float(second)
            early = early or clock * (np.minimum(got, need).mean() >= 64)
    return clock, early


def stream(policy: AutoDrafts | int, machine: Machine, tokens: int, slots: int = 4, need: int = 100) -> float:
    """Time of a token where a finished request is followed by another."""
    got, total, clock, new = {}, 0.0, 0.0, itertools.count()
    while total < tokens:
        got |= {next(new): 0 for _ in range(slots - len(got))}
        seconds, each = machine.run(policy, (slots, True, 256), list(got), np.full(slots, np.inf))
        clock, total = clock + float(seconds.sum()), total + each.sum() / slots
        for row, count in zip(list(got), each.sum(axis=0), strict=True):
            got[row] += count
            if got[row] >= need:
                del got[row]
                if isinstance(policy, AutoDrafts):
                    policy.forget(row)
    return clock / total


def expected(acceptance: float, most: int) -> float:
    return float((acceptance ** np.arange(most + 1)).sum())


# --- The first batch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "rows"), list(itertools.product((7, 15), (1, 4, 16))))
def test_a_first_batch_takes_little_more_than_the_better_choice_would_have(most, rows):
    """At most 1.1 times that and the eight plain steps that time plain steps, for batches of 200 tokens a row.

    Where drafts and plain steps are about equal for the mean row, drafts are slower for the last of many rows.
    """
    for ratio, acceptance in itertools.product((1.1, 2, 4, 8), (0.0, 0.3, 0.6, 0.8, 0.9, 0.95)):
        results = []
        for seed in range(max(8, 16 // rows)):  # the bounds are those of means; luck differs
            new = [Machine(most, ratio, lambda _, a=acceptance: a, seed) for _ in range(3)]
            better = min(closed_batch(0, new[0], rows)[0], closed_batch(most, new[1], rows)[0])
            results.append((better, *closed_batch(AutoDrafts(most), new[2], rows)))
        better, whole, early = np.mean(results, axis=0)
        equal = 0.95 < expected(acceptance, most) / ratio < 1.05
        assert whole <= (1.25 if equal else 1.1) * better + 2 * STEPS_PER_CYCLE, (ratio, acceptance)
        assert early <= 1.35 * 64, (ratio, acceptance)  # 64 plain steps


def test_it_begins_with_short_dispatches_of_drafts_and_of_plain_steps():
    machine = Machine(7, 4.0, lambda _: 0.2)
    auto = AutoDrafts(7)
    assert str(auto) == "not timed yet"
    closed_batch(auto, machine, 4)
    assert machine.log[:6] == [(7, 1), (0, 1), (7, 1), (0, 1), (7, 1), (0, LONGEST)]  # each compiles first
    assert {choice for choice, _ in machine.log} == {0, 7}


def test_drafts_that_are_accepted_leave_plain_steps_for_later():
    machine = Machine(15, 1.5, lambda _: 0.97)
    closed_batch(AutoDrafts(15), machine, 4)
    assert machine.uses[0] <= 1


@pytest.mark.parametrize("slow", [(2,), (4,), (3,), (2, 3), (5,), (6,)])
def test_one_slow_dispatch_does_not_rule_drafts_out(slow):
    machine = Machine(7, 1.5, lambda _: 0.8, slow=slow)
    assert stream(AutoDrafts(7), machine, 1000) < 1.1 * stream(7, Machine(7, 1.5, lambda _: 0.8), 1000)


@pytest.mark.parametrize(("ratio", "acceptance"), [(2.0, 0.7), (4.0, 0.2), (8.0, 0.0), (1.2, 0.9)])
def test_without_any_time_it_goes_on_in_whole_dispatches(ratio, acceptance):
    machine = Machine(7, ratio, lambda _: acceptance, timed=False)
    auto = AutoDrafts(7)
    time = stream(auto, machine, 4000)
    assert time < 1.15 * min(1.0, stream(7, Machine(7, ratio, lambda _: acceptance), 4000))
    assert Counter(cycles for _, cycles in machine.log)[LONGEST] > 0.7 * len(machine.log)
    assert all(machine.uses[j] <= TRIES for j in (1, 3, 5))
    assert str(auto) == "not timed yet"


# --- In the long run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "acceptance"), list(itertools.product((1.5, 3.0, 6.0), (0.2, 0.5, 0.7, 0.9))))
def test_in_the_long_run_it_is_as_fast_as_the_best(ratio, acceptance):
    fixed = {j: stream(j, Machine(7, ratio, lambda _: acceptance, 9), 5000) for j in (0, 1, 3, 5, 7)}
    machine = Machine(7, ratio, lambda _: acceptance)
    assert stream(AutoDrafts(7), machine, 10000) < 1.035 * min(fixed.values())
    assert len(machine.compiled) <= 5


def test_a_program_that_is_not_ready_is_asked_for_and_not_chosen():
    """In a case that is new, too, where another one has shown that it is best; all is then as if it were no setting."""
    auto, machine, asked = AutoDrafts(7), Machine(7, 3.0, lambda row: 0.75), []
    machine.ready = lambda j: bool(asked.append(j))
    rows, endless = list(range(4)), np.full(4, np.inf)
    while len(machine.log) < 200:
        machine.run(auto, CASE, rows, endless)
    assert set(machine.uses) == {0, 7} and asked and not {0, 7} & set(asked)
    machine.ready = every_program
    while len(machine.log) < 400:
        machine.run(auto, CASE, rows, endless)
    best = Counter(j for j, _ in machine.log[300:]).most_common(1)[0][0]
    assert best in asked
    machine.ready, asked[:] = lambda j: bool(asked.append(j)), []
    while len(machine.log) < 450:
        machine.run(auto, (4, True, 512), rows, endless)
    assert {j for j, _ in machine.log[400:]} <= {0, 7} and best in asked


def test_settings_that_promise_nothing_are_not_compiled():
    for ratio, acceptance in ((1.5, 0.9), (6.0, 0.2), (3.0, 0.95)):
        machine = Machine(7, ratio, lambda _, a=acceptance: a)
        stream(AutoDrafts(7), machine, 3000)
        assert set(machine.uses) == {0, 7}


def test_where_the_best_acceptance_would_not_pay_drafts_are_only_timed_again_and_rarely():
    machine = Machine(7, 9.0, lambda _: 0.99)
    assert stream(AutoDrafts(7), machine, 40000) < 1.01
    assert [cycles for j, cycles in machine.log if j] == [1] * machine.uses[7]
    assert machine.uses[7] <= 3 + 1 + len(machine.log) / LAST_PROBE


@pytest.mark.parametrize("need", [100, 10**9])  # requests of their own, or one without an end
@pytest.mark.parametrize(("before", "after", "choice"), [(0.05, 0.9, 7), (0.9, 0.05, 0)])
def test_it_notices_that_texts_have_changed(need, before, after, choice):
    machine = Machine(7, 2.5, lambda _: before)
    auto = AutoDrafts(7)
    stream(auto, machine, 4000, need=need)
    machine.chance = lambda _: after
    stream(auto, machine, 4000, need=need)
    assert Counter(j for j, _ in machine.log[-40:]).most_common(1)[0][0] == choice


@pytest.mark.parametrize(("before", "after", "choice"), [(2.0, 6.0, 0), (6.0, 2.0, 7)])
def test_it_notices_that_times_have_changed(before, after, choice):
    machine = Machine(7, before, lambda _: 0.75)
    auto = AutoDrafts(7)
    stream(auto, machine, 2000)
    machine.ratio = lambda: after
    stream(auto, machine, 12000)
    assert Counter(j for j, _ in machine.log[-40:]).most_common(1)[0][0] == choice


# --- Rows and cases ---------------------------------------------------------------------------------------------


def teach(auto: AutoDrafts, chance: dict[int, float], case=CASE, ratio: float = 2.5, tokens: int = 400) -> Machine:
    """Let rows run for a while, each with its chance of acceptance."""
    machine, rows = Machine(7, ratio, chance.__getitem__), list(chance)
    while tokens > 0:
        tokens -= machine.run(auto, case, rows, np.full(len(rows), np.inf))[1].sum() / len(rows)
    return machine


def test_the_choice_is_for_the_rows_that_run_now():
    auto = AutoDrafts(7)
    for row in range(4):  # one after the other, so that each has told of itself
        teach(auto, {row: 0.97 if row % 2 else 0.55}, ratio=1.2)
    teach(auto, {row: 0.97 if row % 2 else 0.55 for row in range(4)}, ratio=1.2)
    few = auto._expect(True, [0, 2])
    many = auto._expect(True, [1, 3])
    mixed = auto._expect(True, [0, 1, 2, 3])
    assert few[7] < 3 < 5.5 < many[7]
    ends = [0, 1, 7]  # in between a row's drafts are as many as pays for it, which gives more than as many of each
    np.testing.assert_allclose(mixed[ends], (few + many)[ends] / 2)
    assert (mixed[2:7] > 1.05 * (few + many)[2:7] / 2).all()
    for _ in range(5):
        auto.observe(CASE, 7, 1, 4.0, {})
        auto.observe(CASE, 0, 1, 1.0, {})
    assert {auto.next(CASE, [1, 3], LONGEST)[0] for _ in range(3)} == {7}
    assert {auto.next(CASE, [0, 2], LONGEST)[0] for _ in range(3)} & {0, 1, 3}
    auto.forget(0)
    np.testing.assert_allclose(auto._expect(True, [0]), auto._expect(True, [99]))


def plain_before_a_probe(auto: AutoDrafts, rows: list[int]) -> int:
    for count in range(1000):
        j, cycles = auto.next(CASE, rows, LONGEST)
        if j:
            assert cycles < LONGEST
            return count
        auto.observe(CASE, 0, cycles * STEPS_PER_CYCLE, float(cycles * STEPS_PER_CYCLE), {})
    raise AssertionError("no probe")


def test_probes_become_rare_while_drafts_lose_but_new_requests_are_probed_soon():
    auto = AutoDrafts(7)
    rows = list(range(4))
    teach(auto, dict.fromkeys(rows, 0.1), ratio=3.0, tokens=3000)
    waits = []
    for _ in range(7):
        waits.append(plain_before_a_probe(auto, rows))
        auto.observe(CASE, 7, 2, 6.0, {row: cycles_of([0, 0], 7) for row in rows})
    assert waits[1:] == [min(LAST_PROBE, 2 * wait) for wait in waits[:-1]] or waits[-1] == LAST_PROBE
    assert min(waits[1:]) >= FIRST_PROBE and max(waits) == LAST_PROBE
    assert plain_before_a_probe(auto, [100, 101, 2, 3]) == SOON


def test_a_new_capacity_starts_from_the_times_of_the_last():
    auto = AutoDrafts(7)
    chance = dict.fromkeys(range(4), 0.8)
    teach(auto, chance, (4, True, 256), ratio=1.5)
    machine = teach(auto, chance, (4, True, 512), ratio=1.5)
    assert set(machine.log[:5]) == {(7, LONGEST)}
    known = auto._cases[4, True, 512].known()
    assert 1.4 < known[7] / known[0] < 1.6
    teach(auto, dict.fromkeys(range(10, 14), 0.0), (4, True, 512), ratio=5.0)
    assert teach(auto, dict.fromkeys(range(10, 14), 0.0), (4, True, 1024), ratio=5.0).uses[7] == 0


def test_other_slots_are_timed_anew_and_sampled_rows_have_an_acceptance_of_their_own():
    auto = AutoDrafts(7)
    teach(auto, dict.fromkeys(range(4), 0.9), (4, True, 256), ratio=1.5)
    assert teach(auto, dict.fromkeys(range(16), 0.3), (16, True, 256), ratio=6.0).log[0] == (7, 1)
    assert auto.next((16, True, 256), range(16), LONGEST)[0] == 0
    guess = AutoDrafts(7)._texts[False].chances()
    np.testing.assert_allclose(auto._texts[False].chances(), guess)


def test_equal_numbers_make_equal_choices():
    logs = []
    for _ in range(2):
        machine = Machine(7, 2.5, lambda row: 0.9 if row % 2 else 0.1)
        stream(AutoDrafts(7), machine, 3000)
        logs.append(machine.log)
    assert logs[0] == logs[1]


# --- Arithmetic -------------------------------------------------------------------------------------------------


def test_a_cycle_of_few_drafts_tells_nothing_about_later_ones():
    few = _Acceptance(5, 512)
    few.add([2] * 100, drafts=2)  # all that were proposed
    assert few.counts[:, 2:].tolist() == [[0, 0, 0], [0, 0, 0]]
    chances = few.chances()
    assert chances[0] > 0.98
    np.testing.assert_allclose(chances[2:], chances[1])  # the last chance goes on
    rejected = _Acceptance(5, 512)
    rejected.add([2] * 100, drafts=3)
    assert rejected.chances()[2] < 0.02


def test_mixed_cycles_estimate_what_whole_blocks_give():
    rng, chances = np.random.default_rng(0), np.array([0.9, 0.5, 0.8, 0.6])
    known = _Acceptance(4, float("inf"))
    for drafts in rng.integers(1, 5, 4000):
        known.add([int(np.cumprod(rng.random(drafts) < chances[:drafts]).sum())], int(drafts))
    np.testing.assert_allclose(known.chances(), chances, atol=0.05)


def test_old_news_fades():
    known = _Acceptance(3, ROW_HALF_LIFE)
    for _ in range(40):
        known.add([3] * ENOUGH, 3)
    assert known.chances().min() > 0.97
    for _ in range(40):
        known.add([0] * ENOUGH, 3)
    assert known.chances()[0] < 0.05


def test_the_summary_names_the_choice_and_its_times():
    auto = AutoDrafts(7)
    for j, seconds in ((7, 0.0029), (0, 0.0012), (7, 0.0029)):
        auto.next(CASE, [0], LONGEST)
        auto.observe(CASE, j, 1, seconds, {0: cycles_of([7], 7)} if j else {})
    auto.next(CASE, [0], LONGEST)
    assert str(auto) == "7 of 7 (plain step 1.20 ms, cycle of 7 2.90 ms)"
    for _ in range(5):
        auto.next(CASE, [0], LONGEST)
        auto.observe(CASE, 7, 8, 8 * 0.0029, {0: cycles_of([0] * 8, 7)})
    auto.next(CASE, [0], LONGEST)
    assert str(auto) == "plain steps (plain step 1.20 ms, cycle of 7 2.90 ms)"


def test_a_dispatch_that_ran_nothing_tells_nothing():
    auto = AutoDrafts(7)
    auto.next(CASE, [0], LONGEST)
    auto.observe(CASE, 7, 0, 0.1, {0: []})
    assert str(auto) == "not timed yet"


def confident(rng: np.random.Generator, rows: int, drafts: int, wrong: float = 0.0) -> list[Cycle]:
    """A cycle of rows whose drafts stand as often as is said; `wrong` is added to the logits that are told."""
    logits = rng.normal(0.5, 2.0, (rows, 7))
    stands = np.cumprod(rng.random((rows, 7)) < 1 / (1 + np.exp(-logits)), axis=1)
    scores = np.cumprod(1 / (1 + np.exp(-logits - wrong)), axis=1)
    taken = np.zeros(rows, int)
    np.add.at(taken, np.argsort(-scores, axis=None)[: rows * drafts] // 7, 1)
    counts = [int(stand[:n].sum()) for stand, n in zip(stands, taken, strict=True)]
    rows_of = zip(counts, taken, logits + wrong, strict=True)
    return [Cycle(0, [0] * (count + 1), count, [0] * int(n), sure.tolist()) for count, n, sure in rows_of]


@pytest.mark.parametrize("wrong", [0.0, 0.7, -0.7])
def test_confidences_say_what_every_budget_would_give(wrong):
    """From cycles of one budget what others give, whose drafts were not verified; also if all are too sure."""
    rng, known = np.random.default_rng(0), _Chances(7, 1e9)
    for _ in range(4000):
        known.add(confident(rng, 4, 3, wrong))
    for drafts in (1, 3, 5, 7):
        given = [1 + np.mean([c.accepted for c in confident(rng, 4, drafts, wrong)]) for _ in range(4000)]
        assert known.expect()[drafts] == pytest.approx(np.mean(given), rel=0.02 if wrong == 0 or drafts == 3 else 0.08)
    known.add([Cycle(0, [0], 0, [0] * 7, [float("nan")] * 7)])
    assert np.isfinite(known.expect()).all()


def test_a_budget_by_confidence_is_chosen_by_what_it_gives():
    """Where the target's time grows with its tokens few drafts are verified, and all where it does not."""
    steep, flat = {0: 1.0, 1: 1.1, 3: 1.8, 5: 2.3, 7: 2.6}, dict.fromkeys((1, 3, 5, 7), 1.1) | {0: 1.0}
    for seconds, best in ((steep, 1), (flat, 7)):
        auto, rng, rows, uses = AutoDrafts(7, by_confidence=True), np.random.default_rng(1), list(range(4)), Counter()
        for _ in range(300):
            drafts, cycles = auto.next(CASE, rows, LONGEST)
            ran = cycles if drafts else cycles * STEPS_PER_CYCLE
            together = [confident(rng, 4, drafts) for _ in range(ran if drafts else 0)]
            told = dict(zip(rows, map(list, zip(*together, strict=True)), strict=True)) if drafts else {}
            auto.observe(CASE, drafts, ran, seconds[drafts] * ran, told)
            uses[drafts] += 1
        assert uses.most_common(1)[0][0] == best, uses


@pytest.mark.parametrize("most", [1, 2, 3, 15])
def test_blocks_of_any_length(most):
    machine = Machine(most, 1.2, lambda _: 0.9)
    assert stream(AutoDrafts(most), machine, 2000) < 1.05 * stream(most, Machine(most, 1.2, lambda _: 0.9), 2000)
    assert set(machine.uses) <= {0, *range(1, most + 1)}
