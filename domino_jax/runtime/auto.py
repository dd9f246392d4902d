"""How many draft tokens a cycle should verify, or none: chosen from the times of real work and observed acceptance.

Verifying J draft tokens takes t[J] and gives E[J] tokens on average; a plain step takes t[0] and gives one. The best
choice is the greatest E[J] / t[J], summed over the rows that are running. Both are learned from the dispatches of
generation themselves, so nothing runs that is not needed: the first few cycles have all drafts of a block, the next few
steps none, and from then on what is better goes on, while the other is tried again now and then.

Everything here is arithmetic on numbers that are the same in every process, so that all take the same decisions.
"""

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

# Before anything is seen each draft counts as accepted with this chance, and what is seen is weighed against it, or
# against the chance of the draft before, as if that had been seen so many times.
FIRST_GUESS, GUESS_WEIGHT = 0.7, 2.0
ROW_WEIGHT = 8.0  # cycles of its own after which a row is judged by itself as much as by all others
HALF_LIFE = 512.0  # cycles of a row after which what they told counts half: prompts differ
ENOUGH = 8  # cycles of a row to be seen before drafts are given up
FEWEST, HOPELESS = 3, 0.6  # ... or so few, where they seem to reach no more than this share of a plain step's rate
MARGIN = 1.03  # by how much another choice has to be better
CLOSE = 1.25  # choices that differ by less are timed again
TIMINGS = 5  # the last of a choice, of which the median counts
RETIME = 0.01  # of the time of decoding that goes to timing again
SHORT = 3  # cycles of a dispatch that may not pay
TRIES = 4  # dispatches of a choice without a time, since programs were compiled in them, after which it is left alone
# Dispatches of plain steps after which drafts are tried again: twice as many after each try, at most so many.
FIRST_PROBE, LAST_PROBE = 8, 512


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

    def add(self, accepted: Sequence[int], drafts: int) -> None:
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

    def chances(self) -> np.ndarray:
        """Of each draft [J] to be accepted after those before it."""
        chance, chances = FIRST_GUESS, []
        for tried, stood in zip(self.tried, self.stood, strict=True):
            chance = (stood + GUESS_WEIGHT * chance) / (tried + GUESS_WEIGHT)
            chances.append(chance)
        return np.array(chances)


def expected_tokens(chances: np.ndarray) -> np.ndarray:
    """E [..., J + 1], the tokens that a cycle of 0, 1, ..., J drafts gives: one, and the drafts accepted."""
    one = np.ones((*chances.shape[:-1], 1))
    return np.cumsum(np.concatenate([one, np.cumprod(chances, axis=-1)], axis=-1), axis=-1)


@dataclass
class _Case:
    """What is known of one kind of dispatch, such as those of eight greedy rows in one length bucket."""

    times: dict[int, deque[float]] = field(default_factory=dict)  # seconds of a cycle by its drafts, 0 for a step
    tries: dict[int, int] = field(default_factory=dict)  # dispatches without a time
    since: float = 0.0  # seconds since another choice was last timed
    owed: int = 0  # cycles of a row to be seen before drafts may be given up
    plain: int = 0  # dispatches of plain steps since drafts were last tried
    patience: int = FIRST_PROBE  # of them before the next try
    drafts: int = -1  # what goes on between the tries; 0 for plain steps, -1 before anything is known


