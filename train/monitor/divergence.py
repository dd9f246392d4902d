"""Divergence: losses or gradients that are not finite, and gradient norms far above the usual."""

from collections import deque
from collections.abc import Iterable
from statistics import median

USUAL = 100  # newest steps whose median gradient norm is the usual one
LEAST = 20  # steps before a norm is compared with the usual one


class DivergenceMonitor:
    """Finds the first step that diverged; it is shown each step's loss and gradient norm, in order."""

    def __init__(self, ratio: float, before: Iterable[float] = ()):
        """Args:
        ratio: a norm this many times the median of the last steps is an explosion.
        before: norms of earlier steps of a resumed run, so that the step that stopped it stops it again.
        """
        self.ratio = ratio
        self._norms: deque[float] = deque(before, maxlen=USUAL)

    def problem(self, finite: bool, loss: float, norm: float) -> str | None:
        """What is wrong with a step, in words; None if nothing is."""
        if not finite:
            return f"the loss or its gradient is not finite (loss {loss}, gradient norm {norm})"
        usual = median(self._norms) if len(self._norms) >= LEAST else 0.0  # 0 while λ is 1 and the head alone learns
        if usual and norm > self.ratio * usual:
            return f"the gradient has exploded (norm {norm:.3g}, usually {usual:.3g}; loss {loss:.3g})"
        self._norms.append(norm)
        return None
