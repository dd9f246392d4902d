"""Measure decoding: the autoregressive baseline, DFlash (without the head) and Domino in one run, in turn.

    python -m infer.bench --batch-sizes 1 4 --new-tokens 128 --json bench.json

Every round runs each mode once, so that a machine whose speed drifts treats them alike; figures are
medians over the rounds, and the ratios are what to quote from a shared machine. Stop tokens are
ignored, so every sequence has the same length.
"""

from infer.bench.command import main

__all__ = ["main"]
