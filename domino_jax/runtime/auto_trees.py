"""Chains, trees and plain steps: which of them the next dispatch takes, chosen as `auto` chooses drafts.

Each form, chains or trees of one size, has an `AutoDrafts` of its own, which weighs it against plain steps. Of the
forms that one decides whose drafts give the most tokens a second; the others are tried again now and then.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from domino_jax.decode import DecodeConfig
from domino_jax.drafters.base import Branching, Calibrated
from domino_jax.runtime.auto import CLEAR, CLOSE, MARGIN, AutoDrafts
from domino_jax.runtime.slots import BatchCase, Cycle, every_program
from domino_jax.sharding import row_shards

PROBE, RARE_PROBE = 128, 1024  # dispatches before another form is tried again, where it is close and where it is not


class AutoTrees:
    """A `slots.DraftPolicy` for a drafter of trees, which also makes chains of fewer drafts."""

    by_confidence = False

    def __init__(self, longest_chain: int, nodes: int):
        """Args:
        longest_chain: drafts of the longest chain.
        nodes: N, of the largest tree. Trees of half of that are the third form, where a chain is shorter.
        """
        self._chains, self._trees = AutoDrafts(longest_chain), AutoDrafts(nodes, whole=True)
        self._small = AutoDrafts(nodes // 2, whole=True) if nodes // 2 > longest_chain else None
        self._forms = [form for form in (self._chains, self._trees, self._small) if form]
        self._best = self._now = self._chains
        self._waited = dict.fromkeys(self._forms, 0)  # dispatches since each was taken

    def next(
        self, case: BatchCase, rows: Sequence[Hashable], longest: int, ready: Callable[[int], bool] = every_program
    ) -> tuple[int, int]:
        """See `slots.DraftPolicy`."""
        self._now = self._form(case, rows, ready)
        self._waited = {form: 0 if form is self._now else waited + 1 for form, waited in self._waited.items()}
        return self._now.next(case, rows, longest, ready)

    def _form(self, case: BatchCase, rows: Sequence[Hashable], ready: Callable[[int], bool]) -> AutoDrafts:
        """Whose turn it is."""
        there = [form for form in self._forms if form is self._trees or ready(form.most)]
        rates = {form: form.rate(case, rows) for form in there}
        known = {form: rate for form, rate in rates.items() if rate is not None}
        for form in there:
            if form not in known and (form is not self._small or self._is_promising(case, rows, known)):
                return form
        best = max(known, key=lambda form: known[form])
        if known[best] > MARGIN * known.get(self._best, 0.0):
            self._best = best
        for form in known:  # the best one never waits so long
            close = known[form] * CLOSE > known[self._best]
            if self._waited[form] >= (PROBE if close else RARE_PROBE):
                return form
        return self._best

    def _is_promising(self, case: BatchCase, rows: Sequence[Hashable], known: dict[AutoDrafts, float]) -> bool:
        """Whether small trees may be clearly faster: as many tokens as large ones give, for a time between."""
        if self._small is None or not {self._chains, self._trees} <= known.keys():
            return False
        (tokens, slow), (_, fast) = (form.expectation(case, rows) for form in (self._trees, self._chains))
        part = (self._small.most - self._chains.most) / (self._trees.most - self._chains.most)
        return tokens / (fast + part * (slow - fast)) > CLEAR * max(known.values())

    @property
    def used(self) -> Counter[int]:
        """See `AutoDrafts`."""
        return sum((form.used for form in self._forms), Counter())

    def lengths(self, rows: Sequence[Hashable], drafts: int) -> None:
        """As many drafts of every row."""

    def observe(
        self,
        case: BatchCase,
        drafts: int,
        cycles: int,
        seconds: float | None,
        told: Mapping[Any, Sequence[Cycle]],
    ) -> None:
        """See `slots.DraftPolicy`."""
        self._now.observe(case, drafts, cycles, seconds, told)

    def forget(self, row: Hashable) -> None:
        """See `slots.DraftPolicy`."""
        for form in self._forms:
            form.forget(row)

    def __str__(self) -> str:
        return f"{'chains' if self._best is self._chains else f'trees of {self._best.most}'}, {self._best}"


def auto_policy(configs: DecodeConfig) -> AutoDrafts | AutoTrees:
    """The policy of `--num-draft-tokens auto` for a target and its drafter, in the mesh that is in context."""
    drafter = configs.drafter
    if isinstance(drafter, Branching) and drafter.longest_chain:
        return AutoTrees(drafter.longest_chain, configs.proposals)
    chances = isinstance(drafter, Calibrated) and drafter.calibrated
    # Only rows of a batch that lies on one device, or on all of them whole, can differ.
    by_confidence = chances and not configs.branching and row_shards() == 1
    return AutoDrafts(configs.proposals, configs.branching, by_confidence=by_confidence)
