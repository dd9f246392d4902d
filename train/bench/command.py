"""What a training step costs at the public shapes, with random weights: time, its parts, FLOPs, memory.

    python -m train bench --shapes qwen3-8b --out docs/results/train-8b-h200.json

The cost does not depend on the weights' values. FLOPs are counted by `train.bench.flops`, of the model and not of the
program: what is computed a second time in the backward pass is not counted a second time.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from convert.options import Dtype, Weights, check_count, check_file, check_real, check_topology
from convert.registry import DEMO_FOLDER, read_configs
from convert.shapes import find_shape, random_weights
from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.drafters import block, training_attention
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.errors import DominoError
from domino_jax.moe import resolve_moe_backend
from domino_jax.prepare import target_form
from domino_jax.runtime.ahead import Place, leave_devices, topology_devices
from domino_jax.runtime.command import run_command, words_at_fault
from domino_jax.runtime.compile_cache import enable_compile_cache
from domino_jax.runtime.devices import device_of_kind, own_devices
from domino_jax.runtime.precision import matmul_precision, resolve_dtype
from domino_jax.runtime.provenance import git_commit
from domino_jax.runtime.weight_forms import resolve_weights
from domino_jax.sharding import mesh_context, parse_training_mesh
from domino_jax.weights import flatten
from train import anchors, mesh
from train.bench.flops import flops
from train.config import Objective, OptimizerConfig, Recipe
from train.loss import (
    Inputs,
    check_attention,
    gather_positions,
    loss_denominator,
    partial_loss,
    supervision,
    target_states,
)
from train.step import TrainState, drafter_of, init_state, train_step

DEMO_SHAPE = "demo"


@dataclass(frozen=True)
class TrainBench:
    """Time a training step at a public shape with random weights."""

    shapes: str = DEMO_SHAPE
    """demo, the shipped pair's, or a public one such as qwen3-8b, with a drafter as the public ones"""
    out: Path | None = None
    """JSON file for the figures"""
    batch: int = 2
    """sequences a step"""
    length: int = 768
    block_size: int | None = None
    """M; that of the shape's drafter when not given, as the next two"""
    gru_hidden_dim: int | None = None
    emb_dim: int | None = None
    accumulate: int = 1
    captured: bool = False
    """the target's states are given and not computed"""
    dtype: Dtype | None = None
    """float32 on a CPU and bfloat16 elsewhere when not given"""
    weights: Weights = "auto"
    """form of the target's matrices: exact, which auto is too, int8 or float8"""
    mesh: str | None = None
    """such as data=1,fsdp=4,model=2"""
    steps: int = 5
    """timed; the median counts"""
    phases: bool = True
    """time the parts as well, each a program of its own"""
    compile: str | None = None
    """only compile the step, for TPUs that are not here, such as v5e:2x4: what it holds and is estimated to cost"""
    peak_tflops: float | None = None
    """of one device: from a table, or measured by a large product where that has none"""
    objective: Objective = field(default_factory=Objective)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def configs(options: TrainBench) -> tuple[TargetConfig, DraftConfig]:
    """The target of a shape, and its drafter with what the options change of it.

    Raises:
        DominoError: there is no such shape, or a change makes no sense.
    """
    if options.shapes == DEMO_SHAPE:
        _, target, drafter, _ = read_configs(DEMO_FOLDER / "target", DEMO_FOLDER / "draft")
        assert isinstance(drafter, DraftConfig)
    else:
        target, drafter = find_shape(options.shapes)
    assert isinstance(drafter.head, DominoHead)
    head = replace(
        drafter.head,
        gru_hidden_dim=options.gru_hidden_dim or drafter.head.gru_hidden_dim,
        emb_dim=options.emb_dim or drafter.head.emb_dim,
    )
    return target, replace(drafter, block_size=options.block_size or drafter.block_size, head=head)


