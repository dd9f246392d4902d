"""The programs of a pair, compiled ahead of time for TPUs that are not here (see `infer.bench.compile`)."""

import dataclasses
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from convert.loading import LoadPlan, plan_load
from convert.registry import NO_DRAFT, read_configs, resolve_folders
from convert.shapes import described_weights, find_shape
from domino_jax import cache as kv
from domino_jax import decode, prepare
from domino_jax.config import DecoderConfig, DraftConfig, TargetConfig, choose_target_layer_ids
from domino_jax.decode import DecodeConfig, DecodeState
from domino_jax.errors import DominoError
from domino_jax.runtime.ahead import Place, circumstances_ahead, compile_ahead, program_figures, topology_devices
from domino_jax.runtime.command import UsageError, words_at_fault
from domino_jax.runtime.precision import matmul_precision
from domino_jax.runtime.slots import CYCLES, STEPS_PER_CYCLE, STOP_IDS
from domino_jax.sampling import settings
from domino_jax.sharding import DATA, MODEL
from domino_jax.weights import Params
from infer.bench.compile import Compile, ProgramName
from infer.bench.roofline import Machine, work
from infer.bench.tracing import SCOPES


def compile_programs(options: Compile, console: Console) -> dict[str, Any]:
    """The figures of each program, and why some have none.

    Raises:
        UsageError: the topology is unknown, or mesh and shapes do not fit it.
        DominoError: a model is not found.
    """
    assert options.topology is not None
    target, draft = read_pair(options, console)
    with words_at_fault():
        devices = topology_devices(options.topology)
        mesh = options.asked.device.mesh_sizes() or (1, len(devices))
        how = options.asked.plan(options.num_draft_tokens)
        how["mesh"] = mesh
        chosen = plan_load(target, draft, options.dtype, devices=devices, **how)
    configs = dataclasses.replace(chosen.fitted, attention=chosen.backends[0])
    place = Place(chosen.mesh, devices[0])
    capacity = kv.length_bucket(options.context)
    if capacity < configs.lookahead:
        raise UsageError(f"--context {options.context} is too short for a cycle of {configs.lookahead} positions.")
    with words_at_fault():
        state = describe_state(configs, options.batch, capacity, chosen.dtype, place, options.pages)
    params = describe_params(chosen, place)
    wanted: list[ProgramName] = [name for name in options.programs if name != "cycle" or configs.drafter is not None]
    programs, failed = [], {}
    for number, name in enumerate(wanted):
        try:
            with console.status(f"compiling {name}, {number + 1} of {len(wanted)} programs"):
                programs.append(compile_program(name, options, configs, params, state, place))
        except DominoError as error:  # too large for the device, say: the others may be not
            failed[name] = str(error)
            continue
        console.print(f"{name}: compiled in {programs[-1]['compile_seconds']:.0f} s", highlight=False)
    return circumstances_ahead(devices[0]) | {
        "topology": options.topology,
        "mesh": f"{DATA}={mesh[0]},{MODEL}={mesh[1]}",
        "model": options.shapes or options.model,
        "draft": options.drafting.draft or "",
        "head_candidates": str(options.drafting.head_candidates),
        "confidence_threshold": options.drafting.confidence_threshold,
        "target_weights": chosen.weights,
        "draft_weights": chosen.draft_weights,
        "dtype": chosen.dtype.name,
        "attention": configs.attention,
        "kv_cache": options.kv_cache,
        "page_size": options.pages,
        "batch": options.batch,
        "context": options.context,
        "capacity": capacity,
        "num_draft_tokens": configs.proposals,
        "layers": target.num_hidden_layers,
        "whole": options.layers is None,
        "tau": options.tau,
        "programs": programs,
        "failed": failed,
    }


def read_pair(options: Compile, console: Console) -> tuple[TargetConfig, DecoderConfig | None]:
    """The configs of target and drafter; None for no drafter.

    Raises:
        UsageError: there is no such shape, or it has fewer layers than asked for.
        DominoError: there is no such model.
    """
    draft: DecoderConfig | None
    if options.shapes is not None:
        with words_at_fault():
            target, draft = find_shape(options.shapes)
        draft = None if options.drafting.draft == NO_DRAFT else draft
    else:
        asked = options.asked
        revision = options.drafting.draft_revision
        folders = resolve_folders(asked.model, asked.draft, console, draft_revision=revision, weights=False)
        _, target, draft, _ = read_configs(*folders)
    return (target, draft) if options.layers is None else cut_layers(target, draft, options.layers)


def cut_layers(
    target: TargetConfig, draft: DecoderConfig | None, layers: int
) -> tuple[TargetConfig, DecoderConfig | None]:
    """The pair with fewer layers of the same widths.

    Raises:
        UsageError: the target has fewer.
    """
    if layers > target.num_hidden_layers:
        raise UsageError(f"--layers {layers} is more than the target's {target.num_hidden_layers}.")
    if isinstance(draft, DraftConfig) and layers < target.num_hidden_layers:
        few = min(layers, draft.num_hidden_layers)
        draft = dataclasses.replace(
            draft,
            num_hidden_layers=few,
            windows=draft.windows[:few],
            num_target_layers=layers,
            target_layer_ids=choose_target_layer_ids(layers, few),
        )
    return dataclasses.replace(target, num_hidden_layers=layers), draft


