"""A checkpoint's way through every form, with the memory and the rate of each step.

    python -m infer.bench checkpoints --shapes qwen3-0.6b --json round.json

Random bfloat16 weights of a public shape are written as Hugging Face files (or yours are taken), loaded on one device
and generated from; converted to Orbax; loaded from there on a mesh and generated from again (the same tokens); and
converted back: the same bits. Each step is a process of its own, whose peak memory is counted from where it stood
before it touched the weights.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, get_args

from rich.console import Console
from rich.table import Table
from tyro.conf import DisallowNone

from convert.options import UNSET, DeviceOptions, check_count, check_file, local_sources
from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError, end_process, own_command, own_environment, run_command
from domino_jax.runtime.devices import own_devices
from domino_jax.runtime.files import lock_folder

PROMPT = list(range(1, 33))
NEW_TOKENS = 8
Step = Literal["make", "load", "to_orbax", "load_mesh", "to_hf", "compare"]
STEPS: tuple[Step, ...] = get_args(Step)


@dataclass(frozen=True)
class Round:
    """Send a checkpoint through all forms, and report memory and rate of each step."""

    shapes: str = "qwen3-0.6b"
    """target's shape: see python -m infer.bench --help"""
    model: Annotated[Path | None, DisallowNone, UNSET] = None
    """a target's folder of Hugging Face files to send instead of a synthetic one"""
    out: Annotated[Path | None, DisallowNone, UNSET] = None
    """folder for the three copies of the model, which are left there; a temporary one when not given"""
    mesh: str = "data=2,model=4"
    """of the second loading; on a CPU of as many virtual devices"""
    shard_mb: int = 400
    """size of the Hugging Face files"""
    json: Annotated[Path | None, DisallowNone, UNSET] = None
    """file for the figures"""
    step: Annotated[Step | None, DisallowNone, UNSET] = None
    """one step alone, in this process, on the copies in --out"""


def memory() -> tuple[int, int]:
    """This process's memory now and at most, in bytes (Linux)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """Do the work; the seconds it took and the most memory it added."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, _ = memory()
    began = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - began, "peak_bytes": max(0, memory()[1] - before)}


def run_checkpoints(options: Round) -> dict[str, Any]:
    """One step, in this process.

    Raises:
        DominoError: something is missing, or two copies differ.
    """
    import jax
    import jax.numpy as jnp

    from convert import hf
    from convert.folders import convert_folder
    from convert.loading import load_model
    from convert.shapes import find_shape, random_weights
    from domino_jax.sharding import parse_mesh
    from infer.engine import Engine

    assert options.out is not None
    first, orbax, last = (options.out / name for name in ("hf", "orbax", "hf-again"))
    first = options.model or first
    if options.step == "make":
        if options.model is None:
            config = find_shape(options.shapes).target
            hf.SHARD_BYTES = options.shard_mb * 10**6
            hf.save_hf(first, random_weights(config, jnp.bfloat16), config, config.to_hf(), jnp.bfloat16)
        return {"files": len(list(first.glob("*.safetensors"))), "bytes": stored(first)}
    if options.step in ("load", "load_mesh"):
        mesh = parse_mesh(options.mesh) if options.step == "load_mesh" else (1, 1)
        source = first if options.step == "load" else orbax
        loaded: list[Any] = []
        host = own_devices()[0].platform == "cpu"
        figures = measured(lambda: loaded.append(load_model(source, dtype="float32", mesh=mesh, matrices="float32")))
        engine = Engine(loaded[0])
        sequence, _ = engine.sequence(PROMPT, NEW_TOKENS)
        engine.generate([sequence])
        parts = [part for x in jax.tree.leaves(loaded[0].params) for part in x.addressable_shards]
        held = {device: sum(p.data.nbytes for p in parts if p.device == device) for device in jax.local_devices()}
        return figures | {
            "stays_bytes": sum(held.values()) if host else max(x.nbytes for x in jax.tree.leaves(loaded[0].params)),
            "device_bytes": max(held.values()),
            "tokens": sequence.tokens,
        }
    if options.step in ("to_orbax", "to_hf"):
        hf.SHARD_BYTES = options.shard_mb * 10**6
        way = (first, orbax) if options.step == "to_orbax" else (orbax, last)
        return measured(lambda: convert_folder(*way))
    return compare_folders(first, last)


