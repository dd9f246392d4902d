"""`--drafts auto`: the arithmetic of the choice, and that output does not depend on it."""

import itertools
from dataclasses import replace

import factory
import jax.numpy as jnp
import numpy as np
import pytest
from factory import BYTE_TARGET, make_tokenizer

from convert.loading import LoadedModel
from domino_jax.sampling import SamplingParams
from infer import auto, engine
from infer.auto import ENOUGH, FIRST_GUESS, FIRST_PROBE, TIMINGS, AcceptanceEstimate, Chooser, calibrate, candidates
from infer.engine import Decoding, Engine, Sequence

pytestmark = pytest.mark.usefixtures("quick_compilation")


# --- Arithmetic -------------------------------------------------------------------------------------------------


def test_candidates_are_few_and_reach_from_one_to_all():
    assert candidates(1) == [1]
    assert candidates(4) == [1, 2, 3, 4]
    assert candidates(16) == [1, 4, 6, 8, 11, 14, 16]


def test_a_cycle_of_few_drafts_tells_nothing_about_later_ones():
    few = AcceptanceEstimate(5)
    few.add([2] * 100, drafts=2)  # all that were proposed
    assert few.tried.tolist()[2:] == few.stood.tolist()[2:] == [0, 0, 0]
    gains = np.diff(few.expected())
    assert gains[0] > 0.98
    np.testing.assert_allclose(gains[2:] / gains[1:-1], gains[1] / gains[0], rtol=0.02)  # the last chance goes on
    rejected = AcceptanceEstimate(5)
    rejected.add([2] * 100, drafts=3)
    assert np.diff(rejected.expected())[2] < 0.02


def test_mixed_cycles_estimate_what_whole_blocks_give(monkeypatch):
    monkeypatch.setattr(auto, "HALF_LIFE", float("inf"))
    rng = np.random.default_rng(0)
    chances = np.array([0.9, 0.5, 0.8, 0.6])
    known = AcceptanceEstimate(4)
    for drafts in rng.integers(1, 5, 4000):
        accepted = np.cumprod(rng.random(drafts) < chances[:drafts]).sum()
        known.add([int(accepted)], int(drafts))
    np.testing.assert_allclose(known.expected(), [1, *(1 + np.cumsum(np.cumprod(chances)))], atol=0.05)


def test_before_anything_is_seen_there_is_a_guess_and_old_news_fades():
    known = AcceptanceEstimate(3)
    np.testing.assert_allclose(np.diff(known.expected()), FIRST_GUESS ** np.arange(1, 4))
    known.add([3] * 2000, 3)
    assert known.expected()[3] > 3.9
    for _ in range(40):
        known.add([0] * 50, 3)
    assert known.expected()[1] < 1.2


def make(times: dict[int, float], rejected: float = 0.0, seen: int = 200) -> Chooser:
    """A chooser after `seen` cycles of whole blocks, a share of them rejected at once and the others accepted."""
    known = AcceptanceEstimate(max(times))
    if seen:
        known.add([0] * round(seen * rejected) + [max(times)] * round(seen * (1 - rejected)), max(times))
    return Chooser(times, known)


def test_the_most_tokens_a_second_win():
    assert make({0: 1.0, 2: 2.0, 4: 2.2}).next(1, 8) == (4, 8)
    assert make({0: 1.0, 2: 2.0, 4: 4.0}).next(1, 8) == (2, 8)
    assert make({0: 1.0, 2: 2.0, 4: 2.2}, rejected=0.9).next(1, 8) == (0, 8)


def test_where_the_best_acceptance_would_not_pay_nothing_is_drafted():
    chooser = make({0: 1.0, 2: 3.0, 4: 5.5}, seen=0)
    assert chooser.next(4, 8) == (0, 8)
    assert {chooser.next(4, 8) for _ in range(3 * FIRST_PROBE)} == {(0, 8)}


def test_small_gains_do_not_change_the_choice():
    chooser = make({0: 1.0, 2: 2.0, 4: 2.2})
    chooser.drafts = 2
    chooser.times = {0: 1.0, 2: 3 / 1.5, 4: 5 / 1.53}
    assert chooser.next(1, 8)[0] == 2
    chooser.times = {0: 1.0, 2: 3 / 1.5, 4: 5 / 1.59}
    assert chooser.next(1, 8)[0] == 4


