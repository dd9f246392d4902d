"""Sequential temperature scaling: how sure a drafter is, made true (DSpark, arXiv 2607.05147).

The chance that the first j proposals of a cycle are accepted is the product of σ(logit_i / T_i) for i up to j. One
after another, with those before it as they are, T_j is the one of a grid with which that chance is nearest to what came
true: by its expected calibration error.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from domino_jax.runtime.auto import survival
from domino_jax.runtime.plotting import line_style

BINS = 20  # of equal width, as in DeepSpec's evaluator
GRID = np.geomspace(1 / 8, 8, 97).round(4)  # vLLM's range; the authors' own grid is not published
CURVES = 4  # places in a diagram, at most


class Cycles(NamedTuple):
    """What was seen in n cycles of J proposals, all of which were verified."""

    logits: np.ndarray  # [n, J] of the confidences, as the drafter gives them
    accepted: np.ndarray  # [n] proposals accepted
    second: np.ndarray  # [n] bool, of the second half of the prompts

    @property
    def stood(self) -> np.ndarray:
        """Whether the first j proposals were accepted, [n, J] bool."""
        return self.accepted[:, None] > np.arange(self.logits.shape[1])

    def where(self, rows: np.ndarray) -> "Cycles":
        """Some of them."""
        return Cycles(*(x[rows] for x in self))


def calibration_error(chances: np.ndarray, stood: np.ndarray) -> float:
    """Expected calibration error: the mean over n cycles of what a bin's chances and its share that came true differ.

    Args:
        chances: [n], from 0 to 1.
        stood: [n] bool.
    """
    off = np.bincount(_bins(chances), chances - stood, BINS)
    return float(np.abs(off).sum() / len(chances))


def brier_score(chances: np.ndarray, stood: np.ndarray) -> float:
    """The mean squared difference of chances [n] and what came true [n]."""
    return float(np.mean((chances - stood) ** 2))


def fit_temperatures(cycles: Cycles) -> np.ndarray:
    """The temperatures [J], fitted one after another; of equally good ones the nearest to 1."""
    nearest_first = GRID[np.argsort(np.abs(np.log(GRID)), kind="stable")]
    before, found = np.ones(len(cycles.logits)), []
    for logits, stood in zip(cycles.logits.T, cycles.stood.T, strict=True):
        chances = [before * survival(logits[:, None], t)[:, 0] for t in nearest_first]
        best = int(np.argmin([calibration_error(chance, stood) for chance in chances]))
        found.append(nearest_first[best])
        before = chances[best]
    return np.array(found)


def calibrated_elsewhere(cycles: Cycles) -> np.ndarray:
    """The chances [n, J] of each half's cycles by the temperatures that are fitted to the other half's."""
    chances = np.empty_like(cycles.logits)
    for half in (False, True):
        mine = cycles.second == half
        chances[mine] = survival(cycles.logits[mine], fit_temperatures(cycles.where(~mine)))
    return chances


class Calibration(NamedTuple):
    """What calibrating did."""

    cycles: Cycles
    temperatures: np.ndarray  # [J], fitted to all cycles
    before: np.ndarray  # [n, J], the chances as they were
    after: np.ndarray  # [n, J], `calibrated_elsewhere`: not of the cycles that the temperatures were fitted to

    def rows(self) -> list[dict[str, Any]]:
        """The figures of each place in a block."""
        found: list[dict[str, Any]] = []
        for j, temperature in enumerate(self.temperatures):
            stood = self.cycles.stood[:, j]
            reached = self.cycles.accepted >= j
            row: dict[str, Any] = {"position": j + 1, "temperature": float(temperature)}
            row |= {"cycles": int(reached.sum()), "accepted": float(stood[reached].mean()) if reached.any() else None}
            for name, chances in (("before", self.before[:, j]), ("after", self.after[:, j])):
                row |= {f"ece_{name}": calibration_error(chances, stood), f"brier_{name}": brier_score(chances, stood)}
            found.append(row)
        return found


def calibrate(cycles: Cycles) -> Calibration:
    """Fit temperatures to cycles of both halves of the prompts."""
    ones = np.ones(cycles.logits.shape[1])
    return Calibration(cycles, fit_temperatures(cycles), survival(cycles.logits, ones), calibrated_elsewhere(cycles))


def plot_reliability(found: Calibration, path: Path) -> None:
    """Share of prefixes that were accepted over the chance that they would be, before and after; a style a place."""
    from matplotlib.figure import Figure

    places = np.unique(np.linspace(0, len(found.temperatures) - 1, CURVES).round().astype(int))
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels: Any = figure.subplots(1, 2, sharey=True)
    for axis, title, chances in zip(panels, ("before", "after"), (found.before, found.after), strict=True):
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        for number, j in enumerate(places):
            bins = _bins(chances[:, j])
            count = np.bincount(bins, minlength=BINS)
            there = count > 0
            predicted, true = (
                np.bincount(bins, x, BINS)[there] / count[there] for x in (chances[:, j], found.cycles.stood[:, j])
            )
            label = f"first {j + 1}" if j else "the first"
            axis.plot(predicted, true, label=label, markersize=4, **line_style(number, marker=True))
        axis.set_title(title)
        axis.set_xlabel("chance that so many proposals are accepted")
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("share of cycles in which they were")
    panels[0].legend()
    figure.savefig(path, dpi=110, format="png")


def _bins(chances: np.ndarray) -> np.ndarray:
    return np.minimum((chances * BINS).astype(int), BINS - 1)
