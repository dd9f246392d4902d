"""`--num-draft-tokens auto`: choices on a simulated machine, whose times and acceptance are known."""

import itertools

import numpy as np
import pytest

from domino_jax.runtime.auto import AcceptanceEstimate, AutoDrafts, expected_tokens

MOST, CYCLES, STEPS = 7, 8, 4
CASE = (1, True, 128)


class Machine:
    """A batch of rows that decodes until each has so many tokens; seconds are in plain steps."""

    def __init__(self, ratio: float, chance: float | list[float], rows: int = 1, noise: float = 0.05, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.ratio, self.rows, self.noise = ratio, rows, noise
        self.chances = chance if isinstance(chance, list) else [chance] * rows
        self.compiled: set[int] = set()

    def cost(self, drafts: int) -> float:
        """Of a cycle; of the whole block, `ratio`."""
        return 1 + (self.ratio - 1) * drafts / MOST

    def run(self, policy, tokens: int, case=CASE, compiles: bool = True) -> tuple[float, list[int]]:
        """The time that it takes, and the choices."""
        left: np.ndarray = np.full(self.rows, tokens)
        spent, choices = 0.0, []
        names = [object() for _ in left]
        while (left > 0).any():
            drafts, cycles = policy.next(case, [n for n, x in zip(names, left, strict=True) if x > 0], CYCLES)
            assert 0 <= drafts <= MOST and 1 <= cycles <= CYCLES
            count = cycles if drafts else cycles * STEPS
            accepted = {}
            ran = 0
            for _ in range(count):
                if not (left > 0).any():
                    break
                ran += 1
                for i in np.flatnonzero(left > 0):
                    stood = int((self.rng.random(drafts) < self.chances[i]).cumprod().sum()) if drafts else 0
                    left[i] -= stood + 1
                    if drafts:
                        accepted.setdefault(names[i], []).append(stood)
            seconds = ran * self.cost(drafts) * (1 + self.noise * self.rng.random())
            spent += ran * self.cost(drafts)
            first = compiles and drafts not in self.compiled
            self.compiled.add(drafts)
            policy.observe(case, drafts, ran, seconds + 30 * first, 30.0 * first, accepted)
            choices.append(drafts)
        for name in names:
            policy.forget(name)
        return spent, choices

    def best(self, tokens: int) -> float:
        """The time of the better of plain steps and whole blocks, about."""
        each = np.array([expected_tokens(np.full(MOST, c))[-1] for c in self.chances])
        return min(float(tokens), tokens / each.min() * self.ratio)


GRID = list(itertools.product([1.1, 1.5, 2.4, 4.0, 8.0], [0.0, 0.3, 0.6, 0.8, 0.95], [1, 4, 16]))


@pytest.mark.parametrize(("ratio", "chance", "rows"), GRID)
def test_it_is_never_far_from_the_better_of_drafts_and_plain_steps(ratio, chance, rows):
    for seed in range(5):
        machine = Machine(ratio, chance, rows, seed=seed)
        policy = AutoDrafts(MOST)
        first, _ = machine.run(policy, 64)
        later = np.mean([machine.run(policy, 256)[0] for _ in range(4)])
        print(
            f"{ratio} {chance} {rows}: first {first / 64:.2f} of plain, later {later / machine.best(256):.2f} of best"
        )
        assert first < 64 * 1.5
        assert later < 1.2 * machine.best(256)


def test_the_first_dispatches_try_both_and_the_better_goes_on():
    _, choices = Machine(1.5, 0.9).run(AutoDrafts(MOST), 400)
    assert choices[:4] == [7, 7, 0, 0] and set(choices[6:]) <= {7} and len(choices) > 8
    _, choices = Machine(6.0, 0.1).run(AutoDrafts(MOST), 2000)
    assert choices[:4] == [7, 7, 0, 0] and choices.count(0) > 0.8 * len(choices)


def test_drafts_are_tried_again_seldom_and_ever_more_so():
    _, choices = Machine(4.0, 0.2).run(AutoDrafts(MOST), 20_000)
    tries = [i for i, drafts in enumerate(choices) if drafts]
    early, late = (sum(bounds[0] <= i < bounds[1] for i in tries) for bounds in ((10, 200), (200, len(choices))))
    assert 3 <= late < early < 0.2 * 190 and len(choices) > 600


def test_where_all_accepted_would_not_pay_drafts_are_not_tried_again():
    _, choices = Machine(9.0, 1.0).run(AutoDrafts(MOST), 20_000)
    assert not any(choices[6:])


def test_texts_that_become_easy_are_noticed():
    policy = AutoDrafts(MOST)
    hard, easy = Machine(3.0, 0.05), Machine(3.0, 0.95)
    easy.compiled = {0, MOST}
    hard.run(policy, 500)
    _, choices = easy.run(policy, 4000)
    assert choices[-1] == MOST


def test_a_case_begins_with_what_another_one_told():
    """A longer bucket: nothing is tried anew, and its own times count from then on."""
    policy = AutoDrafts(MOST)
    machine = Machine(1.5, 0.9)
    machine.run(policy, 300)
    _, choices = machine.run(policy, 300, case=(1, True, 256))
    assert set(choices) == {MOST}


def test_the_rows_that_are_running_decide():
    """Two kinds of text in one batch: what is left of it in the end is judged by itself."""
    policy = AutoDrafts(MOST)
    easy, hard = object(), object()
    for _ in range(30):
        drafts, cycles = policy.next(CASE, [easy, hard], CYCLES)
        ran = cycles if drafts else cycles * STEPS
        accepted = {easy: [drafts] * ran, hard: [0] * ran} if drafts else {}
        policy.observe(CASE, drafts, ran, ran * (3.0 if drafts else 1.0), 0.0, accepted)
    rates = {row: policy.rates(CASE, [row]) for row in (easy, hard)}
    assert rates[easy][MOST] > 2 * rates[easy][0] and rates[hard][MOST] < 0.6 * rates[hard][0]
    assert policy.next(CASE, [easy], CYCLES)[0] == MOST
    policy.forget(easy)


def test_programs_that_always_compile_are_left_alone():
    policy = AutoDrafts(MOST)
    for _ in range(20):
        drafts, cycles = policy.next(CASE, ["row"], CYCLES)
        policy.observe(CASE, drafts, cycles, 2.0, 1.0 if drafts else 0.0, {"row": [0] * cycles} if drafts else {})
    assert drafts == 0


def test_few_programs_are_ever_asked_for():
    _, choices = Machine(2.0, 0.6).run(AutoDrafts(MOST), 20_000)
    assert len(set(choices)) <= 5


def test_what_was_accepted_of_few_drafts_says_nothing_of_more():
    known = AcceptanceEstimate(4)
    known.add([2] * 50, 2)
    chances = known.chances()
    assert chances[0] > 0.95 and chances[1] > 0.95
    assert chances[2] == pytest.approx(chances[1]) and chances[3] == pytest.approx(chances[1])
    known.add([0] * 2000, 4)
    assert known.chances()[0] < 0.1
    np.testing.assert_allclose(expected_tokens(np.array([0.5, 0.5])), [1, 1.5, 1.75])


def test_it_says_what_it_chose():
    policy = AutoDrafts(MOST)
    assert str(policy) == "nothing chosen yet"
    Machine(1.5, 0.9, noise=0.0).run(policy, 300)
    assert str(policy) == "7 of 7 (plain step 1000.00 ms, cycle of 7 1500.00 ms)"
