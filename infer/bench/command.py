"""The command line: words to options, figures to tables and files."""

import json
import sys
from functools import partial
from typing import Any

import tyro
from rich.console import Console

from convert.loading import load_model, plan_load
from convert.registry import resolve_folders
from domino_jax import sharding
from domino_jax.errors import DominoError
from domino_jax.runtime.compile_cache import enable_compile_cache
from domino_jax.runtime.memory import explain_out_of_memory
from infer.bench import quality
from infer.bench.modes import drafting
from infer.bench.options import Bench, check_bench
from infer.bench.plots import plot_sweep
from infer.bench.report import show_report
from infer.bench.shapes import load_random
from infer.bench.sweep import circumstances, measure_sweep

PIPE_WIDTH = 160


def report_bench(rows: list[dict[str, Any]], options: Bench) -> None:
    """Print the figures, draw and write them; neither a full disk nor a closed pipe loses all of it."""
    try:
        # Rows of many figures: a file or a pipe gets them whole.
        show_report(rows, Console(width=None if sys.stdout.isatty() else PIPE_WIDTH))
        if options.plot:
            plots = plot_sweep(rows, options.plot)
            print(*(f"plot: {path}" for path in plots or ["none, since nothing was swept"]), sep="\n")
    finally:
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    options = tyro.cli(Bench, args=argv, prog="python -m infer.bench")
    console = Console(stderr=True)
    try:
        check_bench(options)
        sets = quality.read_answers(options)  # before loading, which takes longer
        enable_compile_cache()
        how: dict[str, Any] = {
            "dtype": options.dtype,
            "mesh": sharding.parse_mesh(options.mesh) if options.mesh else None,
            "attention": options.attention,
            "candidates": None if options.head_candidates == "all" else options.head_candidates,
            "draft_dtype": options.draft_dtype,
            "matrices": options.matrices,
        }
        if options.shapes:
            target = None
            with console.status("making weights"):
                loaded = load_random(options.shapes, options.draft, **how)
        else:
            can_run = partial(plan_load, **how)
            revisions = options.revision, options.draft_revision
            target, drafter = resolve_folders(options.model, options.draft, console, *revisions, can_run)
            with console.status("loading"):
                loaded = load_model(target, drafter, **how)
        if loaded.mesh and any(batch % loaded.mesh.shape[sharding.DATA] for batch in options.batch_sizes):
            raise DominoError("--batch-sizes must be multiples of the mesh's data axis.")
        for flag, given in (("--drafts", options.drafts), ("--simulate-tau", options.simulate_tau)):
            if given not in ((), None) and loaded.configs.draft is None:
                raise DominoError(f"{flag} needs a drafter: give one with --draft DIR.")
        for warning in loaded.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if sets:
            modes = drafting(loaded, options.drafts, options.head_off)
            views = {(mode, int(drafts)): view for (mode, drafts), view in modes.items()}
            return quality.run_quality(options, sets, loaded, views, circumstances(options, loaded))
        rows: list[dict[str, Any]] = []
        try:
            memory = explain_out_of_memory(
                "the device has too little memory: shorter --contexts or smaller --batch-sizes."
            )
            with memory, loaded.context():
                for more in measure_sweep(options, loaded, target, console):
                    rows += more
        finally:  # a sweep takes long: what it measured is kept, whatever ended it
            if rows:
                report_bench(rows, options)
    except (DominoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