def measured_peak(dtype: Any) -> float:
    """TFLOP/s of a large product on one device."""
    size, turns = (512, 3) if own_devices()[0].platform == "cpu" else (8192, 20)
    x = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda x: jax.lax.fori_loop(0, turns, lambda _, y: (x @ y) * (1 / size), x))
    return 2 * size**3 * turns / median(lambda: multiply(x), 3) / 1e12


def median(run: Callable[[], Any], times: int) -> float:
    """Seconds of a run, the first left out."""
    jax.block_until_ready(run())
    found = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def phases(recipe: Recipe, state: TrainState, frozen: Any, inputs: Inputs, times: int) -> dict[str, float]:
    """Milliseconds of programs that each hold one part more of the step, and what each adds to the one before.

    One part of the batch runs, if it is accumulated in several. What is left of the whole step is called optimizer.
    """
    assert isinstance(recipe.draft, DraftConfig)
    pair, objective = (recipe.target, recipe.draft), recipe.objective
    rows = inputs.ids.shape[0] // recipe.accumulate
    given = jax.tree.map(lambda x: x[:rows], inputs)
    chosen, valid = jax.jit(lambda mask: anchors.draw_anchors(jax.random.key(0), mask, objective.anchors))(given.mask)
    lam = jnp.float32(0.5)

    def states(frozen: Any, given: Inputs) -> Any:
        return target_states(frozen, *pair, given, objective)

    @jax.jit
    def target_only(weights: Any, frozen: Any, given: Inputs) -> Any:
        return states(frozen, given)

    @jax.jit
    def backbone(weights: Any, frozen: Any, given: Inputs) -> Any:
        features, hidden = states(frozen, given)
        x = block.block_inputs(frozen.embed, recipe.draft, gather_positions(given.ids, chosen[..., None])[..., 0])
        form = training_attention.resolve_block_backend(objective.block_attention, pair[1], chosen.shape[1])
        drafter = drafter_of(recipe, weights)
        return block.training_blocks(drafter, pair[1], x, chosen, features, backend=form), hidden

    def loss(weights: Any, frozen: Any, given: Inputs) -> Any:
        total = loss_denominator(objective, supervision(recipe.draft, objective.loss, given, chosen, valid))
        return partial_loss(drafter_of(recipe, weights), frozen, pair, objective, given, chosen, valid, lam, total)

    programs = {
        "target": target_only,
        "drafter": backbone,
        "loss": jax.jit(loss),
        "backward": jax.jit(jax.value_and_grad(loss, has_aux=True)),
    }
    found, before = {}, 0.0
    for name, program in programs.items():
        took = 1e3 * median(lambda program=program: program(state.weights, frozen, given), times) * recipe.accumulate
        found[f"{name}_ms"], before = took - before, took
    return found


def run_train_bench(options: TrainBench) -> dict[str, Any]:
    """The figures, as one flat row.

    Raises:
        UsageError: there is no such shape, or a number makes no sense.
        DominoError: the mesh does not fit the devices or the models.
    """
    with words_at_fault():
        target, config = configs(options)
        form = resolve_weights(options.weights)
    for name in ("batch", "length", "block_size", "gru_hidden_dim", "emb_dim", "accumulate", "steps"):
        if (value := getattr(options, name)) is not None:
            check_count(name, value)
    for name in ("anchors", "chunk"):
        check_count(name, getattr(options.objective, name))
    check_real("gamma", options.objective.gamma, "above 0")
    if options.peak_tflops is not None:
        check_real("peak_tflops", options.peak_tflops, "above 0")
    if options.mesh:
        with words_at_fault():
            parse_training_mesh(options.mesh)
    if options.compile is not None:
        check_topology("compile", options.compile)
    devices = None
    if options.compile is not None:
        leave_devices()
        with words_at_fault():
            devices = topology_devices(options.compile)
    device = (devices or own_devices())[0]
    target = resolve_moe_backend(target, device.platform)
    dtype = resolve_dtype(options.dtype, device.platform)
    check_attention(options.objective, target, config, dtype, device, options.captured)
    made = mesh.make_training_mesh(options.mesh, (target, config), devices) if options.mesh else None
    recipe = Recipe(target, config, options.objective, options.optimizer, 1000, dtype.name, options.accumulate)
    if options.compile is not None:
        from train.bench.ahead import compile_step

        shapes = jax.eval_shape(lambda: _random_inputs(options, target, config, dtype))
        figures = compile_step(recipe, shapes, Place(made, device), options.captured, form)
        return flat_options(options) | {"dtype": dtype.name, "target_weights": form} | figures
    with mesh_context(made), matmul_precision(dtype):
        return _run(options, recipe, made)


