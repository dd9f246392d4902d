"""What the programs of a model cost on TPUs that are not here, as their compiler estimates it.

    python -m infer.bench compile --shapes qwen3-8b --topology v6e:2x2 --mesh model=4 --json compile.json

Prefill, plain step and cycle are compiled ahead of time (extra `aot`); no weights are made, and nothing is run. Said is
what each holds in a device's memory, copies and sends between devices, what the compiler estimates its operations to
take, and the floor of that: bytes and operations at the device's stated rates. All of it is estimated. What is known of
how far such estimates can be trusted stands in docs/performance.md.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import DisallowNone, arg

from convert.options import (
    GROUP,
    UNSET,
    DeviceOptions,
    DraftingOptions,
    Dtype,
    ModelOptions,
    Weights,
    check_count,
    check_file,
    check_real,
    check_topology,
)
from convert.registry import MODEL_HELP
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.command import UsageError, end_process, run_command
from domino_jax.runtime.extras import require
from domino_jax.runtime.pages import PAGE_SIZE
from domino_jax.runtime.parsing import parse_json, read_text
from infer.bench.markdown import markdown_table
from infer.serve.options import KVOptions

ProgramName = Literal["prefill", "step", "cycle"]


@dataclass(frozen=True)
class Compile:
    """Compile prefill, plain step and cycle for TPUs that are not here, and say what they are estimated to cost."""

    topology: Annotated[str | None, DisallowNone, UNSET] = None
    """TPUs to compile for: v5e:2x4 (4 and 8 chips are 2x2 and 2x4), v5p:2x2x1, v6e:2x2; 1x1 is one chip"""
    shapes: Annotated[str | None, DisallowNone, UNSET] = None
    """a public shape such as qwen3-8b, with a drafter as the public ones"""
    model: Annotated[str | None, DisallowNone, UNSET, arg(help=f"instead of --shapes, {MODEL_HELP}")] = None
    drafting: Annotated[DraftingOptions, GROUP] = field(default_factory=DraftingOptions)
    mesh: Annotated[str | None, DisallowNone, UNSET] = None
    """devices to spread over, such as data=2,model=4 (default: model over all of the topology)"""
    dtype: Dtype = "bfloat16"
    """dtype of weights and caches"""
    weights: Weights = "auto"
    """form of the target's matrices, as in `python -m infer`"""
    attention: Literal["xla", "pallas"] = "xla"
    """attention backend"""
    batch: int = 1
    """rows that run together"""
    context: int = 2048
    """live positions of each row; the caches have the next power of two of them"""
    kv_cache: Literal["contiguous", "paged"] = "contiguous"
    """keys and values of all rows in pages, as the server has them, or of each row in one piece"""
    page_size: int = PAGE_SIZE
    """positions of a page; a power of two up to 128"""
    num_draft_tokens: Annotated[int | None, DisallowNone, UNSET] = None
    """draft tokens verified per cycle (default: all of a block)"""
    layers: Annotated[int | None, DisallowNone, UNSET] = None
    """so many layers alone of the target, and at most as many of the drafter: for a look at copies, within seconds"""
    programs: tuple[ProgramName, ...] = ("prefill", "step", "cycle")
    """what to compile"""
    tau: Annotated[float | None, DisallowNone, UNSET] = None
    """acceptance length to state, for a cycle's tokens/s; none is measured here"""
    json: Annotated[Path | None, DisallowNone, UNSET] = None
    """file for the figures"""
    table: Annotated[tuple[Path, ...], UNSET] = ()
    """compile nothing, and print the figures of these files of --json as a table in Markdown"""

    @property
    def pages(self) -> int | None:
        """Positions of a page; None for a contiguous cache."""
        return self.page_size if self.kv_cache == "paged" else None

    @property
    def asked(self) -> ModelOptions:
        """The options that other commands have too, as those have them."""
        device = DeviceOptions(self.dtype, self.weights, attention=self.attention, mesh=self.mesh)
        return ModelOptions(self.model or ModelOptions.model, drafting=self.drafting, device=device)


def check_compile(options: Compile) -> None:
    """Check the options without JAX.

    Raises:
        UsageError: they contradict each other, or a value is out of range.
        DominoError: libtpu is not installed.
    """
    if options.table:
        if options != Compile(table=options.table):
            raise UsageError("--table prints figures that are there: leave the other options out.")
        return
    if options.topology is None:
        raise UsageError("give the TPUs to compile for, such as --topology v5e:2x4.")
    check_topology("topology", options.topology)
    if (options.shapes is None) == (options.model is None):
        raise UsageError("give one of --shapes NAME and --model DIR.")
    drafting = options.drafting
    if options.shapes is not None and (drafting.draft or "none") != "none":
        raise UsageError("--shapes has a drafter of its own shape: leave --draft out, or give --draft none.")
    if options.shapes is not None and drafting.draft_revision is not None:
        raise UsageError("--shapes has no weights, and no --draft-revision of them.")
    for name in ("batch", "context", "num_draft_tokens", "layers"):
        if getattr(options, name) is not None:
            check_count(name, getattr(options, name))
    KVOptions(options.kv_cache, page_size=options.page_size).check()
    if options.tau is not None:
        check_real("tau", options.tau, "1 or more")
    if not options.programs:
        raise UsageError("--programs needs at least one of prefill, step and cycle.")
    check_file("json", options.json, options.model, drafting.draft)
    options.asked.check()
    require("libtpu")