class AutoDrafts:
    """A `slots.DraftPolicy` that learns what is faster."""

    def __init__(self, most: int):
        """Args: most: J of a whole block."""
        self.most = most
        # Each number of drafts is a program to compile: few are considered.
        self.candidates = sorted({most, *(round(most * share) for share in (0.25, 0.5, 0.75))} - {0})
        self._cases: dict[Hashable, _Case] = {}
        self._overall = AcceptanceEstimate(most)
        self._rows: dict[Hashable, AcceptanceEstimate] = {}
        self._last: Hashable = None
        self._decoding = self._compiling = 0.0  # seconds in all, and of the slowest program's compilation

    def next(self, case: Hashable, rows: Sequence[Hashable], longest: int) -> tuple[int, int]:
        """Draft tokens of the next dispatch, 0 for plain steps, and its cycles; see `slots.DraftPolicy`."""
        known, self._last = self._case(case), case
        for drafts in (self.most, 0):
            if self._time(case, drafts) is None and known.tries.get(drafts, 0) < TRIES:
                # The first dispatch of all compiles its program, and says nothing about time.
                return drafts, min(longest, SHORT if drafts and known.tries.get(drafts) else 1)
        rates = self.rates(case, rows)
        best = max(rates, key=lambda j: rates[j]) if rates else self.most
        if known.drafts in rates and rates[best] <= MARGIN * rates[known.drafts]:
            best = known.drafts
        drafting = {j: rate for j, rate in rates.items() if j}
        if best == 0 and drafting:
            hopeless = max(drafting.values()) < HOPELESS * rates[0] and known.owed <= ENOUGH - FEWEST
            if known.owed > 0 and not hopeless and self._can_pay(case):
                return self.most, min(longest, SHORT, -(-known.owed // len(rows)))
            known.plain += 1
            if known.plain > known.patience and self._can_pay(case):
                # Look again: the texts may have changed, and what they were like counts half from here on.
                self._overall.fade(0.5)
                known.plain, known.patience, known.owed = 0, min(2 * known.patience, LAST_PROBE), ENOUGH
            known.drafts = 0
            return 0, longest
        if best:
            known.plain, known.patience = 0, FIRST_PROBE
            if 0 in rates and rates[best] < CLOSE * rates[0] and self._due(case, 0):
                return 0, 1
        known.drafts = best
        return best, longest

    def observe(
        self,
        case: Hashable,
        drafts: int,
        cycles: int,
        seconds: float,
        compiling: float,
        accepted: Mapping[Hashable, list[int]],
    ) -> None:
        """Note what a dispatch did; see `slots.DraftPolicy`."""
        known = self._case(case)
        self._decoding += seconds - compiling
        if compiling:
            known.tries[drafts] = known.tries.get(drafts, 0) + 1
            self._compiling = max(self._compiling, compiling)
        elif cycles:
            known.since = 0.0 if drafts != known.drafts else known.since + seconds
            known.times.setdefault(drafts, deque(maxlen=TIMINGS)).append(seconds / cycles)
        for row, counts in accepted.items():
            if counts and drafts:
                self._overall.add(counts, drafts)
                self._rows.setdefault(row, AcceptanceEstimate(self.most)).add(counts, drafts)
                known.owed = max(0, known.owed - len(counts))

    def forget(self, row: Hashable) -> None:
        """Note that a request is at its end."""
        self._rows.pop(row, None)

    def rates(self, case: Hashable, rows: Sequence[Hashable]) -> dict[int, float]:
        """Tokens a second of all rows for each choice that has a time, or may be worth its first."""
        overall = self._overall.chances()
        chances = np.tile(overall, (max(len(rows), 1), 1))
        for i, row in enumerate(rows):
            if (own := self._rows.get(row)) is not None:
                chances[i] = (own.stood + ROW_WEIGHT * overall) / (own.tried + ROW_WEIGHT)
        expected = expected_tokens(chances).sum(axis=0)
        found = {}
        for drafts in (0, *self.candidates):
            seconds = self._time(case, drafts)
            if seconds is not None:
                found[drafts] = float(expected[drafts]) / seconds
        return found

    def _case(self, case: Hashable) -> _Case:
        if case not in self._cases:
            self._cases[case] = _Case(owed=max(0, ENOUGH - self._overall.seen))
        return self._cases[case]

    def _time(self, case: Hashable, drafts: int) -> float | None:
        """Seconds of a cycle: the median of the last ones, or an estimate from other choices and other cases."""
        known = self._cases.get(case, _Case())
        if known.times.get(drafts):
            return float(np.median(known.times[drafts]))
        if known.times:  # another case tells how the two compare
            have = next(iter(known.times))
            for other in reversed(self._cases.values()):
                if other is not known and other.times.get(drafts) and other.times.get(have):
                    ratio = np.median(other.times[drafts]) / np.median(other.times[have])
                    return float(np.median(known.times[have]) * ratio)
        timed = known.times.get(0) and known.times.get(self.most)
        if 0 < drafts < self.most and timed and known.tries.get(drafts, 0) < TRIES:
            # It costs a program: in as long as was decoded so far it has to win what compiling one takes.
            plain, whole = (float(np.median(known.times[j])) for j in (0, self.most))
            price = 1 + self._compiling / max(self._decoding, 1e-9)
            return price * (plain + (whole - plain) * drafts / self.most)
        return None

    def _can_pay(self, case: Hashable) -> bool:
        """Whether drafts would beat plain steps if every one were accepted."""
        times = {j: self._time(case, j) for j in (0, *self.candidates)}
        plain = times.pop(0)
        return plain is None or any(t is not None and (j + 1) * plain > t for j, t in times.items())

    def _due(self, case: Hashable, drafts: int) -> bool:
        """Whether enough was decoded since for another choice to be timed again."""
        seconds = self._time(case, drafts)
        return seconds is not None and SHORT * seconds < RETIME * self._cases[case].since

    def __str__(self) -> str:
        known = self._cases.get(self._last)
        if known is None or known.drafts < 0:
            return "nothing chosen yet"
        said = f"{known.drafts} of {self.most}" if known.drafts else "plain steps"
        plain, whole = self._time(self._last, 0), self._time(self._last, self.most)
        if plain is None or whole is None:
            return said
        return f"{said} (plain step {plain * 1e3:.2f} ms, cycle of {self.most} {whole * 1e3:.2f} ms)"