def describe_params(chosen: LoadPlan, place: Place) -> Params:
    """The weights of a pair as they are loaded, in 8 bits where asked."""
    pair = chosen.configs
    weights = partial(described_weights, dtype=chosen.dtype, mesh=place.mesh, device=place.device)
    params = Params(weights(pair.target), weights(pair.draft) if pair.draft else None)
    kind, target, draft = chosen.draft_weights, chosen.fitted.target, chosen.fitted.draft
    outputs = cache(place.outputs)
    if chosen.weights != "exact":
        params = params._replace(target=prepare.quantize_target(params.target, target, chosen.weights, outputs))
    if kind != "exact" and isinstance(draft, DraftConfig):
        params = prepare.quantize_drafter(params, draft, kind, outputs)
    groups = place.mesh.shape[DATA] if place.mesh else 1
    # Layer by layer, those of equal shapes once: one program for all would not fit where the weights do.
    return prepare.prepare_for_tpu(params, target, draft, groups, outputs)


def describe_state(
    configs: DecodeConfig, batch: int, capacity: int, dtype: Any, place: Place, page_size: int | None = None
) -> DecodeState:
    """The state of `batch` rows that decode, laid out on its devices.

    Args: see `decoding_state`.

    Raises:
        DominoError: the rows can't be divided over the mesh.
    """
    data = place.mesh.shape[DATA] if place.mesh else 1
    if batch % data:
        raise DominoError(f"{batch} rows can't be divided over data={data}: give a multiple of it.")
    if page_size is not None and data > 1:
        raise DominoError(f"a KV cache in pages needs a mesh with data=1, found data={data}.")
    how = configs, batch, capacity, dtype, page_size
    placed = place.outputs(partial(empty_caches, *how))
    state = jax.eval_shape(partial(decoding_state, *how))
    return jax.tree.map(place.rows, state)._replace(cache=placed.target, drafter=placed.drafter)


def decoding_state(
    configs: DecodeConfig, batch: int, capacity: int, dtype: Any, page_size: int | None = None
) -> DecodeState:
    """The state of `batch` greedy rows.

    Args:
        capacity: positions of the caches.
        dtype: of the caches.
        page_size: positions of a page, of which there are as many as the rows can use; None for contiguous caches.
    """
    keys = jax.random.split(jax.random.key(0), batch)
    rows = decode.new_rows(keys, [1] * batch, np.full((batch, STOP_IDS), -1, np.int32), settings(batch))
    return decode.begin(rows, [1] * batch, empty_caches(configs, batch, capacity, dtype, page_size))


def empty_caches(
    configs: DecodeConfig, batch: int, capacity: int, dtype: Any, page_size: int | None = None
) -> decode.Caches:
    """Those of `decoding_state`."""
    if page_size is None:
        return decode.init_caches(configs, batch, capacity, dtype)
    return decode.init_paged_caches(configs, batch, capacity, dtype, batch * capacity // page_size + 1, page_size)


def compile_program(
    name: ProgramName, options: Compile, configs: DecodeConfig, params: Params, state: DecodeState, place: Place
) -> dict[str, Any]:
    """Compile one program; its figures.

    Raises:
        DominoError: the compiler refuses it.
    """
    batch, chunk, dtype = options.batch, chunk_of(state), params.target.norm.dtype

    def lower() -> Any:
        return trace_program(name, configs, params, state, place.array).lower()

    began = time.perf_counter()
    with matmul_precision(dtype):
        compiled, text = compile_ahead(name, place, lower)
    seconds = time.perf_counter() - began
    mesh = (place.mesh.shape[DATA], place.mesh.shape[MODEL]) if place.mesh else (1, 1)
    machine = Machine(place.stated.bandwidth, place.stated.flops)
    run = (params.without_drafter, configs.without_drafter) if name == "step" else (params, configs)
    needed = work(run[1], run[0], batch, options.context, mesh, chunk=chunk if name == "prefill" else None)
    floors = {scope: machine.milliseconds(needed[scope]) if scope in needed else 0.0 for scope in SCOPES}
    figures = program_figures(compiled, text, place.stated, floors, looped=name != "prefill")
    return {"name": name, "compile_seconds": seconds} | figures | rates(figures, produced(name, options, chunk))


def chunk_of(state: DecodeState) -> int:
    """Positions of each row that one run of the prefill program takes."""
    return min(decode.LARGEST_CHUNK, state.cache.capacity)


def trace_program(
    name: ProgramName,
    configs: DecodeConfig,
    params: Params,
    state: DecodeState,
    array: Callable[[Any, str], Any] = lambda x, letters: x,
) -> Any:
    """A program as `Slots` runs it for greedy rows, traced (`jax.stages.Traced`) for weights and a state that need not
    be there.

    Args:
        array: an array of a shape and dtype, by its axis letters, where the others are.
    """
    if name == "step":
        plain = params.without_drafter, configs.without_drafter, state._replace(drafter=None)
        return decode.autoregress.trace(*plain, CYCLES * STEPS_PER_CYCLE, True, np.int32(1))
    if name == "cycle":
        return decode.speculate.trace(params, configs, state, CYCLES, True, np.int32(1))
    batch = state.token.shape[0]
    tokens = array(jax.ShapeDtypeStruct((batch, chunk_of(state)), jnp.int32), "B T")
    last = array(jax.ShapeDtypeStruct((batch, configs.target.hidden_size), params.target.norm.dtype), "B D")
    return decode.prefill.trace(params, configs, state, tokens, np.int32(0), last)


def produced(name: ProgramName, options: Compile, chunk: int) -> float | None:
    """Tokens of all rows that a program's run gives, or takes in a prefill; None where that takes a τ."""
    each = {"prefill": chunk, "step": 1, "cycle": options.tau}[name]
    return each and each * options.batch


def rates(figures: dict[str, Any], tokens: float | None) -> dict[str, float | None]:
    """Tokens per second where a run gives so many."""
    return {
        f"{kind}_tokens_per_second": tokens / figures[f"{kind}_ms"] * 1e3 if tokens and figures[f"{kind}_ms"] else None
        for kind in ("estimated", "floor", "larger")
    }
