"""What fits on devices that need not be here: weights, keys and values, and how many streams, by the shapes alone.

    python -m infer.bench plan --model qwen3-8b --devices v6e-4

Nothing of a model is read but its config.json. Weights and caches are counted exactly, a device's part of each;
temporaries are estimated by the widest layer, and what the device's runtime keeps is a share of its memory.
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table
from tyro.conf import DisallowNone, arg

from convert import registry
from convert.options import DRAFT_WEIGHTS, UNSET, Dtype, Flag, Weights, check_count
from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError, end_process, run_command, words_at_fault
from domino_jax.runtime.weight_forms import resolve_weights
from infer.bench.devices import Device, find_devices

if TYPE_CHECKING:  # JAX is imported once the words are known to be right
    from convert.shapes import Shape
    from infer.bench.sizes import Pair

CONTEXT = 4096  # positions of a stream
# Of a TPU's memory the runtime keeps some: XLA's errors speak of 30.75 of 32 GiB. Of a GPU's JAX takes this share.
TPU_SHARE, GPU_SHARE = 0.96, 0.75
GPU_VARIABLES = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
WIDTH = 110  # columns where it is not printed to a terminal


@dataclass(frozen=True)
class Plan:
    """Say what fits on devices, by the shapes alone: no weights are read, and no device is needed."""

    devices: Annotated[str, arg(metavar="NAME-NUMBER")]
    """what runs it: v5e-1, v5p-8 (TensorCores, as Google counts), v6e-4, t4, l4, a100-80, h100, h200-8, ..."""
    model: Annotated[str | None, DisallowNone, UNSET, arg(help=f"{registry.MODEL_HELP}; only configs are read")] = None
    shapes: Annotated[str | None, DisallowNone, UNSET] = None
    """instead of --model, a public shape such as qwen3-14b, with a drafter as the public ones"""
    draft: Annotated[str | None, DisallowNone, UNSET, arg(help=registry.DRAFT_HELP)] = None
    weights: Weights = "auto"
    """form of the target's matrices, as in `python -m infer`"""
    draft_weights: Annotated[Weights, DRAFT_WEIGHTS] = "auto"
    """form of the drafter's matrices"""
    dtype: Dtype = "bfloat16"
    """of weights and caches"""
    mesh: Annotated[str | None, DisallowNone, UNSET] = None
    """devices to spread over, such as data=2,model=4 (default: what would be chosen, and all that use every device)"""
    context: Annotated[int | None, DisallowNone, UNSET] = None
    """positions of a stream, prompt and answer together, beside 4096"""
    json: Flag = False
    """print a list of one JSON object for each mesh"""


def check_plan(options: Plan) -> None:
    """Refuse words that make no sense.

    Raises:
        UsageError: they don't.
    """
    with words_at_fault():
        find_devices(options.devices)
        registry.split_draft(options.draft)
        resolve_weights(options.weights)
        resolve_weights(options.draft_weights, "--draft-weights")
    if (options.model is None) == (options.shapes is None):
        raise UsageError("give --model, or --shapes for a public shape: one of them.")
    if options.shapes and options.draft not in (None, registry.NO_DRAFT):
        raise UsageError("--shapes has a drafter of its own shape: leave --draft out, or give --draft none.")
    if options.context is not None:
        check_count("context", options.context, least=2)
    if options.mesh is not None:
        from domino_jax.sharding import parse_mesh

        with words_at_fault():
            parse_mesh(options.mesh)


def usable_share(device: Device) -> float:
    """The share of a device's memory that JAX has for us; of a GPU's as the environment says, where it does.

    Raises:
        DominoError: the environment says something else than a share.
    """
    if device.platform == "tpu":
        return TPU_SHARE
    name, given = next(((n, os.environ[n]) for n in GPU_VARIABLES if os.environ.get(n)), ("", ""))
    if not given:
        return GPU_SHARE
    try:
        share = float(given)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise DominoError(f"{name} must be a share of the memory, above 0 and at most 1, found {given!r}.")
    return share