def show_figures(row: dict[str, Any], console: Console) -> None:
    """The figures as a table for people."""
    drafts = f", {row['num_draft_tokens']} drafts" if row["num_draft_tokens"] else ""
    drafts += f", pages of {row['page_size']}" if row["page_size"] else ""
    console.print(
        f"{row['model']}, {row['layers']} layers, {row['dtype']}, on {row['topology']} ({row['device']}), mesh "
        f"{row['mesh']}, batch {row['batch']}, context {row['context']}{drafts}. Estimated by libtpu {row['libtpu']}, "
        "for one device of them; nothing was run.",
        highlight=False,
    )
    programs = row["programs"]
    table = Table("estimated", *(program["name"] for program in programs))
    for name, form in LINES.items():
        table.add_row(name, *map(form, programs))
    for kind in sorted({kind for program in programs for kind in program["collectives"]}):
        found = (program["collectives"].get(kind, {"count": 0, "bytes": 0}) for program in programs)
        table.add_row(f"{kind}, MB", *(f"{x['count']}: {x['bytes'] / 1e6:,.2f}" for x in found))
    for phase in dict.fromkeys(phase for program in programs for phase in program["phases"]):
        table.add_row(f"{phase}, ms (floor)", *(_both(program["phases"].get(phase)) for program in programs))
    console.print(table)
    unknown = {p["name"]: p["kernels_without_estimate"] for p in programs if p["kernels_without_estimate"]}
    if unknown:
        words = ", ".join(f"{count} in {name}" for name, count in unknown.items())
        console.print(f"The compiler estimates nothing of kernels, and they are left out: {words}.", highlight=False)


def _both(found: dict[str, Any] | None) -> str:
    return f"{found['estimated_ms']:.2f} ({found['floor_ms']:.2f})" if found else ""


def _copied(found: dict[str, Any]) -> str:
    where = f", {found['in_loop']} in the loop" if found["count"] else ""
    return f"{found['count']}: {found['bytes'] / 1e6:,.0f}{where}"


def _rates(program: dict[str, Any]) -> str:
    estimate, floor = program["estimated_tokens_per_second"], program["floor_tokens_per_second"]
    if estimate is None or floor is None:
        return "give --tau" if program["name"] == "cycle" else ""
    return f"{estimate:,.0f} ({floor:,.0f})"


LINES: dict[str, Callable[[dict[str, Any]], str]] = {
    "arguments, GiB": lambda program: f"{program['argument_bytes'] / 2**30:.2f}",
    "temporaries, GiB": lambda program: f"{program['temporary_bytes'] / 2**30:.2f}",
    "fits, of GiB": lambda program: f"{'yes' if program['fits'] else 'no'}, {program['device_bytes'] / 2**30:.0f}",
    "weights copied, MB": lambda program: _copied(program["weight_copies"]),
    "caches copied, MB": lambda program: _copied(program["cache_copies"]),
    "caches written back, MB": lambda program: _copied(program["cache_write_backs"]),
    "cycles": lambda program: f"{program['estimated_cycles']:,}",
    "cycles around the loop": lambda program: f"{program['estimated_cycles_around_the_loop']:,}",
    "ms (floor)": _both,
    "ms, the larger by phase": lambda program: f"{program['larger_ms']:.2f}",
    "tokens/s (floor)": _rates,
}


def compiled_table(runs: Sequence[Path]) -> str:
    """The figures of several files of --json as one table in Markdown.

    Raises:
        DominoError: one can't be read, or holds something else.
    """
    heads = (
        "shape",
        "TPUs",
        "rows",
        "program",
        "GiB",
        "copied, MB",
        "estimated ms",
        "floor ms",
        "the larger",
        "tokens/s",
    )
    lines = []
    for path in runs:
        try:
            row = parse_json(read_text(path))
            lines += [_cells(row, program) for program in row["programs"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DominoError(f"{path} is no file of --json: {first_line(error)}.") from None
    return markdown_table(heads, lines)


def _cells(row: dict[str, Any], program: dict[str, Any]) -> tuple[str, ...]:
    """The line of a program."""
    held = (program["argument_bytes"] + program["temporary_bytes"]) / 2**30
    copied = sum(program[kind]["bytes"] for kind in ("weight_copies", "cache_copies")) / 1e6
    rate = program["larger_tokens_per_second"]
    return (
        row["model"] + ("" if row["whole"] else f", {row['layers']} layers"),
        f"{row['topology']}, {row['mesh'].removeprefix('data=1,')}",
        str(row["batch"]),
        program["name"],
        f"{held:.1f} of {program['device_bytes'] / 2**30:.0f}",
        f"{copied:,.0f}",
        *(f"{program[kind]:.2f}" for kind in ("estimated_ms", "floor_ms", "larger_ms")),
        "" if rate is None else f"{rate:,.0f}",
    )


def run_compile(options: Compile) -> None:
    """Compile, print a table and write the figures; or print those of earlier runs."""
    check_compile(options)
    if options.table:
        print(compiled_table(options.table))
        return
    from domino_jax.runtime.ahead import leave_devices
    from infer.bench.programs import compile_programs

    leave_devices()
    row = compile_programs(options, Console(stderr=True))
    if row["programs"]:
        show_figures(row, Console())
    if options.json:
        options.json.write_text(json.dumps(row, indent=1) + "\n")
    if row["failed"]:
        raise DominoError(" ".join(row["failed"].values()))


def main(argv: Sequence[str] | None = None, prog: str = "python -m infer.bench compile") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Compile, run_compile, argv, prog=prog)


if __name__ == "__main__":
    end_process(main())