def _run(options: TrainBench, recipe: Recipe, made: Any) -> dict[str, Any]:
    target, config, dtype = recipe.target, recipe.draft, jnp.dtype(recipe.dtype)
    assert isinstance(config, DraftConfig)
    weights = resolve_weights(options.weights)
    frozen = random_weights(target, dtype, made, target_form(target, weights))
    drafted = random_weights(config, jnp.float32, made)
    state = init_state(recipe, flatten(drafted), 0)
    del drafted
    inputs = mesh.laid_rows(jax.jit(lambda: _random_inputs(options, target, config, dtype))(), made)
    began = time.perf_counter()
    program = train_step.lower(recipe, state, frozen, inputs).compile()
    compile_s = time.perf_counter() - began
    memory = program.memory_analysis()
    parts = phases(recipe, state, frozen, inputs, options.steps) if options.phases else {}
    times = []
    for number in range(options.steps + 1):
        began = time.perf_counter()
        state, metrics = program(state, frozen, inputs)
        jax.block_until_ready((state, metrics))
        if number:
            times.append(time.perf_counter() - began)
    took = statistics.median(times)
    if not bool(metrics.finite):
        raise DominoError("the step's loss or gradient is not finite: its time means nothing; try --dtype float32.")
    if parts:
        parts["optimizer_ms"] = took * 1e3 - sum(parts.values())
    device, devices = own_devices()[0], 1 if made is None else made.size
    known = device_of_kind(device.device_kind)
    peak, source = options.peak_tflops or (known and known.flops / 1e12), "stated"
    if peak is None:
        peak, source = measured_peak(dtype), "measured"
    counted = flops(target, config, options.batch, options.length, options.objective.anchors)
    if options.captured:
        counted["target"] = 0.0
    drafter_flops = counted["forward"] + counted["backward"]
    stats = device.memory_stats() or {}
    return {
        **flat_options(options),
        "block_size": config.block_size,
        "dtype": dtype.name,
        "weights": "random",
        "target_weights": weights,
        "commit": git_commit(),
        "device": device.device_kind,
        "devices": devices,
        "jax": jax.__version__,
        "target_parameters": sum(w.size for w in jax.tree.leaves(frozen)),
        "drafter_parameters": sum(w.size for w in state.weights.values()),
        "step_ms": took * 1e3,
        "step_ms_all": [t * 1e3 for t in times],
        "ms_per_sample": took * 1e3 / options.batch,
        "samples_per_second": options.batch / took,
        **parts,
        "compile_s": compile_s,
        **{f"{name}_tflop": count / 1e12 for name, count in counted.items()},
        "tflops_per_device": (drafter_flops + counted["target"]) / took / 1e12 / devices,
        "peak_tflops": peak,
        "peak_source": source,
        "mfu": (drafter_flops + counted["target"]) / took / 1e12 / devices / peak,
        "mfu_of_drafter": drafter_flops / took / 1e12 / devices / peak,
        "temporary_gb": memory.temp_size_in_bytes / 1e9 if memory else None,
        "arguments_gb": memory.argument_size_in_bytes / 1e9 if memory else None,
        "peak_memory_gb": stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None,
    }


