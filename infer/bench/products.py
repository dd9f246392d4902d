"""What compiled programs make of a matrix in each form: is it read as it is stored, or written out wide at every call.

    python -m infer.bench products --topology v5e:2x2 v6e:2x2 --json products.json

One product of a matrix with few rows is compiled for this process's device, and ahead of time for the TPUs of
`--topology` (extra `aot`). The text of each says whether an array as large as the matrix, of more bytes than it has, is
written outside of a fusion. This device's products are timed too, the forms in turn.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import DisallowNone

from convert.options import UNSET, check_count, check_file, check_topology
from domino_jax.runtime.command import UsageError, end_process, run_command
from domino_jax.runtime.extras import require
from infer.bench.kept import keep_rows
from infer.bench.markdown import markdown_table

if TYPE_CHECKING:  # JAX is imported once the words are known to be right
    from domino_jax.matrix import AnyMatrix
    from domino_jax.runtime.ahead import Place

FEWEST = 3  # rounds of timing


@dataclass(frozen=True)
class Products:
    """Say what compiled programs make of a matrix in 16 or 32 and in 8 bits, here and for TPUs that are not here."""

    topology: Annotated[tuple[str, ...], UNSET] = ()
    """TPUs to compile for, such as v5e:2x2 and v6e:2x2; this device alone without"""
    outputs: int = 12288
    """outputs of the matrix; the default is an MLP's of Qwen3-8B"""
    inputs: int = 4096
    """its inputs"""
    rows: tuple[int, ...] = (1, 8, 16, 17, 32, 64)
    """rows that are multiplied"""
    rounds: int = 9
    """times that this device's forms are run in turn; figures are medians"""
    json: Annotated[Path | None, DisallowNone, UNSET] = None
    """file for the figures"""


def check_products(options: Products) -> None:
    """Check the options without JAX.

    Raises:
        UsageError: a value is out of range.
        DominoError: libtpu is not installed, and TPUs are given.
    """
    for name in options.topology:
        check_topology("topology", name)
    if not options.rows:
        raise UsageError("--rows needs at least one number.")
    for name in ("outputs", "inputs"):
        check_count(name, getattr(options, name))
    for rows in options.rows:
        check_count("rows", rows)
    check_count("rounds", options.rounds, least=FEWEST)
    check_file("json", options.json)
    if options.topology:
        require("libtpu")


def forms_on(platform: str) -> dict[str, Callable[[Any], "AnyMatrix"]]:
    """How a matrix can be held on a platform: what makes each form of a plain one; the first is exact."""
    from domino_jax import matrix

    eight = {kind: partial(matrix.quantize, kind=kind) for kind in matrix.QUANTIZED}
    if platform == "cpu":
        return {
            "float32": matrix.for_cpu,
            "int8": lambda w: matrix.for_cpu(matrix.quantize(w, "int8")),
            "int8, widened": eight["int8"],
            "float8": eight["float8"],
        }
    if platform == "tpu":
        return {
            "bfloat16": matrix.ForTpu,
            **{kind: lambda w, make=make: matrix.ForTpu(make(w)) for kind, make in eight.items()},
        }
    return {"bfloat16": lambda w: w, **eight}


def widened_bytes(text: str, stored: int, count: int) -> int:
    """Bytes of the largest array that a program writes outside of its fusions and that may be a wide copy of a matrix.

    Args:
        text: of the compiled program.
        stored: bytes of the matrix.
        count: numbers in it. The copy has as many, in more bytes.
    """
    from domino_jax.runtime.hlo import array_bytes, parse_program

    program = parse_program(text)
    every = [x for inside in program.computations.values() for x in inside]
    fused = {name for x in every for attribute in ("calls", "to_apply") for name in x.called(attribute)}
    written = [
        size
        for name, inside in program.computations.items()
        if name not in fused
        for x in inside
        if x.opcode not in ("parameter", "constant", "tuple", "while", "get-tuple-element")
        for size in array_bytes(x.result)
    ]
    return max((size for size in written if size > stored and size >= 2 * count), default=0)


def compiled_rows(options: Products, place: "Place") -> Iterator[dict[str, Any]]:
    """The figures of each form and number of rows on a TPU that is not here."""
    import jax
    import jax.numpy as jnp

    from domino_jax.matrix import dot
    from domino_jax.runtime.ahead import compile_ahead
    from domino_jax.runtime.hlo import read_figures

    plain = jax.ShapeDtypeStruct((options.outputs, options.inputs), jnp.bfloat16)
    for name, make in forms_on("tpu").items():
        held = jax.tree.map(lambda x: place.array(x, ""), jax.eval_shape(make, plain))
        stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))
        for rows in options.rows:
            x = place.array(jax.ShapeDtypeStruct((rows, options.inputs), jnp.bfloat16), "")
            compiled, text = compile_ahead(name, place, lambda x=x, held=held: jax.jit(dot).lower(x, held))
            cycles = read_figures(text, (), looped=False).loop.cycles.total()
            flops = 2 * rows * options.outputs * options.inputs
            yield {
                "weights": name,
                "rows": rows,
                "stored_bytes": stored,
                "widened_bytes": widened_bytes(text, stored, options.outputs * options.inputs),
                "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
                "estimated_us": cycles / place.stated.gigahertz / 1e3,
                "floor_us": 1e6 * max(stored / place.stated.bandwidth, flops / place.stated.flops),
            }


