"""Who gets the drafts of a budget: every row as many, rows whose drafts stood before, or those the drafter is sure of.

    python -m infer.bench shares --draft calibrated --batch-size 8 --temperatures 0 0.7 --json shares.json

The target runs as many tokens a cycle either way; what differs is how many of them it accepts. Only cycles count in
which all rows run. Times are not measured: acceptance does not depend on the machine. Sampled answers are drawn and
verified by rejection; the output is the target's each time.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from convert.options import check_count
from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError, end_process, run_command
from infer.bench.kept import AnswerOptions, keep_rows, load_answering

if TYPE_CHECKING:
    from convert.loading import LoadedModel
    from domino_jax.runtime.slots import Completion, Cycle, DraftPolicy, Slots

EQUALLY = "as many of every row"


@dataclass(frozen=True)
class SharedDrafts(AnswerOptions):
    """Compare ways of sharing a cycle's drafts among rows, at several budgets: tokens of a cycle."""

    seed: int = 0
    """of sampled answers"""


def check_shares(options: SharedDrafts) -> None:
    """Refuse values that make no sense.

    Raises:
        UsageError: one does not.
    """
    options.check_answers()
    check_count("batch_size", options.batch_size, least=2)
    check_count("seed", options.seed, least=0)
    if options.num_prompts < options.batch_size:
        raise UsageError(f"--num-prompts {options.num_prompts} is less than --batch-size {options.batch_size}.")
    drafting = options.model.drafting
    for flag, given in (("--tree", drafting.tree), ("--confidence-threshold", drafting.confidence_threshold)):
        if given is not None:
            raise UsageError(f"rows share the drafts of whole chains: leave {flag} out.")


def sharing_ways(loaded: "LoadedModel", budget: int) -> dict[str, Callable[[], "DraftPolicy"]]:
    """Ways of sharing so many drafts of the mean row."""
    from domino_jax.runtime.auto import AutoDrafts
    from domino_jax.runtime.slots import BatchCase, FixedDrafts, every_program

    class ByAcceptance(AutoDrafts):
        """Always of the same budget."""

        def next(
            self, case: BatchCase, rows: Sequence[Hashable], longest: int, ready: Callable[[int], bool] = every_program
        ) -> tuple[int, int]:
            self._last = case  # whose acceptance `lengths` goes by
            return budget, longest

    return {
        EQUALLY: lambda: FixedDrafts(budget),
        "by earlier acceptance": lambda: ByAcceptance(loaded.configs.proposals),
        "by confidence": lambda: FixedDrafts(budget, by_confidence=True),
    }


def measure_shares(options: SharedDrafts) -> Iterator[dict[str, Any]]:
    """A row of figures for each temperature, budget and way.

    Raises:
        DominoError: a model or file is wrong, the file has too few prompts, the drafter is not calibrated, or the mesh
            divides the rows.
    """
    from rich.console import Console

    from domino_jax.drafters.base import Calibrated
    from domino_jax.runtime.provenance import git_commit
    from domino_jax.runtime.slots import Completion, Request, Slots, verified_sizes
    from domino_jax.sampling import SamplingParams
    from domino_jax.sharding import row_shards

    o, console = options, Console(stderr=True)
    loaded, prompts, _ = load_answering(o, console)
    drafter = loaded.configs.drafter
    if not isinstance(drafter, Calibrated) or not drafter.calibrated:
        raise DominoError(
            "the drafter's confidences are no chances: give --draft one that python -m train calibrate has written, "
            "or one with a confidence head."
        )
    about = {"commit": git_commit(), "dtype": loaded.dtype.name, "draft": o.model.draft, **o.about("seed")}
    most = loaded.configs.proposals
    with loaded.context(), console.status("") as status:
        if row_shards() > 1:
            raise DominoError("rows share drafts on one device: give --mesh data=1.")
        for temperature in o.temperatures:
            for tokens in (size for size in verified_sizes(most) if size > 1):
                for way, policy in sharing_ways(loaded, tokens - 1).items():
                    if tokens > most and way != EQUALLY:
                        continue  # there is nothing to share
                    status.update(f"temperature {temperature:g}, {tokens} tokens of a row, {way}")
                    sampling = SamplingParams(temperature, max_tokens=o.new_tokens, seed=o.seed, sampler="rejection")
                    asked = [Completion(Request(ids, sampling, (i,))) for i, ids in enumerate(prompts)]
                    cycles = whole_cycles(
                        Slots(loaded.params, loaded.configs, o.batch_size, loaded.dtype, policy=policy(), cycles=1),
                        asked,
                    )
                    yield {
                        **about,
                        "temperature": temperature,
                        "target_tokens": tokens,
                        "way": way,
                        "drafts_verified": fmean(len(cycle.drafts) for cycle in cycles),
                        "tau": 1 + fmean(cycle.accepted for cycle in cycles),
                    }


def whole_cycles(batch: "Slots", asked: "Sequence[Completion]") -> "list[Cycle]":
    """Run requests to their ends; the cycles of those dispatches, of one cycle each, in which all rows ran."""
    cycles: list[Cycle] = []
    known: Counter[Completion] = Counter()

    def note(changed: "Sequence[Completion]") -> None:
        new = [c for c in changed if len(c.cycles) > known[c]]
        known.update(new)
        if len(new) == batch.size:
            cycles.extend(c.cycles[-1] for c in new)

    for _ in batch.run(asked, note):
        pass
    return cycles


def run_shares(options: SharedDrafts) -> None:
    """Measure, print a table in Markdown and write the figures; what was measured is kept, whatever ends it."""
    check_shares(options)
    from domino_jax.runtime.compile_cache import enable_compile_cache

    enable_compile_cache()
    keep_rows(measure_shares(options), options.json, shares_table)


def shares_table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures in Markdown: a line for each temperature and way, a column for each budget."""
    from infer.bench.markdown import markdown_table

    sizes = dict.fromkeys(row["target_tokens"] for row in rows)
    lines: dict[tuple[float, str], dict[int, str]] = {}
    for row in rows:
        lines.setdefault((row["temperature"], row["way"]), {})[row["target_tokens"]] = f"{row['tau']:.2f}"
    heads = ["τ at tokens that the target runs of a row", *map(str, sizes)]
    return markdown_table(
        heads, [[f"T = {t:g}, {way}", *(cells.get(n, "") for n in sizes)] for (t, way), cells in lines.items()]
    )


def main(argv: Sequence[str] | None = None, prog: str = "python -m infer.bench shares") -> int:
    """Run the command line; returns the exit code."""
    return run_command(SharedDrafts, run_shares, argv, prog=prog)


if __name__ == "__main__":
    end_process(main())
