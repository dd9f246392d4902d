"""Decoding's programs lowered for devices that are not here, and how many operations of a kind they run."""

import dataclasses
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
from jax.sharding import Mesh

from convert.loading import plan_load
from convert.shapes import described_weights
from domino_jax import prepare
from domino_jax.attention import Backend
from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.sharding import MODEL, fit_to_mesh, mesh_context
from domino_jax.weights import Params
from infer.bench.compile import ProgramName
from infer.bench.programs import decoding_state, trace_program

# What is asked of a device before anything is traced.
PRETENDED: dict[str, Any] = {
    "cpu": SimpleNamespace(platform="cpu", device_kind="cpu"),
    "tpu": SimpleNamespace(platform="tpu", device_kind="TPU v6 lite"),
    "cuda": SimpleNamespace(
        platform="gpu", device_kind="NVIDIA H200", client=SimpleNamespace(platform_version="cuda 13000")
    ),
}


def lower_program(
    name: ProgramName,
    pair: tuple[TargetConfig, DraftConfig],
    platform: str,
    *,
    batch: int = 1,
    capacity: int = 2048,
    attention: Backend = "xla",
    page_size: int | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """A program in bfloat16 as a platform of PRETENDED has it, of arrays that are only described.

    Args:
        capacity: positions of the caches.
        mesh: of this process's devices, which stand for the platform's.
    """
    chosen = plan_load(*pair, "bfloat16", mesh=(1, 1), attention=attention, devices=[PRETENDED[platform]])
    configs = dataclasses.replace(chosen.configs, attention=attention)
    if mesh is not None:
        size = mesh.shape[MODEL]
        assert configs.drafter is not None
        drafter: Any = dataclasses.replace(configs.drafter, config=fit_to_mesh(configs.draft, size))  # type: ignore
        configs = dataclasses.replace(configs, target=fit_to_mesh(configs.target, size), drafter=drafter)
    params = Params(*(described_weights(config, chosen.dtype, mesh) for config in pair))
    state = jax.eval_shape(partial(decoding_state, configs, batch, capacity, chosen.dtype, page_size))
    with mesh_context(mesh):
        if platform == "tpu":
            params = prepare.prepare_for_tpu(params, configs.target, configs.draft, call=jax.eval_shape)
        return trace_program(name, configs, params, state).lower(lowering_platforms=(platform,))


def count_operations(lowered: Any) -> Counter[str]:
    """Operations of a lowered program by name, of a loop's body once, and of a function as often as it is called.

    "arguments" are those of the program; a custom call counts under the name of what it calls, too.
    """
    functions = {
        op.attributes["sym_name"].value: op
        for op in lowered.compiler_ir("stablehlo").body.operations
        if op.operation.name == "func.func"
    }
    known: dict[str, Counter[str]] = {}

    def called(name: str) -> Counter[str]:
        if name not in known:
            known[name] = inside(functions[name].operation)
        return known[name]

    def inside(op: Any) -> Counter[str]:
        found: Counter[str] = Counter()
        for inner in (inner for region in op.regions for block in region for inner in block):
            kind = inner.operation.name.removeprefix("stablehlo.")
            if kind == "func.call":
                found += called(inner.attributes["callee"].value)
            else:
                found[kind] += 1
                if kind == "custom_call":
                    found[inner.attributes["call_target_name"].value] += 1
                found += inside(inner.operation)
        return found

    return called("main") + Counter(arguments=len(functions["main"].arguments))
