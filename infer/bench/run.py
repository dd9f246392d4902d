"""One run of the benchmark: load, measure, print and write."""

import json
import sys
from pathlib import Path

from rich.console import Console

from convert.loading import LoadedModel, load_model
from convert.options import resolve
from domino_jax import sharding
from domino_jax.errors import DominoError
from domino_jax.runtime.compile_cache import enable_compile_cache
from domino_jax.runtime.memory import explain_out_of_memory
from infer.bench import quality
from infer.bench.options import Bench
from infer.bench.plots import plot_sweep
from infer.bench.report import show_report
from infer.bench.rows import Row
from infer.bench.shapes import load_random
from infer.bench.sweep import circumstances, measure_sweep
from infer.bench.target_forms import load_forms, read_plain_text

PIPE_WIDTH = 160


def run_bench(options: Bench) -> int:
    """Measure what the options ask for; returns the exit code.

    Raises:
        DominoError: something of it can't be done, or a file can't be written.
        KeyboardInterrupt: the user cancelled; what was measured has been printed and written.
    """
    sets = quality.read_answers(options)  # before loading, which takes longer
    if options.questions.perplexity:
        read_plain_text(options.questions.perplexity)
    console = Console(stderr=True)
    enable_compile_cache()
    try:
        loaded, target = load_measured(options, console)
        if sets:
            forms = load_forms(options, loaded, console) if options.questions.forms else {}
            return quality.run_quality(options, sets, {loaded.weights: loaded, **forms}, circumstances(options, loaded))
        rows: list[Row] = []
        try:
            memory = explain_out_of_memory(
                "the device has too little memory: shorter --contexts or smaller --batch-sizes."
            )
            with memory, loaded.context():
                for more in measure_sweep(options, loaded, target, console):
                    rows += more
                    if options.json:  # now: what ends the process later may leave no time
                        write_rows(rows, options.json)
        finally:  # a sweep takes long: what it measured is kept, whatever ended it
            if rows:
                report_bench(rows, options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise
    return 0


def load_measured(options: Bench, console: Console) -> tuple[LoadedModel, Path | None]:
    """The model that the options name, and the target's folder if it has one; prints warnings.

    Raises:
        DominoError: it can't be loaded, or an option does not fit it.
    """
    device, how = options.model.device, options.model.plan()
    if options.shapes:
        target = None
        with console.status("making weights"):
            loaded = load_random(options.shapes, options.model.draft, dtype=device.dtype, **how)
    else:
        target, drafter = resolve(options.model, console)
        with console.status("loading"):
            loaded = load_model(target, drafter, device.dtype, **how)
    if loaded.mesh and any(batch % loaded.mesh.shape[sharding.DATA] for batch in options.batch_sizes):
        raise DominoError("--batch-sizes must be multiples of the mesh's data axis.")
    for flag, given in (("--drafts", options.drafts), ("--simulate-tau", options.simulate_tau)):
        if given not in ((), None) and loaded.configs.drafter is None:
            raise DominoError(f"{flag} needs a drafter: give one with --draft DIR.")
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return loaded, target


def report_bench(rows: list[Row], options: Bench) -> None:
    """Print the figures, draw and write them; neither a full disk nor a closed pipe loses all of it."""
    try:
        # Rows of many figures: a file or a pipe gets them whole.
        show_report(rows, Console(width=None if sys.stdout.isatty() else PIPE_WIDTH))
        if options.plot:
            plots = plot_sweep(rows, options.plot)
            print(*(f"plot: {path}" for path in plots or ["none, since nothing was swept"]), sep="\n")
    finally:
        if options.json:
            write_rows(rows, options.json)


def write_rows(rows: list[Row], path: Path) -> None:
    """Write the figures so far."""
    path.write_text(json.dumps(rows, indent=1) + "\n")
