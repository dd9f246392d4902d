"""How many drafts a cycle should verify, or none: chosen from measured times and observed acceptance.

Verifying J drafts costs t[J] and gives E[J] tokens on average, a plain step costs t[0] and gives one. The best
choice is the greatest E[J] / t[J]. The times are measured at the first batch of each number of rows (`Engine`), and
those that decide now and then again; E is estimated from the drafts accepted so far (`AcceptanceEstimate`); `Chooser`
puts the two together before each dispatch.

Everything here is arithmetic on numbers that are the same in every process, so that all take the same decisions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

MOST_CANDIDATES = 7  # each is a program to compile
BUDGET = 1.5  # seconds of calibration on the device, about
DISPATCH = 0.015  # seconds of one timed dispatch, if it can be had by whole cycles
ROUNDS = 2, 5  # of timings in turn, least and most; the shortest counts: what else the machine does can only add
IN_A_ROW = 3  # dispatches of a program, of which the first finds the machine's caches full of another's data

# One calibration may be wrong by more than choices differ by: what else the machine did was not the same for all.
SHARE, LATER_SHARE = 0.02, 0.005  # of the time of decoding that goes to timing again, until it was timed TIMINGS times
CLOSE = 1.25  # choices that differ by less are timed again
TIMINGS = 5  # the last of a choice, of which the median counts

# Before anything is seen each draft counts as accepted with this chance, and what is seen is weighed against it, or
# against the chance of the draft before, as if that had been seen so many times.
FIRST_GUESS, GUESS_WEIGHT = 0.7, 2.0
HALF_LIFE = 512.0  # cycles of a row after which what they told counts half: prompts differ
ENOUGH = 8  # cycles of a row to be seen before drafts are given up
MARGIN = 1.03  # by how much another choice has to be better
# Dispatches of plain steps after which drafts are tried again: twice as many after each try, at most so many.
FIRST_PROBE, LAST_PROBE = 32, 512
STEADY = 8  # batches, the mean of which is how even batches are


def candidates(most: int) -> list[int]:
    """Numbers of drafts to consider, spread evenly from 1 to `most`."""
    return sorted({round(j) for j in np.linspace(1, most, min(most, MOST_CANDIDATES))})


Time = Callable[[int, int], float]


def calibrate(
    time: Time, most: int, longest: Callable[[int], int], agree: Callable[[list[float]], list[float]]
) -> dict[int, float]:
    """Seconds of a plain step (0) and of a cycle with each candidate J: {J: seconds}.

    Args:
        time: runs so many cycles (at least one, and fewer where there is no room) of J drafts in one dispatch, and
            returns the seconds one took. Called the same way in every process.
        most: J of a whole block.
        longest: the cycles of J drafts that a dispatch of generation has; none timed is longer.
        agree: one process's numbers for all of them.
    """
    choices = [0, *candidates(most)]
    for drafts in choices:  # compiles
        time(drafts, 1)
    once = agree([time(drafts, 1) for drafts in choices])
    counts = [_cycles(longest(j), seconds) for j, seconds in zip(choices, once, strict=True)]
    whole = sum(count * seconds for count, seconds in zip(counts, once, strict=True))
    if whole > BUDGET:  # a cycle this long needs no repetition
        return dict(zip(choices, once, strict=True))
    rounds = max(ROUNDS[0], min(ROUNDS[1], round(BUDGET / IN_A_ROW / whole)))
    shortest = dict.fromkeys(choices, float("inf"))
    for _ in range(rounds):
        for drafts, count in zip(choices, counts, strict=True):
            shortest[drafts] = min(shortest[drafts], *(time(drafts, count) for _ in range(IN_A_ROW)))
    return dict(zip(choices, agree(list(shortest.values())), strict=True))


def _cycles(longest: int, seconds: float) -> int:
    """How many cycles, which take so many seconds each, a timed dispatch has."""
    return max(1, min(longest, round(DISPATCH / seconds)))


class AcceptanceEstimate:
    """Estimates how many of J drafts are accepted, from cycles that had any number of them.

    Draft j of a cycle is tried if it was proposed and the j - 1 before it were accepted; the chance of the j-th is
    estimated among those. A cycle of few drafts thus says nothing about what would have come after them, and the
    chance of a draft that was never tried is that of the one before.
    """

    def __init__(self, most: int):
        """Args: most: J of a whole block."""
        self.tried = np.zeros(most)
        self.stood = np.zeros(most)
        self.seen = 0  # cycles

    def add(self, accepted: list[int], drafts: int) -> None:
        """Note cycles of `drafts` drafts each, by how many of them were accepted."""
        self.fade(0.5 ** (len(accepted) / HALF_LIFE))
        place, counts = np.arange(drafts), np.array(accepted)[:, None]
        self.tried[:drafts] += (counts >= place).sum(axis=0)
        self.stood[:drafts] += (counts > place).sum(axis=0)
        self.seen += len(accepted)

    def fade(self, share: float) -> None:
        """Let what was seen so far count less."""
        self.tried *= share
        self.stood *= share

    def expected(self) -> np.ndarray:
        """E [J + 1], the tokens that a cycle of 0, 1, ..., J drafts gives: one, and the drafts accepted."""
        chance, reached, expected = FIRST_GUESS, 1.0, [1.0]
        for tried, stood in zip(self.tried, self.stood, strict=True):
            chance = (stood + GUESS_WEIGHT * chance) / (tried + GUESS_WEIGHT)
            reached *= chance
            expected.append(expected[-1] + reached)
        return np.array(expected)


@dataclass
class Chooser:
    """Chooses for batches of one number of rows, from the times of that number."""

    times: dict[int, float]  # seconds of a cycle by its drafts, 0 for a plain step
    acceptance: AcceptanceEstimate  # shared by all numbers of rows
    drafts: int = -1  # the choice; 0 for plain steps, -1 before the first
    # A batch lasts until its slowest row is through, and drafts let rows differ: the pace of a batch over the mean
    # pace of its rows, as it has been lately.
    evenness: float = 1.0
    batches: int = 0  # that told about it
    owed: int = field(init=False)  # cycles of a row still to be seen before drafts may be given up
    plain: int = 0  # dispatches of plain steps since drafts were last tried
    patience: int = FIRST_PROBE  # of them before the next try
    unchecked: float = 0.0  # seconds of decoding since times were last measured
    # Of each choice, over a plain step of about the same moment: what else slows the machine down slows both.
    timings: dict[int, list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self.owed = max(0, ENOUGH - self.acceptance.seen)
        self.timings = {j: [seconds / self.times[0]] for j, seconds in self.times.items()}

    @property
    def worthwhile(self) -> list[int]:
        """The J that would beat plain steps if every draft were accepted."""
        return [j for j, seconds in self.times.items() if j and (j + 1) / seconds > 1 / self.times[0]]

    def rates(self, alone: bool = False) -> dict[int, float]:
        """Tokens a second of a row for each choice; `alone` where a batch has one row left to finish."""
        expected, even = self.acceptance.expected(), 1.0 if alone else self.evenness
        return {j: float(expected[j]) * (even if j else 1.0) / seconds for j, seconds in self.times.items()}

    @property
    def rival(self) -> int:
        """The best drafts, if another choice is so close to them that their time decides; else 0."""
        first, second = sorted(self.rates().items(), key=lambda choice: -choice[1])[:2]
        return (first[0] or second[0]) if second[1] * CLOSE > first[1] else 0

    @property
    def due(self) -> bool:
        """Whether the rival is to be timed again, which is done when a batch begins."""
        rival = self.rival
        if not rival:
            return False
        share = SHARE if len(self.timings[rival]) < TIMINGS else LATER_SHARE
        return sum(2 * max(DISPATCH, self.times[j]) for j in (0, rival)) < share * self.unchecked

    def recheck(self, time: Time, longest: Callable[[int], int], agree: Callable[[list[float]], list[float]]) -> None:
        """Time plain steps and the rival in turn; see `calibrate` for what it is given.

        The best is often the one that was timed too short. That is found out, and then the next best is the rival.
        """
        rival = self.rival
        counts = {j: _cycles(longest(j), self.times[j]) for j in (0, rival)}
        # The first of two finds the machine's caches full of another's data.
        plain, drafts = agree([min(time(j, count), time(j, count)) for j, count in counts.items()])
        self.timings[rival].append(drafts / plain)
        self.times[rival] = self.times[0] * float(np.median(self.timings[rival][-TIMINGS:]))
        self.unchecked = 0.0

    def next(self, active: int, longest: int) -> tuple[int, int]:
        """J of the next dispatch, 0 for plain steps, and its number of cycles.

        Args:
            active: rows that are not finished.
            longest: cycles of drafts that a dispatch may have.
        """
        if not self.worthwhile:
            self.drafts = 0
            return 0, longest
        if not self.owed:
            if self._best(alone=active == 1):
                self.plain, self.patience = 0, FIRST_PROBE
                return self.drafts, longest
            self.plain += 1
            if self.plain <= self.patience:
                return 0, longest
            # Look again: the texts may have changed, and what they were like counts half from here on.
            self.acceptance.fade(0.5)
            self.evenness, self.owed = (1 + self.evenness) / 2, ENOUGH
            self.plain, self.patience = 0, min(2 * self.patience, LAST_PROBE)
        # The whole block tells most; a short dispatch, since it may not pay.
        self.drafts = max(self.worthwhile)
        return self.drafts, min(longest, -(-self.owed // active))

    def _best(self, alone: bool) -> int:
        """Choose anew, but change only for what is clearly better."""
        rates = self.rates(alone)
        best = max(rates, key=lambda j: rates[j])
        if self.drafts not in rates or rates[best] > MARGIN * rates[self.drafts]:
            self.drafts = best
        return self.drafts

    def observe(self, accepted: list[int]) -> None:
        """Note the drafts accepted in the cycles of a dispatch that `next` asked for, all rows together."""
        if accepted:
            self.acceptance.add(accepted, self.drafts)
            self.owed = max(0, self.owed - len(accepted))

    def finish(self, tokens: list[int], cycles: list[int], seconds: float) -> None:
        """Note how a batch went.

        Args:
            tokens, cycles: of each row, where drafts were used throughout: they tell how even the batch was.
            seconds: that decoding took.
        """
        self.unchecked += seconds
        if max(cycles, default=0) > 0:
            even = (sum(cycles) / max(cycles)) / (sum(tokens) / max(tokens))
            self.batches += 1
            self.evenness += (even - self.evenness) / min(self.batches, STEADY)

    def __str__(self) -> str:
        plain, most = self.times[0] * 1e3, max(self.times)
        if self.drafts <= 0:
            j, what = max(self.times), "plain steps"
        else:
            j, what = self.drafts, f"{self.drafts} of {most}"
        return f"{what} (plain step {plain:.2f} ms, cycle of {j} {self.times[j] * 1e3:.2f} ms)"
