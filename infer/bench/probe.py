"""What devices are here, and which shape and mesh `infer.bench device` runs on them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from tyro.conf import DisallowNone

from convert.options import UNSET, DeviceOptions, check_file
from convert.registry import DEMO_FOLDER, read_configs
from convert.shapes import find_shape
from domino_jax.decode import position_bytes
from domino_jax.errors import DominoError
from domino_jax.runtime.command import end_process, run_command, words_at_fault
from domino_jax.runtime.devices import device_of_kind, own_devices
from domino_jax.runtime.files import write_text
from domino_jax.runtime.memory import divides
from domino_jax.runtime.provenance import git_commit, processor
from domino_jax.sharding import fit_to_mesh, parse_mesh
from infer.bench.device_report import DEMO
from infer.bench.sizes import Pair, device_configs, state_bytes, temporary_bytes, weight_bytes

CANDIDATES = ("qwen3-8b", "qwen3-4b", "qwen3-1.7b", "qwen3-0.6b")  # the first that fits is taken
ROWS, POSITIONS = 2, 4096  # that must fit beside the weights; they are as long as sixteen rows of 512


@dataclass(frozen=True)
class Probe:
    """Say what devices are here, and which shape and mesh fit them."""

    json: Path
    """file for what is found"""
    shapes: Annotated[str | None, DisallowNone, UNSET] = None
    """the shape to run, whether it fits or not: a public one, or demo"""
    mesh: Annotated[str | None, DisallowNone, UNSET] = None
    """the mesh to run on"""


class Choice(NamedTuple):
    """What to run, and on how many devices."""

    shapes: str
    mesh: tuple[int, int]  # data, model
    fits: bool


def probe(options: Probe) -> dict[str, Any]:
    """The devices, their memory, and what to run on them.

    Raises:
        DominoError: there is no such shape, or it can't be divided over the mesh.
    """
    devices = own_devices()
    device, stats = devices[0], devices[0].memory_stats() or {}
    stated = device_of_kind(device.device_kind)
    memory = None if device.platform == "cpu" else stats.get("bytes_limit") or (stated and stated.memory)
    asked = parse_mesh(options.mesh) if options.mesh else None
    shapes, (data, model), fits = choose_shape(options.shapes, asked, len(devices), memory)
    alone = data * model == 1
    return {
        "commit": git_commit(),
        "jax": jax.__version__,
        "platform": device.platform,
        "device": device.device_kind,
        "devices": len(devices),
        "processor": processor(),
        "memory_bytes": memory,
        "shapes": shapes,
        "mesh": None if alone else f"data={data},model={model}",
        "training_mesh": None if alone else f"fsdp={data * model}",
        "data": data,
        "used": data * model,
        "fits": fits,
    }


def choose_shape(asked: str | None, mesh: tuple[int, int] | None, count: int, memory: float | None) -> Choice:
    """The shape, its mesh, and whether weights, caches and what programs need fit.

    Args:
        asked: the shape; when None the first of CANDIDATES that fits, and the shipped pair where memory is not known.
        mesh: when None the most devices that the shape can be divided over.
        count: devices.
        memory: bytes that one of them has; None where it does not say.

    Raises:
        DominoError: there is no such shape, or it can't be divided so.
    """
    names = (asked,) if asked else (DEMO,) if memory is None else CANDIDATES
    choices = (fit_shape(name, mesh, count, memory) for name in names)
    found = next((choice for choice in choices if choice.fits), None) or fit_shape(names[-1], mesh, count, memory)
    data, model = found.mesh
    if data * model > count:
        raise DominoError(f"--mesh data={data},model={model} needs {data * model} devices; found {count}.")
    return found


def fit_shape(name: str, mesh: tuple[int, int] | None, count: int, memory: float | None) -> Choice:
    """One shape, its mesh, and whether it fits; arguments and errors as those of `choose_shape`."""
    pair = pair_of(name)
    configs = [config for config in (pair.target, pair.draft) if config]
    data, model = mesh or (1, max(model for model in range(1, count + 1) if divides(configs, model)))
    for config in configs:
        fit_to_mesh(config, model)
    return Choice(name, (data, model), memory is None or needed_bytes(pair, model) <= memory)


def pair_of(name: str) -> Pair:
    """The configs of a public shape, or of the shipped pair.

    Raises:
        DominoError: there is no such shape.
    """
    if name == DEMO:
        _, target, draft, _ = read_configs(DEMO_FOLDER / "target", DEMO_FOLDER / "draft")
        return Pair(target, draft, False)
    return Pair(*find_shape(name), False)


def needed_bytes(pair: Pair, model: int) -> float:
    """Bytes of one of `model` devices in bfloat16: weights, ROWS rows of POSITIONS, and an estimate of the rest."""
    dtype = jnp.dtype(jnp.bfloat16)
    configs = device_configs(pair, model)
    row = position_bytes(configs.without_drafter, dtype) * POSITIONS + state_bytes(configs, POSITIONS, dtype)
    temporary = temporary_bytes(configs, model, ROWS, POSITIONS, dtype, False)
    return sum(weight_bytes(pair, model, dtype)) + ROWS * row + temporary


def run_probe(options: Probe) -> None:
    """Write what is found."""
    check_file("json", options.json)
    with words_at_fault():
        DeviceOptions(mesh=options.mesh).mesh_sizes()
        write_text(options.json, json.dumps(probe(options), indent=1) + "\n")


def main(argv: Sequence[str] | None = None, prog: str = "python -m infer.bench.probe") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Probe, run_probe, argv, prog=prog)


if __name__ == "__main__":
    end_process(main())
