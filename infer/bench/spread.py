"""The spread of figures over several runs of the benchmark, as the Markdown tables of the pages.

    python -m infer.bench.spread run-1.json run-2.json run-3.json

A run on a shared machine differs from the next by more than its rounds do. So pages quote the lowest, the median and
the highest of at least three runs of one command, all from one commit without local changes.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from domino_jax.errors import DominoError
from domino_jax.runtime.command import end_process, run_command
from domino_jax.runtime.parsing import parse_json, read_text
from infer.bench.rows import DFLASH, DOMINO, LEAN, TRANSFORMERS, Row

FEWEST_RUNS = 3
NAMES = {
    LEAN: "autoregressive baseline",
    DFLASH: "the same drafter without its head",
    DOMINO: "**Domino**",
    TRANSFORMERS: "transformers' `generate`",
}
HEADINGS = ("", "τ", "over the baseline", "over transformers", "cycle / step")
SETTINGS = [
    "commit",
    "device",
    "processor",
    "platform",
    "jax",
    "model",
    "draft",
    "dtype",
    "matrices",
    "head_candidates",
    "confidence_threshold",
    "prompt_lookup_max",
    "prompt_lookup_min",
    "target_weights",
    "draft_weights",
    "tree_nodes",
    "tree_lanes",
    "tree_candidates",
    "tree_correction",
    "weights",
    "simulated_tau",
    "context",
    "new_tokens",
    "num_prompts",
    "min_distinct",
    "rounds",
    "temperature",
]

Case = tuple[int, str, object]  # batch size, mode, drafts of a cycle


@dataclass(frozen=True)
class Spread:
    """Print lowest, median and highest of several runs of one benchmark command, as Markdown."""

    runs: Positional[tuple[Path, ...]]
    """files that `python -m infer.bench --json FILE` wrote, one a run"""


def spread_tables(runs: Sequence[Path]) -> str:
    """A Markdown table for each batch size of the runs.

    Args:
        runs: JSON files of the benchmark.

    Raises:
        DominoError: there are fewer than three, or they differ in commit or settings, or the commit had local changes.
    """
    if len(runs) < FEWEST_RUNS:
        raise DominoError(f"{len(runs)} runs given, expected at least {FEWEST_RUNS}: run the command again.")
    read = [_read_run(path) for path in runs]
    first = read[0]
    commit = next(iter(first.values())).get("commit", "")
    if not commit or commit.endswith("-dirty"):
        raise DominoError(
            f"{runs[0]} is of commit {commit or 'none'}, expected one without local changes: commit, then run it again."
        )
    for path, rows in zip(runs, read, strict=True):
        if rows.keys() != first.keys():
            raise DominoError(f"{path} has other modes or batch sizes than {runs[0]}: give runs of one command.")
        for case, row in rows.items():
            differing = [key for key in SETTINGS if row.get(key) != first[case].get(key)]
            if differing:
                raise DominoError(f"{path} has another {differing[0]} than {runs[0]}: give runs of one command.")
    return "\n\n".join(_table(read, batch) for batch in dict.fromkeys(batch for batch, _, _ in first))


def _read_run(path: Path) -> dict[Case, Row]:
    """The rows of one run by what they measured."""
    try:
        rows = parse_json(read_text(path))
        return {(row["batch"], row["mode"], row["drafts"]): row for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DominoError(f"{path} is no file of python -m infer.bench --json: {error}.") from None


def _table(runs: Sequence[dict[Case, Row]], batch: int) -> str:
    cases = [case for case in runs[0] if case[0] == batch]
    several = len({drafts for _, mode, drafts in cases if mode == DOMINO}) > 1
    theirs = (batch, TRANSFORMERS, 0)
    lines = [f"Batch {batch}", ""]
    lines += ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    for case in cases:
        name = NAMES.get(case[1], case[1]) + (f", {case[2]} drafts" if several and case[2] else "")
        rows = [run[case] for run in runs]
        # Ratios within a run: the modes took turns, so both sides saw the same machine.
        over = [
            row["speed_over_lean"] / run[theirs]["speed_over_lean"]
            for row, run in zip(rows, runs, strict=True)
            if theirs in run
        ]
        cells = (
            _range([row["tau"] for row in rows if row.get("tau") is not None], ""),
            _range([row["speed_over_lean"] for row in rows]),
            _range(over),
            _range([row["cycle_over_step"] for row in rows if case[1] != TRANSFORMERS], ""),
        )
        lines.append("| " + " | ".join((name, *cells)) + " |")
    return "\n".join(lines)


def _range(values: Sequence[float], unit: str = "×") -> str:
    """Lowest, median and highest; one value where they do not differ; nothing where there is none."""
    if not values:
        return ""
    ends = min(values), statistics.median(values), max(values)
    words = [f"{value:.2f}" for value in ends]
    return words[1] + unit if len(set(words)) == 1 else " – ".join(words) + unit


def main(argv: Sequence[str] | None = None, prog: str = "python -m infer.bench.spread") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Spread, lambda options: print(spread_tables(options.runs)), argv, prog=prog)


if __name__ == "__main__":
    end_process(main())