def measured_rows(options: Products) -> Iterator[dict[str, Any]]:
    """The figures of each form and number of rows here; times are medians of rounds in which the forms took turns."""
    import jax
    import jax.numpy as jnp

    from domino_jax.matrix import dot
    from domino_jax.runtime.devices import own_devices
    from domino_jax.runtime.precision import matmul_precision, resolve_dtype

    platform = own_devices()[0].platform
    dtype = resolve_dtype(None, platform)
    plain = jax.random.normal(jax.random.key(0), (options.outputs, options.inputs)).astype(dtype)
    forms = {name: jax.block_until_ready(make(plain)) for name, make in forms_on(platform).items()}
    for rows in options.rows:
        x = jax.random.normal(jax.random.key(1), (rows, options.inputs)).astype(dtype)
        with matmul_precision(dtype):
            programs = {name: jax.jit(dot).lower(x, held).compile() for name, held in forms.items()}
        times: dict[str, list[float]] = {name: [] for name in forms}
        for turn in range(options.rounds + 1):
            for name, program in programs.items():
                began = time.perf_counter()
                jax.block_until_ready(program(x, forms[name]))
                if turn:  # the first one warms up
                    times[name].append(time.perf_counter() - began)
        first = times[next(iter(forms))]
        for name, held in forms.items():
            stored, count = sum(leaf.nbytes for leaf in jax.tree.leaves(held)), jnp.size(plain)
            text, memory = programs[name].as_text(), programs[name].memory_analysis()
            assert memory is not None
            held_wide = memory.temp_size_in_bytes if memory.temp_size_in_bytes >= 2 * count else 0
            yield {
                "weights": name,
                "rows": rows,
                "stored_bytes": stored,
                # A program that comes from the compile cache may have no text.
                "widened_bytes": widened_bytes(text, stored, count) if text else held_wide,
                "temporary_bytes": memory.temp_size_in_bytes,
                "measured_us": 1e6 * statistics.median(times[name]),
                "over_exact": statistics.median(a / b for a, b in zip(times[name], first, strict=True)),
            }


def products_table(found: Sequence[dict[str, Any]]) -> str:
    """The figures as a table in Markdown: a line for each device and form, a column for each number of rows."""
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for row in found:
        lines.setdefault((row["device"], row["weights"]), {})[row["rows"]] = _cell(row)
    counts = dict.fromkeys(row["rows"] for row in found)
    heads = "device", "weights", *(f"M = {count}" for count in counts)
    return markdown_table(heads, [[*key, *(cells.get(count, "") for count in counts)] for key, cells in lines.items()])


def _cell(row: dict[str, Any]) -> str:
    """Whether the matrix is read as it is stored, and the time."""
    how = f"{row['widened_bytes'] / 1e6:,.0f} MB " if row["widened_bytes"] else ""
    if "over_exact" in row:
        return f"{how}×{row['over_exact']:.2f}"
    return f"{how}{row['estimated_us']:.0f} ({row['floor_us']:.0f}) µs"


def run_products(options: Products) -> None:
    """Compile, time what is here, print the table and write the figures.

    Raises:
        UsageError: the words make no sense.
        DominoError: libtpu knows no such topology, or refuses a product.
    """
    check_products(options)
    import jax

    from domino_jax.runtime.ahead import Place, circumstances_ahead, leave_devices, topology_devices
    from domino_jax.runtime.devices import own_devices
    from domino_jax.runtime.provenance import git_commit, processor

    if options.topology:
        leave_devices()
    shape = {"outputs": options.outputs, "inputs": options.inputs}
    here = {"commit": git_commit(), "jax": jax.__version__, "device": own_devices()[0].device_kind}

    def rows() -> Iterator[dict[str, Any]]:
        for row in measured_rows(options):
            yield {**here, "processor": processor(), **shape, **row}
        for name in options.topology:
            place = Place(None, topology_devices(name)[0])
            for row in compiled_rows(options, place):
                yield {**circumstances_ahead(place.device), **shape, **row}

    keep_rows(rows(), options.json, products_table)


def main(argv: Sequence[str] | None = None, prog: str = "python -m infer.bench products") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Products, run_products, argv, prog=prog)


if __name__ == "__main__":
    end_process(main())