def find_pair(options: Plan) -> "Pair":
    """The configs of target and drafter: those of the public shapes, or of folders and repositories.

    Raises:
        DominoError: nothing is found, or the two do not fit.
    """
    from convert.shapes import find_shape
    from infer.bench.sizes import Pair

    if options.shapes:
        shape = find_shape(options.shapes)
        return Pair(shape.target, None if options.draft == registry.NO_DRAFT else shape.draft, False)
    name, ngram = registry.split_draft(options.draft)
    places = registry.locate(options.model or "", registry.NO_DRAFT if ngram and name is None else name)
    with TemporaryDirectory() as root:
        target, draft = (
            None if place is None else _config_folder(place, Path(root) / part, flag)
            for place, part, flag in zip(places, ("target", "draft"), ("--model", "--draft"), strict=True)
        )
        assert target is not None
        _, config, draft_config, _ = registry.read_configs(target, draft)
    return Pair(config, draft_config, ngram)


def _config_folder(place: str, temporary: Path, flag: str) -> Path:
    """A folder that has the config.json of a folder or repository; of a public model it is written, not fetched."""
    from convert.hf import write_json

    public = _public_configs().get(place)
    if public is not None:
        temporary.mkdir()
        write_json(temporary / "config.json", public.to_hf())
        return temporary
    console = Console(stderr=True)
    found = registry.open_place(place, place, flag, None, console)
    return found if isinstance(found, Path) else found.configure(console)


def _public_configs() -> dict[str | None, Any]:
    """The configs of the public repositories."""
    from convert.shapes import SHAPES

    found: dict[str | None, Any] = {}
    for name, public in registry.TABLE.items():
        shape: Shape | None = SHAPES.get(name)
        if shape is not None:
            plain = dataclasses.replace(shape.draft, head=None, shift_label=False)
            found |= {public.target: shape.target, public.domino: shape.draft, public.dflash: plain}
    return found