def test_drafts_are_tried_before_they_are_given_up_and_again_later():
    chooser = make({0: 1.0, 2: 2.0, 4: 2.2}, seen=0)
    assert chooser.next(3, 8) == (4, -(-ENOUGH // 3))
    chooser.observe([0] * 3)
    assert chooser.next(1, 8) == (4, ENOUGH - 3)
    chooser.observe([0] * (ENOUGH - 3))
    for patience in (FIRST_PROBE, 2 * FIRST_PROBE):  # the second time later than the first
        assert {chooser.next(3, 8) for _ in range(patience)} == {(0, 8)}
        assert chooser.next(1, 8) == (4, ENOUGH)
        chooser.observe([0] * (ENOUGH if patience == FIRST_PROBE else 0))
    for _ in range(6):  # the texts have become easy
        chooser.observe([4] * ENOUGH)
    assert chooser.next(1, 8) == (4, 8)
    assert chooser.patience == FIRST_PROBE


def test_a_batch_waits_for_its_slowest_row():
    """Where one row of two needs all the cycles, drafts give the batch less than the mean says."""
    chooser = make({0: 1.0, 4: 4.0})
    assert chooser.next(2, 8)[0] == 4
    chooser.finish([20, 20], [4, 20], 1.0)
    assert chooser.evenness == pytest.approx(0.6), "the first batch that tells is believed"
    assert chooser.next(2, 8)[0] == 0
    chooser.finish([20, 20], [20, 20], 1.0)
    assert chooser.evenness == pytest.approx(0.8), "later ones make a mean"
    chooser.finish([], [], 1.0)  # of plain steps, it tells nothing
    assert chooser.evenness == pytest.approx(0.8)
    chooser.drafts = 4
    assert chooser.next(1, 8)[0] == 4  # one row waits for nobody
    even = make({0: 1.0, 4: 4.0})
    even.finish([40, 10], [8, 2], 1.0)  # limits differ: plain steps suffer as much
    assert even.evenness == 1


@pytest.mark.parametrize("slower", [1.0, 3.0], ids=["as calibrated", "machine slower since"])
def test_a_calibration_that_was_wrong_is_found_out(slower):
    """Drafts seemed cheap, or dear; timed again beside plain steps they are not, however fast the machine is now."""
    true = {0: 1.0, 2: 4.0, 4: 6.0}
    for wrong in ({0: 1.0, 2: 4.0, 4: 4.5}, {0: 1.3, 2: 4.0, 4: 6.0}):  # 4 drafts give 5 tokens
        chooser = make(dict(wrong))
        assert chooser.next(1, 8)[0] == 4
        checks = 0
        while chooser.rival:
            while not chooser.due:  # a small share of the time, or it would not pay
                chooser.finish([100], [20], 1.0)
            chooser.recheck(lambda j, _: slower * true[j], lambda _: 8, lambda numbers: numbers)
            checks += 1
            if chooser.next(1, 8)[0] == 0:
                break
        assert chooser.drafts == 0 and checks <= 2


def test_times_are_checked_where_they_decide_and_seldom():
    far = make({0: 1.0, 2: 2.0, 4: 2.2})
    assert far.next(1, 8)[0] == 4
    far.finish([100], [20], 1e6)
    assert not far.rival and not far.due
    close = make({0: 1.0, 2: 4.0, 4: 4.5})
    waits = []
    for _ in range(2 * TIMINGS):
        close.finish([100], [20], 50.0)
        while not close.due:
            close.finish([100], [20], 50.0)
        waits.append(close.unchecked)
        close.recheck(lambda j, _: close.times[j], lambda _: 8, lambda numbers: numbers)
    assert sorted(waits) == waits and waits[-1] > 3 * waits[0]
    assert 0.03 * waits[0] > 2 * (1.0 + 4.5)
    hopeless = make({0: 1.0, 2: 3.1, 4: 5.5})  # as timed
    hopeless.finish([], [], 1e6)
    assert not hopeless.worthwhile and hopeless.rival and hopeless.due
    hopeless.recheck(lambda j, _: 1.0 + j / 10, lambda _: 8, lambda numbers: numbers)
    assert hopeless.worthwhile
    told = make({0: 1.0, 2: 4.0, 4: 4.5})
    told.recheck(lambda j, _: 1.0, lambda _: 8, lambda numbers: [1.0, 9.0])
    assert told.times[4] == (4.5 + 9.0) / 2


def test_calibration_takes_the_shortest_of_several_and_agrees():
    asked: list[tuple[int, int]] = []
    noise = itertools.cycle([1.0, 3.0, 2.0])

    def time(drafts: int, cycles: int) -> float:
        asked.append((drafts, cycles))
        return (0.001 + 0.002 * drafts) * next(noise)

    found = calibrate(time, 3, lambda drafts: 8 if drafts else 32, lambda numbers: numbers)
    assert found == pytest.approx({0: 0.001, 1: 0.003, 2: 0.005, 3: 0.007})
    assert asked[:8] == [(j, 1) for j in range(4)] * 2  # the first compile
    assert all(cycles <= (8 if drafts else 32) for drafts, cycles in asked)
    told = calibrate(time, 3, lambda _: 8, lambda numbers: [9.0] * len(numbers))
    assert told == dict.fromkeys(range(4), 9.0)


# --- Generation -------------------------------------------------------------------------------------------------

PROMPTS = [[99], [40, 50] * 9, [10, 20, 30]]
SCRIPT = [(4, 1), (2, 2), (0, 1), (4, 1), *[(0, 8)] * 9]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """A drafter that is often right, and a tokenizer of bytes."""
    pair = factory.good_pair(replace(BYTE_TARGET, tie_word_embeddings=False), 3, num_hidden_layers=1)
    return LoadedModel(pair.configs, pair.params, make_tokenizer(), (), jnp.dtype(jnp.float32), (), 0.0)


@pytest.fixture
def scripted(monkeypatch):
    """Choosers that go through SCRIPT, whatever is measured."""
    monkeypatch.setattr(engine, "calibrate", lambda *_: {0: 1.0, 2: 1.0, 4: 1.0})
    steps = itertools.chain(SCRIPT)
    asked = []

    def following(self: Chooser, active: int, longest: int) -> tuple[int, int]:
        asked.append(active)
        self.drafts, cycles = next(steps)
        return self.drafts, cycles

    monkeypatch.setattr(Chooser, "next", following)
    return asked


def generate(
    running: Engine, limits: list[int], choose: SamplingParams | None = None, speculative: bool = True, stop: str = ""
) -> list[Sequence]:
    rows = list(zip(PROMPTS, limits, strict=True))
    stops = (stop,) if stop else ()
    sequences = [running.sequence(prompt, limit, i, stops)[0] for i, (prompt, limit) in enumerate(rows)]
    running.generate(sequences, Decoding(choose or SamplingParams(), speculative=speculative))
    return sequences


@pytest.mark.parametrize("temperature", [0.0, pytest.param(1e-4, marks=pytest.mark.slow)])
def test_changes_of_the_choice_in_mid_answer_change_no_token(loaded, scripted, temperature):
    limits = [40, 33, 9]
    plain = generate(Engine(loaded), limits, speculative=False)
    assert len(set(plain[0].tokens)) > 10, "looping output would hide errors"
    chosen = generate(Engine(loaded, auto=True), limits, SamplingParams(temperature))
    assert [s.tokens for s in chosen] == [s.tokens for s in plain]
    assert [s.finish_reason for s in chosen] == ["length"] * 3
    drafts = [[len(cycle.drafts) for cycle in s.cycles] for s in chosen]
    assert drafts[0] == [4, 2, 2, 4] and drafts[2] == drafts[0][: len(drafts[2])]
    assert max(m for s in chosen for m in s.accepted) >= 2
    for s in chosen:  # τ is over cycles of drafts alone
        assert len(s.tokens) == 1 + sum(len(cycle.tokens) for cycle in s.cycles) + s.steps
    assert chosen[0].steps > 0 and [s.steps for s in plain] == [n - 1 for n in limits]
    assert scripted[0] == 3


def test_a_stop_string_ends_a_row_under_any_choice(loaded, scripted):
    free = generate(Engine(loaded), [40] * 3, speculative=False)
    said = max((s.text or "" for s in free), key=lambda text: len(set(text) - {"�"}))
    stop = max(set(said) - {"�"}, key=said.find)  # as late as can be
    plain = generate(Engine(loaded), [40] * 3, speculative=False, stop=stop)
    chosen = generate(Engine(loaded, auto=True), [40] * 3, stop=stop)
    assert any(s.finish_reason == "stop" and len(s.tokens) > 4 for s in plain)
    assert [(s.tokens, s.text, s.finish_reason) for s in chosen] == [(s.tokens, s.text, s.finish_reason) for s in plain]


def test_a_batch_after_one_of_plain_steps_takes_them_too_and_calibrates_no_more(loaded, monkeypatch):
    measured = []
    monkeypatch.setattr(engine, "calibrate", lambda *_: measured.append(1) or {0: 1.0, 2: 2.0, 4: 6.0})
    running = Engine(loaded, auto=True)  # of 5 drafts none pays, of 2 perhaps
    (chooser,) = [generate(running, [12] * 3), *running.choosers.values()][1:]
    chooser.drafts, chooser.owed = 0, 0
    chooser.times = {0: 1.0, 2: 2.9, 4: 4.9}
    again = generate(running, [12] * 3)
    assert [(s.cycles, s.steps) for s in again] == [([], 11)] * 3
    assert [s.tokens for s in again] == [s.tokens for s in generate(Engine(loaded), [12] * 3, speculative=False)]
    assert len(measured) == 1


@pytest.mark.parametrize("drafts", [2, 0])
def test_times_measured_again_change_no_token(loaded, monkeypatch, drafts):
    """Also where a batch takes plain steps."""
    monkeypatch.setattr(engine, "calibrate", lambda *_: {0: 1.0, 2: 1.9, 4: 2.2})
    monkeypatch.setattr(Chooser, "due", True)
    monkeypatch.setattr(
        Chooser, "next", lambda self, active, longest: (setattr(self, "drafts", drafts), (drafts, longest))[1]
    )
    running, limits = Engine(loaded, auto=True), [40, 1, 21]
    first, again = generate(running, limits), generate(running, limits)
    (chooser,) = running.choosers.values()
    assert sum(len(timings) - 1 for timings in chooser.timings.values()) == 1, "the first batch was calibrated for"
    plain = [s.tokens for s in generate(Engine(loaded), limits, speculative=False)]
    assert [s.tokens for s in first] == [s.tokens for s in again] == plain
    assert (again[0].steps == 0) == (drafts > 0)


@pytest.mark.parametrize(
    "length",
    [
        pytest.param(1, id="short", marks=pytest.mark.slow),
        pytest.param(100, id="bucket nearly full", marks=pytest.mark.slow),
    ],
)
def test_calibration_leaves_the_state_as_it_was(loaded, monkeypatch, length):
    """Samples after it, of rows of different lengths and one that is over, are those of an engine without it."""
    monkeypatch.setattr(auto, "BUDGET", 0.0)
    monkeypatch.setattr(Chooser, "next", lambda self, active, longest: (setattr(self, "drafts", 3), (3, longest))[1])
    monkeypatch.setitem(globals(), "PROMPTS", [[99] * length, *PROMPTS[1:]])
    limits, hot = [40, 1, 21], SamplingParams(temperature=1.0)
    fixed = replace(loaded, configs=replace(loaded.configs, drafts=3))
    expected, measured = (generate(Engine(of, auto=of is loaded), limits, hot) for of in (fixed, loaded))
    assert [(s.tokens, s.accepted) for s in measured] == [(s.tokens, s.accepted) for s in expected]
    assert all(s.seconds["calibrate"] > 0 for s in measured if len(s.tokens) > 1)
    assert not expected[0].seconds["calibrate"]
