"""What a training step costs at the public shapes, with random weights: time, its parts, FLOPs, memory.

    python -m train.bench --shapes qwen3-8b --out docs/results/train-8b-h200.json

The cost does not depend on the weights' values. FLOPs are counted by `flops`, of the model and not of the program:
what is computed a second time in the backward pass is not counted a second time.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from jax import Array

from convert.precision import settle
from convert.programs import keep_programs
from domino_jax import blocks, draft
from domino_jax.config import DecoderConfig, DraftConfig, HeadConfig, TargetConfig, default_taps
from domino_jax.errors import DominoError
from domino_jax.sharding import stored
from domino_jax.weights import axes, flatten, is_bias, unflatten
from train import anchors, mesh
from train.loss import Inputs, Kind, Objective, TargetAttention, denominator, gather, part, supervision, target_states
from train.step import LOOPED, Recipe, TrainState, start, train_step

# Width, layers, heads, KV heads, head width, MLP width, vocabulary, tied, layers of the drafter (SPEC section 2).
SHAPES = {
    "demo": (384, 6, 6, 2, 64, 1024, 4096, True, 2),
    "qwen3-0.6b": (1024, 28, 16, 8, 128, 3072, 151936, True, 5),
    "qwen3-4b": (2560, 36, 32, 8, 128, 9728, 151936, True, 5),
    "qwen3-8b": (4096, 36, 32, 8, 128, 12288, 151936, False, 5),
}
# Dense bfloat16 TFLOP/s of a device, as its maker states them, by what JAX calls it.
PEAKS = {
    "NVIDIA H200": 989.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5p": 459.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
}


@dataclass(frozen=True)
class Bench:
    """Time a training step at a public shape with random weights."""

    shapes: str = "demo"
    """demo, qwen3-0.6b, qwen3-4b or qwen3-8b"""
    out: Path | None = None
    """JSON file for the figures"""
    batch: int = 2
    """sequences a step"""
    length: int = 768
    anchors: int = 256
    """A, blocks a sequence"""
    block_size: int = 16
    gru_hidden_dim: int = 1024
    emb_dim: int = 256
    accumulate: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    loss: Kind = "ce"
    chunk: int = 1024
    """proposals whose logits exist at a time on a device"""
    block_attention: blocks.Choice = "auto"
    target_attention: TargetAttention = "xla"
    remat: bool = False
    """compute the drafter's layers again in the backward pass"""
    captured: bool = False
    """the target's states are given and not computed"""
    dtype: str | None = None
    """float32 on a CPU and bfloat16 elsewhere when not given"""
    mesh: str | None = None
    """such as data=1,fsdp=4,model=2"""
    steps: int = 5
    """timed; the median counts"""
    phases: bool = True
    """time the parts as well, each a program of its own"""
    peak_tflops: float | None = None
    """of one device: from a table, or measured by a large product where that has none"""


def configs(options: Bench) -> tuple[TargetConfig, DraftConfig]:
    """The target of a shape, and a drafter like the public ones.

    Raises:
        DominoError: there is no such shape.
    """
    if options.shapes not in SHAPES:
        raise DominoError(f"--shapes {options.shapes}: the shapes are {', '.join(SHAPES)}.")
    width, layers, heads, kv_heads, head_dim, mlp, vocabulary, tied, draft_layers = SHAPES[options.shapes]
    target = TargetConfig(
        vocabulary, width, layers, heads, kv_heads, head_dim, mlp, 1e-6, 1e6, 40960, tie_word_embeddings=tied
    )
    drafter = DraftConfig(
        **target.geometry(num_hidden_layers=draft_layers),
        block_size=options.block_size,
        mask_token_id=vocabulary - 1,
        target_layer_ids=default_taps(layers, draft_layers),
        num_target_layers=layers,
        shift_label=True,
        head=HeadConfig(options.gru_hidden_dim, options.emb_dim, pure_draft_prefix_len=1),
    )
    return target, drafter