def plan_rows(options: Plan) -> list[dict[str, Any]]:
    """What each mesh holds, the one first that would be chosen without --mesh; bytes are one device's.

    Raises:
        DominoError: the model can't be found, or can't be divided so.
    """
    from domino_jax.runtime.memory import divides, smallest_mesh
    from domino_jax.sharding import parse_mesh

    device, count = find_devices(options.devices)
    pair, limit = find_pair(options), usable_share(device) * device.memory
    configs = [config for config in (pair.target, pair.draft) if config]
    if options.mesh is not None:
        meshes = [parse_mesh(options.mesh)]
        if math.prod(meshes[0]) > count:
            raise DominoError(f"a mesh of {options.mesh} needs {math.prod(meshes[0])} devices; {_named(options)}.")
    else:
        every = [(count // model, model) for model in range(1, count + 1) if count % model == 0]
        chosen = smallest_mesh(configs, _dtype(options), count, limit, resolve_weights(options.weights))
        meshes = list(dict.fromkeys([chosen, *(mesh for mesh in every if divides(configs, mesh[1]))]))
    return [_plan_row(options, pair, mesh, limit) for mesh in meshes]


def _plan_row(options: Plan, pair: "Pair", mesh: tuple[int, int], limit: float) -> dict[str, Any]:
    from domino_jax.cache import SMALLEST_BUCKET, length_bucket
    from domino_jax.decode import position_bytes
    from domino_jax.runtime.pages import PAGE_SIZE
    from infer.bench.sizes import device_configs, state_bytes, temporary_bytes, weight_bytes

    data, model = mesh
    dtype = _dtype(options)
    device, count = find_devices(options.devices)
    configs = device_configs(pair, model)
    forms = resolve_weights(options.weights), resolve_weights(options.draft_weights)
    weights = weight_bytes(pair, model, dtype, *forms)
    kv = position_bytes(configs.without_drafter, dtype)
    drafter = [state_bytes(configs, capacity, dtype) for capacity in (SMALLEST_BUCKET, 2 * SMALLEST_BUCKET)]
    drafter_kv, paged = (drafter[1] - drafter[0]) // SMALLEST_BUCKET, data == 1  # as the server chooses

    def temporaries(rows: int, positions: int) -> float:
        return temporary_bytes(configs, model, rows, length_bucket(positions + configs.lookahead), dtype, paged)

    def needed(rows: int, positions: int) -> float:
        """Bytes with so many rows of one group of devices; without pages, also of a prompt that is run beside them."""
        held, capacity = positions + configs.lookahead, length_bucket(positions + configs.lookahead)
        if paged:
            row, rows_held = (kv + drafter_kv) * PAGE_SIZE * -(-held // PAGE_SIZE), rows
        else:
            row, rows_held = kv * capacity + state_bytes(configs, capacity, dtype), rows + 1
        return sum(weights) + temporaries(rows, positions) + rows_held * row

    def streams(positions: int) -> int:
        """The most rows that fit."""
        low, high = 0, 1
        while needed(high, positions) <= limit:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if needed(middle, positions) <= limit else (low, middle)
        return low * data

    temporary = temporaries(1, CONTEXT)
    left = limit - sum(weights) - temporary
    missing = needed(1, 1) - limit
    lengths = sorted({CONTEXT, options.context or CONTEXT})
    return {
        "devices": options.devices,
        "count": count,
        "mesh": {"data": data, "model": model},
        "dtype": options.dtype,
        "kv_cache": "paged" if paged else "contiguous",
        "device_bytes": device.memory,
        "usable_bytes": limit,
        "target_bytes": weights[0],
        "drafter_bytes": weights[1],
        "token_bytes": kv,
        "drafter_token_bytes": drafter_kv,
        "temporary_bytes": temporary,
        "left_bytes": max(0.0, left),
        "tokens": max(0, int(left // (kv + drafter_kv))) * data,
        "streams": {str(length): streams(length) for length in lengths},
        "fits": missing <= 0,
        "missing_bytes": max(0.0, missing),
    }


def _dtype(options: Plan) -> Any:
    import jax.numpy as jnp

    return jnp.dtype(options.dtype)


def _named(options: Plan) -> str:
    device, count = find_devices(options.devices)
    return f"{options.devices} has {count} of {gigabytes(device.memory)}"


def gigabytes(size: float) -> str:
    """Bytes as 10^9, with as many digits as matter."""
    return f"{size / 1e9:,.{0 if size >= 1e11 else 1 if size >= 1e9 else 2}f} GB"


def run_plan(options: Plan) -> None:
    """Print what fits.

    Raises:
        UsageError: the words make no sense.
        DominoError: the model can't be found, or does not fit.
    """
    check_plan(options)
    rows = plan_rows(options)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        _print_rows(options, rows)
    first = rows[0]
    if not first["fits"]:
        mesh = ",".join(f"{name}={size}" for name, size in first["mesh"].items())
        usable, missing = first["usable_bytes"], first["missing_bytes"]
        raise DominoError(
            f"{options.model or options.shapes} does not fit: with --mesh {mesh} each device needs "
            f"{gigabytes(usable + missing)} and has {gigabytes(usable)} to give, {gigabytes(missing)} too little; take "
            "more devices or larger ones."
        )


def _print_rows(options: Plan, rows: list[dict[str, Any]]) -> None:
    out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    device, _ = find_devices(options.devices)
    share = usable_share(device)
    counted = f"{share:.0%} of it is counted" + (
        f" ({GPU_VARIABLES[0]} says how much)" if device.platform == "gpu" else ""
    )
    out.print(f"{options.model or options.shapes} in {options.dtype}. {_named(options)}; {counted}.\n", soft_wrap=True)
    out.print(plan_table(rows))
    slots = "Keys and values lie in pages; where data is above 1, a stream has a power of two of positions instead."
    chosen = "\nThe first mesh is what is chosen without --mesh." if options.mesh is None else ""
    out.print(
        f"{chosen}\nGB of each device; tokens and streams of all together. Temporaries, and with them the streams, are "
        f"estimates. {slots}",
        soft_wrap=True,
    )


def plan_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of `plan_rows` for people."""
    table = Table(box=None, pad_edge=False)
    headings = ["mesh", "target", "drafter", "temporaries", "left", "KB a token", "tokens"]
    for heading in [*headings, *(f"streams of {int(length):,}" for length in rows[0]["streams"])]:
        table.add_column(heading, justify="left" if heading == "mesh" else "right")
    for row in rows:
        table.add_row(*plan_cells(row))
    return table


def plan_cells(row: dict[str, Any]) -> list[str]:
    """A row of `plan_rows` as words: its mesh, GB, KB a token of target and drafter, tokens, streams."""
    sizes = [row[name] for name in ("target_bytes", "drafter_bytes", "temporary_bytes", "left_bytes")]
    mesh = ",".join(f"{name}={size}" for name, size in row["mesh"].items())
    token = (row["token_bytes"] + row["drafter_token_bytes"]) / 1e3
    counts = [row["tokens"], *row["streams"].values()]
    return [mesh, *(f"{size / 1e9:.2f}" for size in sizes), f"{token:,.1f}", *(f"{count:,}" for count in counts)]


def main(argv: Sequence[str] | None = None, prog: str = "python -m infer.bench plan") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Plan, run_plan, argv, prog=prog)


if __name__ == "__main__":
    end_process(main())
