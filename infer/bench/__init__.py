"""Measure decoding: the lean loop, DFlash (head off) and Domino in one run, in turn.

    python -m infer.bench --batch-sizes 1 4 --new-tokens 128 --json bench.json

Every round runs each mode once, so that a machine whose speed drifts treats them alike; figures are
medians over the rounds, and the ratios are what to quote from a shared machine. Stop tokens are
ignored, so every sequence has the same length.
"""

from infer.bench.command import main
from infer.bench.memory import megabytes
from infer.bench.modes import DFLASH, DOMINO, LEAN, TRANSFORMERS, head_off, with_drafts
from infer.bench.options import Bench
from infer.bench.parts import phases
from infer.bench.prompts import choose, distinct, read_prompts
from infer.bench.report import show
from infer.bench.rounds import batches, run_ours, transformers_runner
from infer.bench.sweep import measure

__all__ = [
    "DFLASH",
    "DOMINO",
    "LEAN",
    "TRANSFORMERS",
    "Bench",
    "batches",
    "choose",
    "distinct",
    "head_off",
    "main",
    "measure",
    "megabytes",
    "phases",
    "read_prompts",
    "run_ours",
    "show",
    "transformers_runner",
    "with_drafts",
]
