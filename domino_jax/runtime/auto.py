"""How many drafts the next dispatch verifies, or none: chosen from measured times and observed acceptance.

A cycle of J drafts takes t[J] and gives a row E[J] tokens on average, a plain step takes t[0] and gives one. The best
choice is the greatest E[J] / t[J], E averaged over the rows that run now, or where rows share by confidence over those
of the last cycles. All is learned from real work: what may not pay is tried only as far as an allowance of lost time
goes. Every process gets the same numbers and decides the same.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from statistics import fmean, median_low
from typing import Any

import numpy as np

from domino_jax.runtime.slots import STEPS_PER_CYCLE, BatchCase, Cycle, every_program, verified_sizes

MOST_SETTINGS = 4  # numbers of drafts to consider, the whole block among them; each is a program to compile
TIMINGS = 5  # of a choice, the last, of which the median counts, and of two the shorter
TRIES = 3  # dispatches, timed or not, after which a choice is not run again for its time alone
GUESSED_RATIO = 2.0  # a cycle of whole-block drafts over a plain step, before either is timed
# A trial loses the tokens that the best known choice would have given beside. They are at most FIRST_LOSS for each
# number of slots, and this share of all. Timing drafts and plain steps at first is exempt; but where a cycle gives SURE
# tokens, plain steps can hardly win and wait for the allowance, and until they are timed a dispatch has UNSURE cycles.
FIRST_LOSS, SHARE, SURE, UNSURE = 8.0, 0.02, 7.0, 2
# The chance of a first draft before any is seen. It, or that of the draft before, weighs as much as so many cycles.
FIRST_GUESS, GUESS_WEIGHT = 0.7, 2.0
ROW_WEIGHT = 8.0  # of what all rows told, in cycles, against what the row itself told
HALF_LIFE, ROW_HALF_LIFE = 512.0, 64.0  # cycles of a row after which what they told counts half: texts differ
ENOUGH, WELL_KNOWN = 8, 64  # cycles to be seen before drafts are given up, and before another setting is compiled
MARGIN, CLEAR = 1.03, 1.1  # by how much another choice has to be better, and one that is yet to be compiled
# Dispatches of plain steps before drafts are probed: SOON where half of the rows are new or the drafts were timed once,
# else twice as many after each probe. What was seen before a probe counts half, and at most as LEFT cycles.
SOON, FIRST_PROBE, LAST_PROBE, LEFT = 4, 32, 512, 16.0
CLOSE, RETIMED = 1.5, 4  # plain steps so close to drafts are timed after FIRST_PROBE, else LAST_PROBE; cycles of that


class _Acceptance:
    """Drafts accepted of those tried, by their place in the block: tried are those before which none was rejected."""

    def __init__(self, most: int, half_life: float):
        self.counts = np.zeros((2, most))  # drafts tried, drafts accepted
        self.half_life = half_life
        self.seen = 0  # cycles

    def add(self, accepted: list[int], drafts: int) -> None:
        """Note cycles of `drafts` drafts each, by how many of them were accepted."""
        place, counts = np.arange(drafts), np.array(accepted, np.int64)[:, None]
        self.counts *= 0.5 ** (len(accepted) / self.half_life)
        self.counts[:, :drafts] += [(counts >= place).sum(axis=0), (counts > place).sum(axis=0)]
        self.seen += len(accepted)

    def fade(self) -> None:
        """Let what was seen before a probe count half, and at most as `LEFT` cycles."""
        self.counts *= faded(self.counts[0, 0])

    def chances(self) -> np.ndarray:
        """The chance [J] of each draft, given that those before it were accepted."""
        chances = [FIRST_GUESS]
        for tried, accepted in self.counts.T.tolist():
            chances.append((accepted + GUESS_WEIGHT * chances[-1]) / (tried + GUESS_WEIGHT))
        return np.array(chances[1:])


class _Chances:
    """What budgets of drafts would have given: by the drafter's confidences, which every draft has, verified or not."""

    def __init__(self, most: int, half_life: float):
        self.gained = np.zeros(most + 1)  # drafts of the mean row that would stand, by budgets of 0, 1, ..., J a row
        self.cycles = 0.0
        self.stood = np.array([GUESS_WEIGHT, GUESS_WEIGHT])  # drafts that stood, and that were likely to
        self.half_life = half_life

    def add(self, rows: Sequence[Cycle]) -> None:
        """Note one cycle of some rows."""
        kept = 0.5 ** (1 / self.half_life)
        standing = np.nan_to_num(survival(np.array([cycle.confidence for cycle in rows])))
        gained = np.concatenate([[0.0], np.cumsum(-np.sort(-standing, axis=None))])[:: len(rows)] / len(rows)
        self.gained, self.cycles = self.gained * kept + gained, self.cycles * kept + 1
        likely = sum(float(chances[: len(cycle.drafts)].sum()) for chances, cycle in zip(standing, rows, strict=True))
        self.stood = self.stood * kept + [sum(cycle.accepted for cycle in rows), likely]

    def fade(self) -> None:
        """See `_Acceptance`."""
        kept = faded(self.cycles)
        self.gained, self.cycles, self.stood = self.gained * kept, self.cycles * kept, self.stood * kept

    def expect(self) -> np.ndarray:
        """E [J + 1] as `AutoDrafts` has it; confidences that say too much or too little are set right on the whole."""
        return 1 + self.gained / self.cycles * (self.stood[0] / self.stood[1])


