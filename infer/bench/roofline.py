"""What a cycle must at least cost on this device: bytes to read, products to compute, and the rates of both.

Decoding at small batch is bound by reading weights (docs/algorithm.md, section 8). A phase's floor is the longer of two
times: its weights and live cache at the memory's measured bandwidth, and its operations at the measured rate of a large
product. Activations inside a phase are not counted; logits between phases are, since batches of them leave the chip's
caches.

Of a mixture of experts a pass reads those that its tokens choose, each once. Which ones depends on the text: counted is
the mean if every token chose its k of E at random, E · (1 - (1 - k/E)^tokens). Tokens that agree on theirs read fewer.
"""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from convert.loading import LoadedModel
from domino_jax.decode import DecodeConfig
from domino_jax.drafters.base import Counted, Product
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.heads import head_of
from domino_jax.drafters.tree import TreeDrafter
from domino_jax.matrix import dot, for_cpu
from domino_jax.runtime.devices import own_devices
from domino_jax.sharding import DATA, MODEL
from domino_jax.weights import Layer, Params, lm_head
from infer.bench.rows import LEAN

LOGIT_BYTES = 4  # logits are float32
CALLS, TRIES = 8, 5  # calls in a row, so that dispatching is not what is measured; the best try counts


class Work(NamedTuple):
    """What one phase needs, on one device."""

    bytes: float  # read from memory
    flops: float


class Machine(NamedTuple):
    """What one device gives."""

    bandwidth: float  # bytes/s
    flops: float  # operations/s of a large matrix product in the run's dtype

    def milliseconds(self, work: Work) -> float:
        """The floor of a phase's time."""
        return max(work.bytes / self.bandwidth, work.flops / self.flops) * 1e3


def probe_sizes() -> tuple[int, int]:
    """Bytes to read and the side of the square product: beyond every cache, and within seconds."""
    return (256 << 20, 1536) if own_devices()[0].platform == "cpu" else (2 << 30, 8192)


def measure_device(dtype: Any, narrow: bool = False) -> Machine:
    """Measure the first device: the best of several ways to go through memory, and one large product.

    Args:
        narrow: products are float32 ones with bfloat16 matrices (`matrix.CpuBfloat16`).
    """
    size, side = probe_sizes()
    width = 4096
    x = jnp.ones((size // (width * jnp.dtype(dtype).itemsize), width), dtype)
    vector, square = jnp.ones((width,), dtype), jnp.ones((side, side), dtype)
    ways = (
        (1, jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32)), (x,)),
        (1, jax.jit(jnp.dot), (x, vector)),  # as decoding reads its weights
        (2, jax.jit(lambda x: x + 1), (x,)),  # reads and writes
    )
    bandwidth = max(times * x.nbytes / _best(run, arguments) for times, run, arguments in ways)
    pair = square, for_cpu(square.astype(jnp.bfloat16)) if narrow else square
    return Machine(bandwidth, 2 * side**3 / _best(jax.jit(dot), pair))


def _best(run: Callable[..., Array], arguments: tuple[Any, ...]) -> float:
    """Seconds of a call, the least of several tries."""
    jax.block_until_ready(run(*arguments))
    tries = []
    for _ in range(TRIES):
        began = time.perf_counter()
        for _ in range(CALLS):
            last = run(*arguments)
        jax.block_until_ready(last)
        tries.append((time.perf_counter() - began) / CALLS)
    return min(tries)