def flat_options(options: TrainBench) -> dict[str, Any]:
    """The options by flat names."""
    values = asdict(options) | asdict(options.objective) | asdict(options.optimizer)
    del values["objective"]
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _random_inputs(options: TrainBench, target: TargetConfig, config: DraftConfig, dtype: Any) -> Inputs:
    shape = options.batch, options.length
    ids = jax.random.randint(jax.random.key(0), shape, 0, target.vocab_size - 1, jnp.int32)
    features = hidden = None
    if options.captured:
        features = jax.random.normal(jax.random.key(1), (*shape, config.sizes["LD"]), dtype)
        hidden = jax.random.normal(jax.random.key(2), (*shape, target.hidden_size), dtype)
    return Inputs(ids, jnp.ones(shape, bool), None, features, hidden if options.objective.reads_target else None)


def show_bench(row: dict[str, Any]) -> str:
    """The figures in a few lines."""
    parts = ", ".join(f"{name[:-3]} {row[name]:,.1f}" for name in row if name in PHASES)
    memory = row["peak_memory_gb"]
    return "\n".join(
        [
            f"{row['shapes']} shape with random weights (speed only), {row['dtype']}, "
            f"{row['devices']} x {row['device']}, "
            f"batch {row['batch']}, length {row['length']}, {row['anchors']} anchors of {row['block_size']}",
            f"{row['step_ms']:,.1f} ms a step, {row['ms_per_sample']:,.1f} ms a sample, "
            f"{row['samples_per_second']:,.2f} samples/s" + (f"; ms: {parts}" if parts else ""),
            f"{row['tflops_per_device']:,.2f} TFLOP/s a device, MFU {row['mfu']:.1%} of {row['peak_tflops']:,.2f} "
            f"({row['peak_source']}), {row['mfu_of_drafter']:.1%} without the target's forward pass",
            f"memory: arguments {row['arguments_gb']:,.2f} GB, temporary {row['temporary_gb']:,.2f} GB"
            + (f", peak {memory:,.2f} GB" if memory else ""),
        ]
    )


def show_compiled(row: dict[str, Any]) -> str:
    """The figures of a step that was compiled and not run, in a few lines."""
    held = [f"{row[f'{name}_bytes'] / 2**30:,.2f} GiB" for name in ("argument", "temporary", "device")]
    sent = ", ".join(f"{x['count']} {kind} of {x['bytes'] / 1e6:,.0f} MB" for kind, x in row["collectives"].items())
    copied = ", ".join(f"{row[kind]['count']} of {row[kind]['bytes'] / 1e6:,.0f} MB" for kind in COPIES)
    unknown = row["kernels_without_estimate"]
    return "\n".join(
        [
            f"{row['shapes']} shape, {row['dtype']}, on {row['devices']} of {row['compile']} ({row['device']}), batch "
            f"{row['batch']}, length {row['length']}, {row['anchors']} anchors. Estimated by libtpu {row['libtpu']}, "
            "for one device; nothing was run.",
            f"{row['estimated_ms']:,.1f} ms a step by estimate, {row['floor_ms']:,.1f} ms by its products alone"
            + (f"; without {unknown} kernels, of which the compiler estimates nothing" if unknown else ""),
            f"memory: arguments {held[0]}, temporaries {held[1]} of {held[2]}: {'fits' if row['fits'] else 'too much'}",
            f"between devices: {sent or 'nothing'}; copies of weights and of the state: {copied}",
        ]
    )


COPIES = ("weight_copies", "state_copies")
PHASES = ("target_ms", "drafter_ms", "loss_ms", "backward_ms", "optimizer_ms")


def print_bench(options: TrainBench) -> None:
    """Measure, write the figures if a file was named, and print them."""
    check_file("out", options.out)
    if options.compile is None:
        enable_compile_cache()
    row = run_train_bench(options)
    if options.out:
        options.out.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    print(show_compiled(row) if options.compile else show_bench(row))


def main(argv: Sequence[str] | None = None, prog: str = "python -m train bench") -> int:
    """Run the command line; returns the exit code."""
    return run_command(TrainBench, print_bench, argv, prog=prog)
