"""Ways of drafting at a temperature: what is drawn, what is chosen, and how many of it the target accepts.

    python -m infer.bench samplers --temperatures 0 0.6 1 --trees 7 16 --json samplers.json

Chains are drawn and verified by rejection sampling; drawn and verified with the noise that the target draws with
(coupled); or greedy, and accepted where the target draws the same (sample and match). Trees are of the likeliest nodes,
or of those that are the likeliest given that noise. All are exact. Each round has a seed of its own and runs every way
in turn, so that a machine whose speed drifts treats them alike.
"""

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain as chained
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from convert.options import check_count, check_real
from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError, end_process, run_command
from infer.bench.kept import AnswerOptions, keep_rows, load_answering

if TYPE_CHECKING:
    from convert.loading import LoadedModel

PLAIN = "plain steps"


@dataclass(frozen=True)
class Samplers(AnswerOptions):
    """Compare ways of drafting at several temperatures: acceptance, and speed over plain steps."""

    temperatures: tuple[float, ...] = (0.0, 0.6, 1.0)
    """each in turn; 0 is greedy, where chains do not differ"""
    num_prompts: int = 32
    """prompts of a round"""
    top_k: int = 0
    """likeliest tokens that are drawn from; 0 for all"""
    top_p: float = 1.0
    """probability that the tokens drawn from have together"""
    trees: tuple[int, ...] = (7, 16)
    """nodes of trees"""
    seeds: int = 3
    """rounds, the first of seed 0"""


class Way(NamedTuple):
    """A way of drafting."""

    name: str
    model: "LoadedModel"
    sampler: Literal["rejection", "coupled"]


def check_samplers(options: Samplers) -> None:
    """Refuse values that make no sense.

    Raises:
        UsageError: one does not.
    """
    options.check_answers()
    check_count("seeds", options.seeds)
    check_count("top_k", options.top_k, least=0)
    check_real("top_p", options.top_p, "above 0 and at most 1")
    for nodes in options.trees:
        check_count("trees", nodes)
    if options.model.drafting.tree is not None:
        raise UsageError("--trees says of how many nodes trees are: leave --tree out.")
    if options.num_prompts % options.batch_size:
        raise UsageError(f"--num-prompts {options.num_prompts} is no multiple of --batch-size {options.batch_size}.")


def ways_of(loaded: "LoadedModel", trees: Sequence[int], sampled: bool) -> list[Way]:
    """Plain steps first, then chains, then trees.

    Raises:
        DominoError: the drafter is not a block drafter.
    """
    import jax

    from domino_jax.drafters.block import BlockDrafter
    from domino_jax.drafters.tree import TreeDrafter
    from infer.bench.sweep import lean_view

    @dataclass(frozen=True)
    class GreedyDrafter(BlockDrafter):
        """Proposes the likeliest tokens at any temperature, with the one-hot distributions that they have."""

        def propose(self, weights: Any, state: Any, view: Any, proposals: int, keys: Any) -> Any:
            draft, state, cache = super().propose(weights, state, view, proposals, None)
            if keys is not None:
                draft = draft._replace(probs=jax.nn.one_hot(draft.tokens, view.config.vocab_size))
            return draft, state, cache

    block = loaded.configs.drafter
    if type(block) is not BlockDrafter:
        raise DominoError("ways of drafting are compared for a block drafter, such as Domino: give one with --draft.")

    def using(drafter: BlockDrafter) -> "LoadedModel":
        return replace(loaded, configs=replace(loaded.configs, drafter=drafter, drafts=None))

    chain = f"chain of {block.most}"
    ways = [Way(PLAIN, lean_view(loaded), "coupled")]
    if sampled:
        greedy = GreedyDrafter(block.config, block.candidates, confidence_threshold=block.confidence_threshold)
        ways += [
            Way(f"{chain}, rejection", using(block), "rejection"),
            Way(f"{chain}, coupled", using(block), "coupled"),
            Way(f"{chain}, greedy drafts", using(greedy), "coupled"),
        ]
    else:
        ways.append(Way(chain, using(block), "coupled"))
    for nodes in trees:
        tree = TreeDrafter(block.config, block.candidates, nodes)
        if sampled:
            likeliest = replace(tree, coupled=False)
            ways.append(Way(f"tree of {nodes}, likeliest", using(likeliest), "coupled"))
        ways.append(Way(f"tree of {nodes}, coupled" if sampled else f"tree of {nodes}", using(tree), "coupled"))
    return ways