def flops(target: TargetConfig, config: DraftConfig, rows: int, length: int, count: int) -> dict[str, float]:
    """Floating-point operations of one step over `rows` sequences: 2 for each weight and token of a product.

    target    A forward pass: 2 · (weights of the layers) a token, and attention's two products over the T / 2
              positions that a query sees on average, 2 · 2 · N·H · T / 2 a token and layer.
    forward   The drafter's: its layers over A·M rows, fc and each layer's keys and values over the context, attention
              over T / 2 + M positions (anchors are anywhere), the GRU over A·J tokens, and over A·J proposals the LM
              head and the head's two projections.
    backward  One product for the input and one for the weight of each product of the forward pass, less the frozen LM
              head's weight and fc's input.
    """
    sizes, target_sizes = config.sizes, target.sizes
    tokens, block_rows, proposals = rows * length, rows * count * config.block_size, rows * count * config.num_proposals
    attention = 4 * config.num_attention_heads * config.head_dim * (length / 2 + config.block_size)

    def layer(config: DecoderConfig) -> int:
        letters = flatten(axes(config).layers[0])
        return sum(math.prod(config.sizes[x] for x in names.split()) for names in letters.values() if " " in names)

    target_attention = 4 * target.num_attention_heads * target.head_dim * length / 2
    of_target = target.num_hidden_layers * (2 * layer(target) + target_attention) * tokens
    keys_values = 2 * sizes["D"] * sizes["K"] * sizes["H"]
    fc = 2 * sizes["LD"] * sizes["D"] * tokens
    layers = config.num_hidden_layers * ((2 * layer(config) + attention) * block_rows + 2 * keys_values * tokens)
    lm_head = 2 * target_sizes["V"] * target_sizes["D"] * proposals
    head = 0
    if config.head:
        gru = (sizes["D"] + sizes["U"]) * sizes["GU"]
        head = 2 * (gru + sizes["DU"] * sizes["R"] + sizes["R"] * target_sizes["V"]) * proposals
    forward = fc + layers + head + lm_head
    return {"target": of_target, "forward": forward, "backward": fc + 2 * (layers + head) + lm_head}


def random_weights(config: DecoderConfig, dtype: Any, made: Any = None) -> Any:
    """A module of random weights, each made where it belongs: norms are ones, biases zeros, the rest is uniform."""
    leaves = {}
    for number, (path, letters) in enumerate(flatten(axes(config)).items()):
        shape = tuple(config.sizes[letter] for letter in letters.split())

        def make(key: Array, shape: Any = shape, path: str = path) -> Array:
            if len(shape) == 1 or is_bias(path):
                return jnp.full(shape, 0 if is_bias(path) else 1, dtype)
            return jax.random.uniform(key, shape, dtype, -0.02 * 3**0.5, 0.02 * 3**0.5)

        where = None if made is None else jax.sharding.NamedSharding(made, stored(letters, made))
        leaves[path] = jax.jit(make, out_shardings=where)(jax.random.key(number))
    return unflatten(config, leaves)


def measured_peak(dtype: Any) -> float:
    """TFLOP/s of a large product on one device."""
    size, turns = (512, 3) if jax.default_backend() == "cpu" else (8192, 20)
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
    pair = recipe.target, recipe.draft
    objective = Objective(**{name: getattr(recipe, name) for name in Objective._fields})
    rows = inputs.ids.shape[0] // recipe.accumulate
    given = jax.tree.map(lambda x: x[:rows], inputs)
    chosen, valid = jax.jit(lambda mask: anchors.draw(jax.random.key(0), mask, recipe.anchors))(given.mask)
    lam = jnp.float32(0.5)

    def drafter(weights: Any) -> Any:
        cast = {path: w if path in LOOPED else w.astype(recipe.dtype) for path, w in weights.items()}
        return unflatten(recipe.draft, cast)

    def states(frozen: Any, given: Inputs) -> Any:
        return target_states(frozen, *pair, given, objective)

    @jax.jit
    def target_only(weights: Any, frozen: Any, given: Inputs) -> Any:
        return states(frozen, given)

    @jax.jit
    def backbone(weights: Any, frozen: Any, given: Inputs) -> Any:
        features, hidden = states(frozen, given)
        x = draft.block_inputs(frozen.embed, recipe.draft, gather(given.ids, chosen[..., None])[..., 0])
        form = blocks.choose(objective.block_attention, recipe.draft, chosen.shape[1], recipe.dtype)
        return draft.training_blocks(drafter(weights), recipe.draft, x, chosen, features, form=form), hidden

    def loss(weights: Any, frozen: Any, given: Inputs) -> Any:
        total = denominator(objective, supervision(recipe.draft, given, chosen, valid))
        return part(drafter(weights), frozen, pair, objective, given, chosen, valid, lam, total)

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


