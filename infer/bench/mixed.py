"""Requests of mixed lengths: closed batches that last as their longest, slots that are filled again, slots in pages.

    python -m infer.bench.mixed --num-requests 64 --batch-size 8 --json mixed.json

The same requests run in the three ways, in turn: by plain steps, with all drafts of a block, and with
--num-draft-tokens auto. Answers are greedy and end at their limits alone; whether all ways gave the same tokens is said
too, and how much memory for keys and values requests had at the most.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from tyro.conf import DisallowNone

from convert.options import GROUP, UNSET, ModelOptions, check_count, check_file
from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError, end_process, run_command

WAYS = ("closed", "slots", "pages")
MOST_POINTS = 400  # of a curve of memory
Held = list[tuple[int, int, int]]  # after each step: tokens so far, positions reserved, and those of running requests


@dataclass(frozen=True)
class Mixed:
    """Compare closed batches, slots that are filled again, and slots in pages, on requests of mixed lengths."""

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
    plot: Annotated[Path | None, DisallowNone, UNSET] = None
    """folder for memory.png: what slots and pages hold while plain steps answer, and what the tokens need"""


def check_mixed(options: Mixed) -> None:
    """Refuse values that make no sense.

    Raises:
        UsageError: one does not.
        DominoError: a folder can't be written, or a package is missing.
    """
    options.model.check()
    for name in ("num_requests", "batch_size", "rounds"):
        check_count(name, getattr(options, name))
    for name in ("new_tokens", "prompt_tokens"):
        least, most = getattr(options, name)
        if not 1 <= least <= most:
            raise UsageError(f"--{name.replace('_', '-')} takes two lengths from 1 up, the shorter one first.")
    check_file("json", options.json, options.prompts, options.model.model, options.model.draft)
    if options.plot:
        from domino_jax.runtime.extras import require
        from infer.bench.options import check_writable

        require("matplotlib")
        check_writable(options.plot)


def measure_mixed(options: Mixed) -> list[dict[str, Any]]:
    """A row of figures for each mode.

    Raises:
        DominoError: a model or file is wrong, or the file has too few prompts.
    """
    import numpy as np

    from convert.options import load_pair
    from convert.registry import DEMO_FOLDER
    from domino_jax.decode import position_bytes
    from domino_jax.runtime.auto_trees import auto_policy
    from domino_jax.runtime.paged_slots import PagedSlots, Pages, plan_pages
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

    def run(policy: DraftPolicy | None, way: str) -> tuple[float, list[Completion], int, Held]:
        """Seconds, what was generated, and the positions that requests had memory for, at the most and after a step."""
        configs, params = loaded.configs, loaded.params
        if policy is None:
            configs, params = configs.without_drafter, params.without_drafter
        kind = Slots
        if way == "pages":
            longest = max(len(r.prompt) + r.params.max_tokens for r in requests)
            pages = Pages(plan_pages(configs, loaded.dtype, o.batch_size, longest), share=False)
            kind = partial(PagedSlots, pages=pages)
        batch = kind(params, configs, o.batch_size, loaded.dtype, policy=policy)
        completions, held = [Completion(request) for request in requests], []

        def note(changed: list[Completion]) -> None:
            needed = sum(len(c.ids) for c in completions if c.tokens and c.finish_reason is None)
            held.append((sum(len(c.tokens) for c in completions), batch.reserved, needed))

        size = o.batch_size if way == "closed" else len(completions)
        began = time.perf_counter()
        for start in range(0, len(completions), size):
            for _ in batch.run(completions[start : start + size], note):
                pass
        return time.perf_counter() - began, completions, batch.most_reserved, held

    most = loaded.configs.proposals
    modes: dict[str, DraftPolicy | None] = {"plain": None}
    if most:
        modes |= {"drafts": FixedDrafts(most), "auto": auto_policy(loaded.configs)}
    seconds: dict[tuple[str, str], list[float]] = {(mode, way): [] for mode in modes for way in WAYS}
    outputs: dict[tuple[str, str], list[list[int]]] = {}
    reserved: dict[tuple[str, str], int] = {}
    memory: dict[str, Held] = {}
    with loaded.context(), console.status("warming up") as status:
        for number in range(o.rounds + 1):  # the first one compiles
            for mode, policy in modes.items():
                for way in WAYS:
                    spent, completions, reserved[mode, way], held = run(policy, way)
                    if mode == "plain":
                        memory[way] = held
                    outputs[mode, way] = [c.tokens for c in completions]
                    if number:
                        seconds[mode, way].append(spent)
            status.update(f"round {number + 1} of {o.rounds}")
    tokens = sum(request.params.max_tokens for request in requests)
    about = {"commit": git_commit(), "processor": processor(), "dtype": loaded.dtype.name, "model": o.model.model}
    about |= {
        name: getattr(o, name) for name in ("num_requests", "batch_size", "new_tokens", "prompt_tokens", "rounds")
    }
    rows, each = [], position_bytes(loaded.configs, loaded.dtype) / (1 << 20)
    for mode in modes:
        closed, again, paged = (statistics.median(seconds[mode, way]) for way in WAYS)
        rows.append(
            {
                **about,
                "mode": mode,
                "tokens": tokens,
                "closed_tokens_per_second": tokens / closed,
                "slots_tokens_per_second": tokens / again,
                "pages_tokens_per_second": tokens / paged,
                "slots_over_closed": closed / again,
                "pages_over_slots": again / paged,
                "over_plain": statistics.median(seconds["plain", "slots"]) / again,
                **{f"{way}_kv_mib": reserved[mode, way] * each for way in WAYS},
                "same_tokens": all(outputs[mode, way] == outputs[mode, "closed"] for way in WAYS),
                "same_tokens_as_plain": outputs[mode, "slots"] == outputs["plain", "slots"],
            }
        )
    for way, held in memory.items():
        some = held[:: -(-len(held) // MOST_POINTS)]
        rows[0][f"{way}_memory"] = [(at, kept * each, needed * each) for at, kept, needed in some]
    return rows


def run_mixed(options: Mixed) -> None:
    """Measure, print a table, draw and write the figures."""
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
        "pages, tokens/s",
        "slots / closed",
        "pages / slots",
        "slots / plain slots",
        "KV MiB, slots",
        "pages",
        "same tokens",
    ):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for row in rows:
        rates = [f"{row[f'{way}_tokens_per_second']:,.0f}" for way in WAYS]
        ratios = [f"{row[name]:.2f}" for name in ("slots_over_closed", "pages_over_slots", "over_plain")]
        ratios += [f"{row[f'{way}_kv_mib']:.1f}" for way in ("slots", "pages")]
        table.add_row(row["mode"], *rates, *ratios, "yes" if row["same_tokens"] else "no")
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if options.plot:
        from infer.bench.plots import plot_memory

        print(f"plot: {plot_memory(first, options.plot)}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def main(argv: Sequence[str] | None = None, prog: str = "python -m infer.bench.mixed") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Mixed, run_mixed, argv, prog=prog)


if __name__ == "__main__":
    end_process(main())