def compare_folders(first: Path, last: Path) -> dict[str, Any]:
    """Whether two Hugging Face folders hold the same bits.

    Raises:
        DominoError: they do not.
    """
    from convert.safetensors import TensorFiles
    from convert.tensors import tensor_files

    one, other = (TensorFiles(tensor_files(folder)) for folder in (first, last))
    if one.stored.keys() - {"lm_head.weight"} != other.stored.keys() - {"lm_head.weight"}:  # tied models may hold it
        raise DominoError(f"{first} and {last} hold different tensors.")
    for name, tensor in other.stored.items():
        if other.read(tensor).tobytes() != one.read(one.stored[name]).tobytes():
            raise DominoError(f"{name} came back different.")
    if (first / "config.json").read_bytes() != (last / "config.json").read_bytes():
        raise DominoError("config.json came back different.")
    return {"identical": len(other.stored)}


def stored(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.suffix != ".json")


def every_step(options: Round, out: Path) -> dict[str, dict[str, Any]]:
    """All steps, each in a process of its own.

    Raises:
        DominoError: a step failed, or the two loadings gave different tokens.
    """
    from domino_jax.sharding import parse_mesh

    figures: dict[str, dict[str, Any]] = {}
    data, model = parse_mesh(options.mesh)
    for step in STEPS:
        print(f"{step} ...", file=sys.stderr, flush=True)
        words = own_command(["infer.bench.checkpoints", "--step", step, "--out", str(out)])
        words += ["--model", str(options.model)] if options.model else []
        words += ["--shapes", options.shapes, "--mesh", options.mesh, "--shard-mb", str(options.shard_mb)]
        environment = own_environment()
        if step in ("to_orbax", "to_hf"):
            environment["JAX_PLATFORMS"] = "cpu"  # as python -m convert does
        if step == "load_mesh":  # counts for CPUs alone
            flags = environment.get("XLA_FLAGS", "")
            environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={data * model}"
        done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise DominoError(f"step {step} failed; what it said stands above.")
        figures[step] = json.loads(done.stdout.splitlines()[-1])
    if figures["load"]["tokens"] != figures["load_mesh"]["tokens"]:
        raise DominoError("the model gave other tokens on the mesh than on one device.")
    size = figures["make"]["bytes"]
    for one in figures.values():
        if "seconds" in one:
            one["gb_per_second"] = size / one["seconds"] / 1e9
        if one.get("stays_bytes"):
            one["peak_over_stays"] = one["peak_bytes"] / one["stays_bytes"]
    return figures


def sampling_settings(options: Round) -> dict[str, Any]:
    """What the figures belong to."""
    from domino_jax.runtime.provenance import git_commit

    return {"commit": git_commit(), "model": str(options.model or options.shapes), "mesh": options.mesh}


def print_figures(options: Round, figures: dict[str, dict[str, Any]]) -> None:
    """The figures as a table."""
    made = figures["make"]
    what = options.model or f"{options.shapes}, random weights"
    title = f"{what}: {made['bytes'] / 1e9:.2f} GB in {made['files']} files"
    table = Table("step", "seconds", "GB/s", "stays, GB", "peak, GB", "peak / stays", title=title)
    names = {
        "load": "Hugging Face -> one device, float32",
        "to_orbax": "Hugging Face -> Orbax",
        "load_mesh": f"Orbax -> mesh {options.mesh}, float32",
        "to_hf": "Orbax -> Hugging Face",
    }
    for step, name in names.items():
        one = figures[step]
        cells = [f"{one['seconds']:.1f}", f"{one['gb_per_second']:.2f}"]
        cells += [f"{one['stays_bytes'] / 1e9:.2f}" if one.get("stays_bytes") else ""]
        cells += [f"{one['peak_bytes'] / 1e9:.2f}"]
        cells += [f"{one['peak_over_stays']:.2f}" if "peak_over_stays" in one else ""]
        table.add_row(name, *cells)
    console = Console()
    console.print(table)
    same = figures["compare"]["identical"]
    console.print(f"the same tokens on one device and on the mesh; {same} tensors came back bit for bit")


def main(argv: Sequence[str] | None = None, prog: str = "python -m infer.bench.checkpoints") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Round, _run, argv, prog=prog)


def _run(options: Round) -> None:
    if options.step and options.out is None:
        raise UsageError("--step works on the copies in --out DIR.")
    DeviceOptions(mesh=options.mesh).mesh_sizes()  # refuses what is malformed
    check_count("shard_mb", options.shard_mb)
    check_file("json", options.json, options.model)
    if options.step:
        print(json.dumps(run_checkpoints(options)))
        return
    with ExitStack() as stack:
        out = options.out or Path(stack.enter_context(TemporaryDirectory()))
        stack.enter_context(lock_folder(out, sources=local_sources(options.model)))
        figures = every_step(options, out)
    if options.json:
        options.json.write_text(json.dumps({**sampling_settings(options), **figures}, indent=1))
    print_figures(options, figures)


if __name__ == "__main__":
    end_process(main())
