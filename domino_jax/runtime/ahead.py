"""Programs compiled ahead of time for TPUs that are not here: where their arrays would lie, and their figures.

Arrays are described (jax.ShapeDtypeStruct) and not made. What the figures say of time is libtpu's own estimate.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.devices import DEVICES, Device, device_of_kind
from domino_jax.runtime.extras import require
from domino_jax.runtime.hlo import WRITE_BACK, Move, read_figures
from domino_jax.runtime.provenance import git_commit
from domino_jax.sharding import MODEL, spec


class Place(NamedTuple):
    """Where arrays lie: on a mesh, or on one device."""

    mesh: Mesh | None
    device: Any  # the first

    @property
    def stated(self) -> Device:
        """What its maker states of it; of `topology_devices` alone."""
        found = device_of_kind(self.device.device_kind)
        assert found is not None
        return found

    def array(self, x: Any, where: str | PartitionSpec) -> Any:
        """An array of the shape and dtype of `x`.

        Args:
            where: its axis letters, or its partition.
        """
        alone = SingleDeviceSharding(self.device)
        if self.mesh is None:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone)
        part = spec(where, self.mesh) if isinstance(where, str) else where
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, part))

    def rows(self, x: Any) -> Any:
        """An array whose first axis are sequences."""
        return self.array(x, " ".join(["B", *("-" for _ in x.shape[1:])]))

    def context(self) -> AbstractContextManager[Any]:
        """What to lower programs in: the mesh; of one device a mesh without axes, which is empty.

        JAX's kernels ask the mesh in context for its kind of device, and this process's devices where there is none.
        """
        mesh = (self.mesh or jax.make_mesh((1,), (MODEL,), devices=[self.device])).abstract_mesh
        if self.mesh is None:
            mesh = AbstractMesh((), (), abstract_device=mesh.abstract_device)
        return jax.sharding.use_abstract_mesh(mesh)

    def outputs(self, run: Callable[..., Any], *given: Any) -> Any:
        """What a function gives, laid out as the compiler lays it out."""
        token = self.array(jax.ShapeDtypeStruct((), jnp.int32), "")  # so that the devices are known in any case
        with self.context():
            program = jax.jit(lambda _, *given: run(*given), keep_unused=True).lower(token, *given)
            shapes = jax.eval_shape(run, *given)
            placed = program.compile().output_shardings
        return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, placed)


def leave_devices() -> None:
    """Keep JAX and libtpu from looking for devices here; call it before JAX has."""
    # Nobody answers for a TPU's metadata, and other processes with libtpu are not in the way.
    told = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    for name, value in (told | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}).items():
        os.environ.setdefault(name, value)
    os.environ.pop("XLA_FLAGS", None)  # libtpu ends the process where it does not know a CPU's flag
    jax.config.update("jax_enable_compilation_cache", False)  # it could not be read: there is no device to run on
    if not jax.config.jax_platforms:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")


def topology_devices(name: str) -> list[Any]:
    """The devices of a topology of TPUs such as v5e:2x4, as libtpu describes them.

    Raises:
        DominoError: libtpu is not installed, or knows no such topology.
    """
    require("libtpu")
    # A host of the smallest topologies has fewer chips than libtpu expects.
    alone = {"chips_per_host_bounds": (1, 1, 1)} if set(re.findall(r"\d+", name.partition(":")[2])) == {"1"} else {}
    try:
        devices = list(topologies.get_topology_desc(name, platform="tpu", **alone).devices)
    except (RuntimeError, ValueError) as error:
        raise DominoError(f"libtpu knows no topology {name}: {first_line(error)}.") from None
    if device_of_kind(devices[0].device_kind) is None:
        known = ", ".join(device.name for device in DEVICES.values() if device.gigahertz)
        raise DominoError(f"the rates of {name}'s devices, {devices[0].device_kind}, are not known here: {known} are.")
    return devices


def circumstances_ahead(device: Any) -> dict[str, Any]:
    """What figures of programs for a device that is not here are to say of where they come from."""
    return {
        "estimated": True,
        "commit": git_commit(),
        "jax": jax.__version__,
        "libtpu": version("libtpu"),
        "device": device.device_kind,
    }


def compile_ahead(name: str, place: Place, lower: Callable[[], Any]) -> tuple[Any, str]:
    """Lower and compile a program; it, and its text as the compiler writes it.

    (`jax.stages.Compiled.as_text` reads the program back first, which jaxlib can't where libtpu is newer.)

    Args:
        name: of the program, for errors.

    Raises:
        DominoError: the compiler refuses it, or writes no text.
    """
    with TemporaryDirectory() as folder:
        try:
            with place.context():
                compiled = lower().compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            raise DominoError(f"{name} does not compile for {place.device.device_kind}: {first_line(error)}.") from None
        texts = sorted(Path(folder).glob("*.after_codegen.txt"), key=lambda path: path.stat().st_size)
        if not texts:
            raise DominoError(f"libtpu {version('libtpu')} writes no text of what it compiles: another one may.")
        return compiled, texts[-1].read_text(encoding="utf-8")


def program_figures(
    compiled: Any, text: str, device: Device, floors: Mapping[str, float], looped: bool = True
) -> dict[str, Any]:
    """What a compiled program says of itself, for one device.

    Args:
        text: of the program.
        floors: of each phase, a named scope, the least milliseconds that it can take.
        looped: see `hlo.read_figures`.
    """
    loop, around, moves = read_figures(text, floors, looped)
    copies, written = ([move for move in moves if (move.opcode == WRITE_BACK) == back] for back in (False, True))
    held = compiled.memory_analysis()
    phases = {}
    for phase in (*floors, "other"):
        estimate, floor = loop.cycles[phase] / device.gigahertz / 1e6, floors.get(phase, 0.0)
        if floor or estimate:
            phases[phase] = {"estimated_cycles": loop.cycles[phase], "estimated_ms": estimate, "floor_ms": floor}
    argument, temporary = held.argument_size_in_bytes, held.temp_size_in_bytes
    output = held.output_size_in_bytes - held.alias_size_in_bytes
    return {
        "argument_bytes": argument,
        "temporary_bytes": temporary,
        "output_bytes": output,
        "device_bytes": device.memory,
        "fits": argument + temporary + output <= device.memory,
        "weight_copies": _copies(copies, ("params", "frozen")),
        "cache_copies": _copies(copies, ("state",)),
        "cache_write_backs": _copies(written, ("state",)),
        "collectives": {
            kind: {"count": count, "bytes": loop.collective_bytes[kind] + around.collective_bytes[kind]}
            for kind, count in sorted((loop.collectives + around.collectives).items())
        },
        "estimated_cycles": loop.cycles.total(),
        "estimated_cycles_around_the_loop": around.cycles.total(),
        "kernels_without_estimate": loop.unknown + around.unknown,
        "phases": phases,
        "estimated_ms": sum(phase["estimated_ms"] for phase in phases.values()),
        "floor_ms": sum(phase["floor_ms"] for phase in phases.values()),
        # The larger of both, phase by phase: an estimate knows little of memory, a floor of nothing else.
        "larger_ms": sum(max(phase["estimated_ms"], phase["floor_ms"]) for phase in phases.values()),
    }


def _copies(moves: Iterable[Move], kinds: tuple[str, ...]) -> dict[str, Any]:
    """How many arrays of some arguments are copied, and where.

    Args:
        kinds: how the paths of the arguments begin.
    """
    ours = [move for move in moves if move.argument.startswith(kinds)]
    return {
        "count": len(ours),
        "bytes": sum(move.bytes for move in ours),
        "in_loop": sum(move.looped for move in ours),
        "arguments": dict(Counter(re.sub(r"\[\d+\]", "[]", move.argument) for move in ours)),
    }
