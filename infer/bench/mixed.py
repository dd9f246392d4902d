"""Requests of mixed lengths: slots that are filled again at once, against closed batches that last as their longest.

    python -m infer.bench.mixed --num-requests 64 --batch-size 8 --json mixed.json

The same requests run in both ways, in turn: by plain steps, with all drafts of a block, and with --num-draft-tokens
auto. Answers are greedy and end at their limits alone; whether both ways gave the same tokens is said too.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from tyro.conf import DisallowNone

from convert.options import GROUP, UNSET, ModelOptions, check_count, check_file
from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError, end_process, run_command


@dataclass(frozen=True)
class Mixed:
    """Compare slots that are filled again with closed batches, on requests of mixed lengths."""

    model: Annotated[ModelOptions, GROUP] = field(default_factory=ModelOptions)
    prompts: Annotated[Path | None, DisallowNone, UNSET] = None
    """JSON lines as for python -m infer; the default are the demo's own prompts"""
    num_requests: int = 64
    """requests, in the order of the file"""
    batch_size: int = 8
    """that run together"""
    new_tokens: tuple[int, int] = (8, 256)
    """shortest and longest answer; lengths are drawn evenly on a logarithmic scale"""
    prompt_tokens: tuple[int, int] = (8, 64)
    """shortest and longest prompt, likewise"""
    rounds: int = 3
    """of each way, in turn; the median counts"""
    json: Annotated[Path | None, DisallowNone, UNSET] = None
    """file for the figures"""


def check_mixed(options: Mixed) -> None:
    """Refuse values that make no sense.

    Raises:
        UsageError: one does not.
    """
    options.model.check()
    for name in ("num_requests", "batch_size", "rounds"):
        check_count(name, getattr(options, name))
    for name in ("new_tokens", "prompt_tokens"):
        least, most = getattr(options, name)
        if not 1 <= least <= most:
            raise UsageError(f"--{name.replace('_', '-')} takes two lengths from 1 up, the shorter one first.")
    check_file("json", options.json, options.prompts, options.model.model, options.model.draft)


def measure_mixed(options: Mixed) -> list[dict[str, Any]]:
    """A row of figures for each mode.

    Raises:
        DominoError: a model or file is wrong, or the file has too few prompts.
    """
    import numpy as np

    from convert.options import load_pair
    from convert.registry import DEMO_FOLDER
    from domino_jax.runtime.auto import AutoDrafts
    from domino_jax.runtime.provenance import git_commit, processor
    from domino_jax.runtime.slots import Completion, DraftPolicy, FixedDrafts, Request, Slots
    from domino_jax.sampling import SamplingParams
    from infer.bench.load import draw_lengths
    from infer.prompts import Encoder, read_prompts

    o, console = options, Console(stderr=True)
    loaded = load_pair(o.model, console)
    rng = np.random.default_rng(0)
    prompts = read_prompts(o.prompts or DEMO_FOLDER / "prompts.jsonl")
    ids = [Encoder(loaded.tokenizer, raw=prompt.messages is None).ids(prompt) for prompt in prompts]
    ids = [prompt for prompt in ids if len(prompt) >= o.prompt_tokens[0]]
    if len(ids) < o.num_requests:
        raise DominoError(f"{len(ids)} prompts have {o.prompt_tokens[0]} tokens, {o.num_requests} are wanted.")
    lengths = [draw_lengths(rng, bounds, o.num_requests) for bounds in (o.prompt_tokens, o.new_tokens)]
    requests = [
        Request(prompt[:length], SamplingParams(max_tokens=limit), (row,))
        for row, (prompt, length, limit) in enumerate(zip(ids[: o.num_requests], *lengths, strict=True))
    ]

    def run(policy: DraftPolicy | None, filled_again: bool) -> tuple[float, list[Completion]]:
        """Seconds, and what was generated."""
        configs, params = loaded.configs, loaded.params
        if policy is None:
            configs, params = configs.without_drafter, params.without_drafter
        batch = Slots(params, configs, o.batch_size, loaded.dtype, policy=policy)
        completions = [Completion(request) for request in requests]
        size = len(completions) if filled_again else o.batch_size
        began = time.perf_counter()
        for start in range(0, len(completions), size):
            for _ in batch.run(completions[start : start + size]):
                pass
        return time.perf_counter() - began, completions

    most = loaded.configs.proposals
    modes: dict[str, DraftPolicy | None] = {"plain": None}
    if most:
        modes |= {"drafts": FixedDrafts(most), "auto": AutoDrafts(most, loaded.configs.branching)}
    seconds: dict[tuple[str, bool], list[float]] = {(mode, again): [] for mode in modes for again in (False, True)}
    outputs: dict[tuple[str, bool], list[list[int]]] = {}
    with loaded.context(), console.status("warming up") as status:
        for number in range(o.rounds + 1):  # the first one compiles
            for mode, policy in modes.items():
                for filled_again in (False, True):
                    spent, completions = run(policy, filled_again)
                    outputs[mode, filled_again] = [c.tokens for c in completions]
                    if number:
                        seconds[mode, filled_again].append(spent)
            status.update(f"round {number + 1} of {o.rounds}")
    tokens = sum(request.params.max_tokens for request in requests)
    about = {"commit": git_commit(), "processor": processor(), "dtype": loaded.dtype.name, "model": o.model.model}
    about |= {
        name: getattr(o, name) for name in ("num_requests", "batch_size", "new_tokens", "prompt_tokens", "rounds")
    }
    rows = []
    for mode in modes:
        closed, again = (statistics.median(seconds[mode, way]) for way in (False, True))
        rows.append(
            {
                **about,
                "mode": mode,
                "tokens": tokens,
                "closed_tokens_per_second": tokens / closed,
                "slots_tokens_per_second": tokens / again,
                "slots_over_closed": closed / again,
                "over_plain": statistics.median(seconds["plain", True]) / again,
                "same_tokens": outputs[mode, False] == outputs[mode, True],
                "same_tokens_as_plain": outputs[mode, True] == outputs["plain", True],
            }
        )
    return rows


def run_mixed(options: Mixed) -> None:
    """Measure, print a table and write the figures."""
    check_mixed(options)
    from domino_jax.runtime.compile_cache import enable_compile_cache

    enable_compile_cache()
    rows = measure_mixed(options)
    first = rows[0]
    table = Table(title=f"{first['num_requests']} requests, {first['batch_size']} at a time, {first['tokens']} tokens")
    for column in (
        "mode",
        "closed, tokens/s",
        "slots, tokens/s",
        "slots / closed",
        "slots / plain slots",
        "same tokens",
    ):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for row in rows:
        rates = [f"{row[f'{way}_tokens_per_second']:,.0f}" for way in ("closed", "slots")]
        ratios = [f"{row['slots_over_closed']:.2f}", f"{row['over_plain']:.2f}"]
        table.add_row(row["mode"], *rates, *ratios, "yes" if row["same_tokens"] else "no")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def main(argv: Sequence[str] | None = None, prog: str = "python -m infer.bench.mixed") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Mixed, run_mixed, argv, prog=prog)


if __name__ == "__main__":
    end_process(main())