def measure_samplers(options: Samplers) -> Iterator[list[dict[str, Any]]]:
    """A row of figures for each temperature and way, those of a temperature at a time.

    Raises:
        DominoError: a model or file is wrong, or the file has too few prompts.
    """
    from rich.console import Console

    from convert.options import SamplingOptions
    from domino_jax.runtime.provenance import git_commit, processor
    from infer.bench.rounds import run_ours
    from infer.bench.rows import LEAN
    from infer.engine import Engine

    o, console = options, Console(stderr=True)
    loaded, prompts, bench = load_answering(o, console)
    about = {"commit": git_commit(), "processor": processor(), "dtype": loaded.dtype.name}
    about |= o.about("top_k", "top_p", "seeds")
    about |= {"confidence_threshold": o.model.drafting.confidence_threshold}
    with loaded.context(), console.status("") as status:
        for temperature in o.temperatures:
            ways = ways_of(loaded, o.trees, temperature > 0)
            engines = [Engine(way.model) for way in ways]
            found: list[list[dict[str, Any]]] = [[] for _ in ways]
            for seed in (None, *range(o.seeds)):  # the first compiles
                status.update(f"temperature {temperature:g}: {'compiling' if seed is None else f'seed {seed}'}")
                for way, engine, rounds in zip(ways, engines, found, strict=True):
                    sampling = SamplingOptions(temperature, o.top_k, o.top_p, seed=seed or 0, sampler=way.sampler)
                    asked, mode = replace(bench, sampling=sampling), LEAN if way.name == PLAIN else way.name
                    result = run_ours(engine, prompts, asked, o.batch_size, mode)
                    if seed is not None:
                        rounds.append(result)
            yield [
                {**about, "temperature": temperature, **figures(way, rounds, found[0])}
                for way, rounds in zip(ways, found, strict=True)
            ]


def figures(way: Way, rounds: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rounds of a way gave, beside those of plain steps."""
    pairs, taus = list(zip(rounds, plain, strict=True)), [result["tau"] for result in rounds]
    same = None if way.sampler == "rejection" else all(a["outputs"] == b["outputs"] for a, b in pairs)
    return {
        "way": way.name,
        "tau": None if way.name == PLAIN else statistics.mean(t or 1.0 for t in taus),
        "tau_of_seeds": taus,
        "tokens_per_second_over_plain": statistics.median(b["decode"] / a["decode"] for a, b in pairs),
        "same_answers_as_plain": same,
    }


def run_samplers(options: Samplers) -> None:
    """Measure, print a table in Markdown and write the figures; what was measured is kept, whatever ends it."""
    check_samplers(options)
    from domino_jax.runtime.compile_cache import enable_compile_cache

    enable_compile_cache()
    rows = keep_rows(chained.from_iterable(measure_samplers(options)), options.json, samplers_table)
    other = [f"{r['way']} at {r['temperature']:g}" for r in rows if r["same_answers_as_plain"] is False]
    if other:
        print(f"other answers than plain steps (rounding decides between equals): {', '.join(other)}", file=sys.stderr)


def samplers_table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures in Markdown: a line for each way, a column for each temperature."""
    from infer.bench.markdown import markdown_table

    temperatures = dict.fromkeys(row["temperature"] for row in rows)
    lines: dict[str, dict[float, str]] = {}
    for row in rows:
        speed = f"{row['tokens_per_second_over_plain']:.2f}×"
        cell = speed if row["tau"] is None else f"{row['tau']:.2f}, {speed}"
        lines.setdefault(row["way"], {})[row["temperature"]] = cell
    heads = ["τ, tokens/s over plain steps", *(f"T = {temperature:g}" for temperature in temperatures)]
    return markdown_table(heads, [[way, *(cells.get(t, "") for t in temperatures)] for way, cells in lines.items()])


def main(argv: Sequence[str] | None = None, prog: str = "python -m infer.bench samplers") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Samplers, run_samplers, argv, prog=prog)


if __name__ == "__main__":
    end_process(main())