def run(options: Bench) -> dict[str, Any]:
    """The figures, as one flat row.

    Raises:
        DominoError: the options don't fit together, or the devices don't.
    """
    target, config = configs(options)
    for field in fields(options):
        value = getattr(options, field.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
            raise DominoError(f"--{field.name.replace('_', '-')} can't be {value}.")
    dtype = settle(options.dtype)
    made = mesh.make(options.mesh, (target, config)) if options.mesh else None
    recipe = Recipe(
        target=target,
        draft=config,
        steps=1000,
        optimizer=options.optimizer,
        lr=6e-4,
        muon_lr=0.02,
        warmup=0.04,
        weight_decay=0.01,
        clip=1.0,
        gamma=7.0,
        anchors=options.anchors,
        lambda_base_start=1.0,
        lambda_base_decay_ratio=1.0,
        chunk=options.chunk,
        dtype=dtype.name,
        loss=options.loss,
        accumulate=options.accumulate,
        block_attention=options.block_attention,
        target_attention=options.target_attention,
        remat=options.remat,
    )
    if made is None:
        return _run(options, recipe, None)
    with jax.set_mesh(made):
        return _run(options, recipe, made)


def _run(options: Bench, recipe: Recipe, made: Any) -> dict[str, Any]:
    target, config, dtype = recipe.target, recipe.draft, jnp.dtype(recipe.dtype)
    frozen = random_weights(target, dtype, made)
    drafted = random_weights(config, jnp.float32, made)
    state = start(recipe, flatten(drafted), 0)
    del drafted
    inputs = _inputs(options, target, config, dtype, made)
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
    device, devices = jax.devices()[0], 1 if made is None else made.size
    peak, source = options.peak_tflops or PEAKS.get(device.device_kind), "stated"
    if peak is None:
        peak, source = measured_peak(dtype), "measured"
    counted = flops(target, config, options.batch, options.length, options.anchors)
    if options.captured:
        counted["target"] = 0.0
    drafter_flops = counted["forward"] + counted["backward"]
    stats = device.memory_stats() or {}
    return {
        **{key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()},
        "dtype": dtype.name,
        "weights": "random",
        "commit": _commit(),
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


def _inputs(options: Bench, target: TargetConfig, config: DraftConfig, dtype: Any, made: Any) -> Inputs:
    shape = options.batch, options.length

    def make() -> Inputs:
        ids = jax.random.randint(jax.random.key(0), shape, 0, target.vocab_size - 1, jnp.int32)
        features = hidden = None
        if options.captured:
            features = jax.random.normal(jax.random.key(1), (*shape, config.sizes["LD"]), dtype)
            hidden = jax.random.normal(jax.random.key(2), (*shape, target.hidden_size), dtype)
        return Inputs(ids, jnp.ones(shape, bool), None, features, hidden if options.loss == "kl" else None)

    return mesh.laid_rows(jax.jit(make)(), made)


def _commit() -> str | None:
    """The commit of the code that runs, with "+" where files differ from it; None where there is no repository."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def show(row: dict[str, Any]) -> str:
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


PHASES = ("target_ms", "drafter_ms", "loss_ms", "backward_ms", "optimizer_ms")


def main(argv: list[str] | None = None) -> int:
    options = tyro.cli(Bench, args=argv, prog="python -m train.bench")
    keep_programs()
    try:
        row = run(options)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    except (DominoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(show(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