@dataclass
class _Times:
    """What is known of one case's times."""

    prior: dict[int, float]  # seconds by drafts, 0 for a plain step: another case's, or a guess
    fresh: bool  # whether no case with as many slots was timed before
    timings: dict[int, deque[float]] = field(default_factory=dict)
    untimed: Counter[int] = field(default_factory=Counter)  # dispatches without a time, by drafts
    drafts: int = -1  # the choice, trials aside; -1 before the first

    def known(self) -> dict[int, float]:
        """Seconds by drafts: the medians of this case's own timings, else the prior scaled to them."""
        own = {j: median_low(seconds) for j, seconds in self.timings.items()}
        scale = fmean([own[j] / self.prior[j] for j in own if j in self.prior] or [1.0])
        return {j: seconds * scale for j, seconds in self.prior.items()} | own

    def timed(self, drafts: int) -> int:
        """How often a choice was timed, at most `TIMINGS`."""
        return len(self.timings.get(drafts, ()))

    def wanted(self, drafts: int) -> bool:
        """Whether a choice is to be run for its time at once; drafts twice, or one slow cycle could rule them out."""
        timed = self.timed(drafts)
        return self.fresh and timed < (2 if drafts else 1) and timed + self.untimed[drafts] < TRIES


class AutoDrafts:
    """A `slots.DraftPolicy` that takes what is faster."""

    def __init__(self, most: int, whole: bool = False, by_confidence: bool = False):
        """Args:
        most: J of a whole block, or N of a tree.
        whole: no cycles of fewer drafts: those of a tree are no beginning of it.
        by_confidence: see `DraftPolicy`. How much is verified goes by the confidences of earlier cycles, whose
            drafts are never the ones in question, so that the output stays exact.
        """
        self._most, self.by_confidence = most, by_confidence
        some = [most] if whole else np.linspace(1, most, min(most, MOST_SETTINGS))
        if by_confidence:
            some = [size - 1 for size in verified_sizes(most) if size > 1]
        self._settings = sorted({round(j) for j in some})
        self._chances = {greedy: _Chances(most, ROW_HALF_LIFE) for greedy in (False, True)}
        self._cases: dict[BatchCase, _Times] = {}
        self._texts = {greedy: _Acceptance(most, HALF_LIFE) for greedy in (False, True)}
        self._rows: dict[Hashable, _Acceptance] = {}
        self._waited, self._patience = 0, FIRST_PROBE  # dispatches since the last trial, and plain ones before a probe
        self._tokens = self._lost = self._allowed = 0.0  # of a row: decoded; lost by trials; that may be lost at first
        self._last, self._trial = (0, False, 0), False  # the last dispatch's case, and whether it was to learn
        self._expected = np.ones(most + 1)  # E when it was chosen
        self.used: Counter[int] = Counter()  # cycles, or plain steps, by the drafts that were chosen for the mean row
        self._given: dict[Hashable, int] = {}  # drafts of each row in the last dispatch, where they differed

    @property
    def most(self) -> int:
        """J of a whole block, or N of a tree."""
        return self._most

    def expectation(self, case: BatchCase, rows: Sequence[Hashable]) -> tuple[float, float]:
        """Tokens of a row and seconds of a cycle with the drafts that give the most tokens a second."""
        known = (self._cases.get(case) or self._open(case)).known()
        expected = self._expect(case[1], rows)
        best = max((j for j in known if j), key=lambda j: float(expected[j]) / known[j])
        return float(expected[best]), known[best]

    def rate(self, case: BatchCase, rows: Sequence[Hashable]) -> float | None:
        """Tokens a second of a row by its drafts; None before enough of them were seen and timed."""
        times = self._cases.get(case) or self._open(case)
        timed = not times.fresh or any(drafts and seconds for drafts, seconds in times.timings.items())
        if self._texts[case[1]].seen < ENOUGH or not timed:
            return None
        tokens, seconds = self.expectation(case, rows)
        return tokens / seconds

    def next(
        self, case: BatchCase, rows: Sequence[Hashable], longest: int, ready: Callable[[int], bool] = every_program
    ) -> tuple[int, int]:
        """J of the next dispatch, 0 for plain steps, and how many cycles it may have.

        Args:
            case: times are those of one case, and acceptance that of greedy or of other rows.
            rows: ids of the requests that are not finished.
            longest: cycles that a dispatch may have, each of drafts or of `STEPS_PER_CYCLE` plain steps.
            ready: see `DraftPolicy.next`.
        """
        self._last, texts = case, self._texts[case[1]]
        times = self._cases.get(case) or self._open(case)
        known, expected = times.known(), self._expect(case[1], rows)
        rates = {j: float(expected[j]) / seconds for j, seconds in known.items()}
        while 0 < (best := max(rates, key=lambda j: rates[j])) < self._most and not ready(best):
            del rates[best]
        if rates[best] > MARGIN * rates.get(times.drafts, 0.0):
            times.drafts = best
        best, self._expected = times.drafts, expected
        self._patience = FIRST_PROBE if best else self._patience
        drafts, cycles = self._trial_of(times, rates, rows, texts.seen)
        if drafts != best and not (times.wanted(drafts) and (drafts or expected[self._most] < SURE)):
            # In tokens of the best choice, what a cycle takes beyond those it gives.
            loss = (1 if drafts else STEPS_PER_CYCLE) * (known[drafts] * rates[best] - float(expected[drafts]))
            left = self._allowed + SHARE * self._tokens - self._lost
            cycles = min(cycles, max(0, int(left / loss))) if loss > 0 else cycles
        self._trial = cycles > 0
        self._waited = 0 if self._trial else self._waited + 1
        if not self._trial:
            promising = self._promising(times, rates[best], texts.seen)
            drafts = promising if promising and ready(promising) else best
            return drafts, min(longest, UNSURE) if times.wanted(0) else longest
        if drafts > best == 0 and texts.seen >= ENOUGH:
            self._patience = min(2 * self._patience, LAST_PROBE)
            for told in (texts, self._chances[case[1]], *(self._rows[row] for row in rows if row in self._rows)):
                told.fade()
        return drafts, min(cycles, longest)

    def lengths(self, rows: Sequence[Hashable], drafts: int) -> list[int] | None:
        """As many drafts in all as `drafts` of every row, spent where they are likeliest to be accepted.

        Of DSpark's algorithm 1 (arXiv 2607.05147) it is the second half, with observed acceptance in the place of
        confidences: a row's share depends on its earlier cycles alone, so that the output stays exact.
        """
        self._given = {}
        if len(rows) < 2 or not 0 < drafts < self._most:
            return None
        shares = share_drafts(self._survival(self._texts[self._last[1]], rows), len(rows) * drafts)
        self._given = dict(zip(rows, shares, strict=True))
        return shares

    def observe(
        self,
        case: BatchCase,
        drafts: int,
        cycles: int,
        seconds: float | None,
        told: Mapping[Any, Sequence[Cycle]],
    ) -> None:
        """Note what a dispatch did that `next` chose.

        Args:
            cycles: that ran; of plain steps, how many steps.
            seconds: of the whole dispatch; None if a program was compiled in it.
            told: by row, its cycles; not read for plain steps.
        """
        if not cycles:
            return
        times = self._cases.get(case) or self._open(case)
        if seconds is None:
            times.untimed[drafts] += 1
        else:
            times.timings.setdefault(drafts, deque(maxlen=TIMINGS)).append(seconds / cycles)
        told = told if drafts else {}
        self.used[drafts] += cycles
        for row, its in told.items():
            own = self._rows.setdefault(row, _Acceptance(self._most, ROW_HALF_LIFE))
            if self.by_confidence:
                counts = [([cycle.accepted], len(cycle.drafts)) for cycle in its]
            else:
                counts = [([cycle.accepted for cycle in its], self._given.get(row, drafts))]
            for accepted, tried in counts:
                own.add(accepted, tried)
                self._texts[case[1]].add(accepted, tried)
        if self.by_confidence:
            for together in zip_longest(*told.values()):
                whole = [cycle for cycle in together if cycle and len(cycle.confidence) == self._most]
                if whole:  # of a shorter block nothing is known of the rest
                    self._chances[case[1]].add(whole)
        tokens = fmean(sum(1 + cycle.accepted for cycle in its) for its in told.values()) if told else cycles
        self._tokens += tokens
        known = times.known()
        if self._trial:
            rate = max(float(self._expected[j]) / time for j, time in known.items())
            self._lost += max(0.0, (known[drafts] * cycles if seconds is None else seconds) * rate - tokens)

    def forget(self, row: Hashable) -> None:
        """Note that a request is finished."""
        self._rows.pop(row, None)

    def __str__(self) -> str:
        times = self._cases.get(self._last)
        if not times or not times.timings:
            return "not timed yet"
        known, shown = times.known(), times.drafts if times.drafts > 0 else self._most
        what = f"{times.drafts} of {self._most}" if times.drafts > 0 else "plain steps"
        return f"{what} (plain step {known[0] * 1e3:.2f} ms, cycle of {shown} {known[shown] * 1e3:.2f} ms)"

    def _open(self, case: BatchCase) -> _Times:
        """Begin a case with the times of the one that is most like it."""
        like = {
            (abs(math.log(slots / case[0])), abs(math.log(capacity / case[2]))): times.known()
            for (slots, greedy, capacity), times in self._cases.items()
            if greedy == case[1] and (not times.fresh or {0, self._most} <= times.timings.keys())
        }
        fresh = not any(distance == 0 for distance, _ in like)
        self._allowed += FIRST_LOSS * all(other[:2] != case[:2] for other in self._cases)
        prior = like[min(like)] if like else {0: 1.0, self._most: GUESSED_RATIO}
        return self._cases.setdefault(case, _Times(prior, fresh))

    def _expect(self, greedy: bool, rows: Sequence[Hashable]) -> np.ndarray:
        """E [J + 1], tokens that a cycle of 0, 1, ..., J drafts gives the mean row: one, and the drafts accepted."""
        if self._chances[greedy].cycles and len(rows) > 1:  # alone a row shares with nobody
            return self._chances[greedy].expect()
        survival = self._survival(self._texts[greedy], rows)
        count = len(survival)
        # The first draft of every row, then the likeliest of all others; of one row these are the next ones.
        others = -np.sort(-survival[:, 1:], axis=None)
        gained = survival[:, 0].sum() + np.concatenate([[0.0], np.cumsum(others)])[::count]
        return 1 + np.concatenate([[0.0], gained / count])

    def _survival(self, texts: _Acceptance, rows: Sequence[Hashable]) -> np.ndarray:
        """The chance of each row's drafts to be accepted, and all before them: [R, J]."""
        nothing = np.zeros((2, self._most))
        own = np.array([self._rows[row].counts if row in self._rows else nothing for row in rows] or [nothing])
        chances = (own[:, 1] + ROW_WEIGHT * texts.chances()) / (own[:, 0] + ROW_WEIGHT)
        return np.cumprod(chances, axis=1)

    def _trial_of(self, times: _Times, rates: dict[int, float], rows: Sequence[Hashable], seen: int) -> tuple[int, int]:
        """Drafts and cycles of a dispatch that would teach something; no cycles if nothing is to be learned now."""
        if wanted := [j for j in (self._most, 0) if times.wanted(j)]:
            return min(wanted, key=lambda j: times.untimed[j] + times.timed(j)), 1
        other = 0 if times.drafts else self._most
        unsure = times.fresh and times.timed(other) < 2
        if times.drafts:
            rare = FIRST_PROBE if rates[0] * CLOSE > rates[times.drafts] else LAST_PROBE
            return 0, RETIMED * (self._waited >= (SOON if unsure else rare))
        known = times.known()
        if not any((j + 1) * known[0] > known[j] for j in known if j):  # even if all drafts were accepted
            return other, int(self._waited >= (LAST_PROBE if times.timed(other) > 2 else FIRST_PROBE))
        new = 2 * sum(row not in self._rows for row in rows) >= len(rows)
        if seen < ENOUGH or self._waited >= (SOON if new else self._patience):
            return other, max(2, -(-ENOUGH // max(1, len(rows))))
        return other, int(unsure and self._waited >= SOON)

    def _promising(self, times: _Times, best: float, seen: int) -> int:
        """Drafts that were never run here, if they are likely to be clearly better than this rate; else 0."""
        known = times.known()
        untried = [j for j in self._settings if j not in known and times.untimed[j] < TRIES]
        enough = ENOUGH if self.by_confidence else WELL_KNOWN  # confidences tell of every budget at once
        if not untried or seen < enough or any(times.wanted(j) for j in (0, self._most)):
            return 0
        likely = np.interp(untried, sorted(known), [known[j] for j in sorted(known)])
        rates = self._expected[untried] / likely
        return untried[int(rates.argmax())] if rates.max() > CLEAR * best else 0


def faded(cycles: float) -> float:
    """The share of so many cycles that counts on after a probe."""
    return min(0.5, LEFT / max(LEFT, cycles))


def survival(logits: np.ndarray, temperatures: np.ndarray | float = 1.0) -> np.ndarray:
    """The chances [n, J] that the first j proposals are accepted, by logits [n, J] and temperatures [J]."""
    return np.cumprod(0.5 + 0.5 * np.tanh(logits / temperatures / 2), axis=1)


def share_drafts(survival: np.ndarray, total: int) -> list[int]:
    """Drafts of each row: one at least, and of the others those that are likeliest to be accepted, so many in all.

    Args:
        survival: [R, J], chances that never rise along a row.
        total: from R to R·J.
    """
    rows = np.arange(len(survival)).repeat(survival.shape[1] - 1)
    best = np.argsort(-survival[:, 1:], axis=None, kind="stable")[: total - len(survival)]
    return (1 + np.bincount(rows[best], minlength=len(survival))).tolist()