def work(
    configs: DecodeConfig,
    params: Params,
    batch: int,
    context: int,
    mesh: tuple[int, int] = (1, 1),
    sampled: bool = False,
    chunk: int | None = None,
) -> dict[str, Work]:
    """What each phase of one cycle needs at least; the target alone (the baseline's step) without a drafter.

    Args:
        params: arrays, or jax.ShapeDtypeStructs of them.
        batch: B of all devices.
        context: live positions of each row.
        mesh: sizes of its axes data and model; what counts is one device's part.
        sampled: the drafter's distributions are read in verifying too.
        chunk: positions of a prompt's part that is run in place of a cycle, the last of `context`.
    """
    target, rows = configs.target, batch / mesh[0]
    itemsize = params.target.norm.dtype.itemsize  # the caches are of the dtype that is computed in
    proposals, tokens = configs.proposals, chunk or configs.proposals + 1
    output = lm_head(params.target)
    vocabulary = _shape(jax.tree.leaves(output)[0])[0]

    def attending(config: Any, queries: int, positions: int) -> Work:
        """All layers' attention of `queries` over `positions`, without its projections."""
        heads = config.num_attention_heads / mesh[1] * config.head_dim
        kv = config.num_key_value_heads / mesh[1] * config.head_dim
        layers = config.num_hidden_layers
        return Work(2 * kv * positions * rows * layers * itemsize, 4 * heads * queries * positions * rows * layers)

    def products(weights: Iterable[Any], queries: int) -> Work:
        """Every weight read once, and multiplied by `queries` vectors a row."""
        leaves = jax.tree.leaves(list(weights))
        flops = sum(2 * _size(x) * queries * rows for x in leaves if len(x.shape) > 1)
        return Work(sum(_size(x) * x.dtype.itemsize for x in leaves), flops)

    def expert_products(weights: Iterable[Any], queries: int) -> Work:
        """Those experts read that somebody chose, and each multiplied by the vectors that chose it."""
        if target.moe is None:
            return Work(0, 0)
        chosen = target.moe.num_experts_per_tok / target.moe.num_experts
        whole = products(weights, queries)
        return Work(whole.bytes * (1 - (1 - chosen) ** (queries * rows)), whole.flops * chosen)

    logits = rows * vocabulary
    experts, others = _parted(params.target.layers)
    phases = {
        "target": _sum(
            products([*others, params.target.norm, *([] if chunk else [output])], tokens),
            expert_products(experts, tokens),
            attending(target, tokens, context if chunk else context + tokens),
        )
    }
    observed = Work(0, 0)
    if isinstance(configs.drafter, BlockDrafter):
        draft = params.draft
        observed = products(
            [draft.fc, draft.context_norm, *(layer.kv for layer in draft.layers)], chunk or configs.depth + 1
        )
    if chunk:
        return phases | {"context": observed}

    def multiplied(parts: Iterable[Product]) -> Work:
        """What a drafter or a head says that it multiplies."""
        each = [(part.turns * part.share, products(part.matrices, part.vectors)) for part in parts]
        return _sum(Work(0, 0), *[Work(*(times * x for x in once)) for times, once in each])

    if isinstance(configs.drafter, Counted):
        phases["draft"] = multiplied(configs.drafter.products(params.draft, proposals))
    if not isinstance(configs.drafter, BlockDrafter):
        return phases
    config, drafter = configs.drafter.config, params.draft
    block = config.block_size
    phases["draft"] = _sum(
        products([*_parted(drafter.layers)[1], drafter.norm], block),
        products([next(x for x in (drafter.lm_head, params.output, output) if x is not None)], configs.depth),
        attending(config, block, context + block),
    )
    base = configs.depth * logits
    scored = min(1.0, (configs.drafter.candidates or math.inf) / vocabulary)
    parts = head_of(config).products(drafter.head, configs.depth, scored)
    if isinstance(configs.drafter, TreeDrafter) and configs.branching and configs.drafter.correction == "path":
        lanes = configs.drafter.lanes or configs.drafter.nodes
        parts = [part._replace(vectors=part.vectors * lanes) for part in parts]
    head = multiplied(parts)
    phases["head"] = _sum(Work(base * LOGIT_BYTES, base), head)
    read = tokens * logits * (2 if sampled else 1)
    phases["verify"] = Work(read * LOGIT_BYTES, read)
    return phases | {"context": observed}


def _parted(layers: Iterable[Layer]) -> tuple[list[Any], list[Any]]:
    """The weights of the layers' experts, and all the others."""
    experts = [leaf for x in layers if x.router is not None for leaf in jax.tree.leaves((x.gate_up, x.down))]
    known = set(map(id, experts))
    return experts, [leaf for layer in layers for leaf in jax.tree.leaves(layer) if id(leaf) not in known]


def _shape(x: Any) -> tuple[int, ...]:
    """Of one device's part."""
    sharding = getattr(x, "sharding", None)
    return sharding.shard_shape(x.shape) if sharding else x.shape


def _size(x: Any) -> int:
    size = 1
    for length in _shape(x):
        size *= length
    return size


def _sum(*parts: Work) -> Work:
    return Work(*map(sum, zip(*parts, strict=True)))


def fields(
    loaded: LoadedModel, batch: int, context: int, sampled: bool, machine: Machine, row: dict[str, Any]
) -> dict[str, float]:
    """Flat fields for a row: each phase's GB, GFLOP, floor in ms and share of it reached; the same of its cycle.

    Args:
        row: has the measured `<phase>_ms` and `ms_per_cycle`.
    """
    mesh = (loaded.mesh.shape[DATA], loaded.mesh.shape[MODEL]) if loaded.mesh else (1, 1)
    found, whole = {}, 0.0
    for name, needed in work(loaded.configs, loaded.params, batch, context, mesh, sampled).items():
        floor = machine.milliseconds(needed)
        found |= {f"{name}_gb": needed.bytes / 1e9, f"{name}_gflop": needed.flops / 1e9}
        found |= {f"{name}_floor_ms": floor, f"{name}_floor_share": floor / row[f"{name}_ms"]}
        whole += floor
    return found | {"cycle_floor_ms": whole, "cycle_floor_share": whole / row["ms_per_cycle"]}


def over_lean(rows: list[dict[str, Any]]) -> None:
    """Add the floor of `cycle_over_step` to the rows of one batch and context; the baseline's step is the 1 of it."""
    lean = next(row for row in rows if row["mode"] == LEAN)["cycle_floor_ms"]
    for row in rows:
        if "cycle_floor_ms" in row:
            row["cycle_over_step_floor"] = row["cycle_floor_ms"] / lean
