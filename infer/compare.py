"""--compare: the same prompts with drafts and without, timed in turns."""

import dataclasses
import statistics
from typing import Any, NamedTuple

from infer.engine import Decoding, Engine, Sequence, tokens_per_second

RUNS = 3  # of each way; the median counts


class Comparison(NamedTuple):
    """A batch with drafts and by the autoregressive baseline."""

    tokens_per_second: float | None  # None where the prefill's token was the only one
    baseline_tokens_per_second: float | None
    identical: dict[int, bool] | None  # by row; None for samples by rejection, which differ by design

    @property
    def speedup(self) -> float | None:
        """With drafts over without."""
        ours, theirs = self.tokens_per_second, self.baseline_tokens_per_second
        return ours / theirs if ours and theirs else None

    def record(self, row: int) -> dict[str, Any]:
        """What --json says of one row."""
        return {
            "tokens_per_second": self.tokens_per_second,
            "lean_tokens_per_second": self.baseline_tokens_per_second,
            "speedup": self.speedup,
            "identical": self.identical and self.identical[row],
        }


def compare(engine: Engine, sequences: list[Sequence], how: Decoding, stops: tuple[str, ...]) -> Comparison:
    """Time both ways in turns, warmed up, on the prompts of sequences that were generated with drafts.

    Samples by rejection follow the same distribution in both ways but use their random numbers differently: their
    tokens are not compared.
    """

    def again(speculative: bool) -> list[Sequence]:
        fresh = [engine.sequence(s.prompt, s.limit, s.row, stops)[0] for s in sequences]
        engine.generate(fresh, dataclasses.replace(how, speculative=speculative))
        return fresh

    baseline = again(False)
    rates: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(RUNS):
        for speculative, collected in rates.items():
            fresh = again(speculative)
            rate = tokens_per_second(fresh, engine.seconds["decode"])
            if rate is not None:
                collected.append(rate)
    ours, theirs = (statistics.median(found) if found else None for found in rates.values())
    identical = None
    if how.sampling.temperature == 0 or how.sampling.coupled:
        identical = {s.row: s.tokens == other.tokens for s, other in zip(sequences, baseline, strict=True)}
    return Comparison(ours, theirs, identical)
