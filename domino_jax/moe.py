"""The mixture-of-experts MLP of a Qwen3 MoE layer (docs/algorithm.md, section 2).

A router gives each token k of E experts, each a SwiGLU MLP of its own, and sums their outputs by its weights. Two
backends compute the same:

    grouped     The T·k pairs of token and expert sorted by expert, and `matrix.dot_grouped` over the groups. On a TPU
                it is a kernel that computes those pairs and no others. On CPUs and CUDA devices JAX 0.10 lowers it to
                a masked product of every row with every expert, at any number of tokens.
    one by one  A loop over those experts that any token has chosen, each over all T tokens: it reads no weight that
                nobody asked for, and holds nothing but the sum. Each turn of the loop is a few operations.

On a CPU one by one was several times faster from 1 to 68 tokens, and faster than a gather of each pair's weights.
Accelerators take the grouped backend: each turn of a loop costs them a round trip to the host. No MoE has run on an
accelerator yet.

On a mesh each device has its own experts and whole tokens, and computes its experts' outputs; a sum over `model`
combines them.
"""

import dataclasses
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import Array

from domino_jax.config import MoeBackend, MoeConfig, TargetConfig
from domino_jax.matrix import AnyMatrix, dot, dot_each, dot_grouped, select
from domino_jax.sharding import MODEL, spec


def resolve_moe_backend(config: TargetConfig, platform: str, differentiated: bool = False) -> TargetConfig:
    """The config with the experts' backend for a platform; as it is for a model without experts.

    Args:
        platform: that programs are compiled for ("cpu", "gpu", "tpu").
        differentiated: gradients go through the experts; a loop of as many turns as tokens ask for has none.
    """
    if config.moe is None:
        return config
    backend: MoeBackend = "one by one" if platform == "cpu" and not differentiated else "grouped"
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, backend=backend))


def route(router: AnyMatrix, config: MoeConfig, y: Array) -> tuple[Array, Array]:
    """Each token's experts and their weights: y [..., D] -> two [..., k], the weights of y's dtype.

    A softmax in float32 over all experts, of which the k likeliest count; with `norm_topk_prob` they sum to one.
    """
    likelihood = jax.nn.softmax(dot(y, router).astype(jnp.float32), axis=-1)
    weights, chosen = jax.lax.top_k(likelihood, config.num_experts_per_tok)
    if config.norm_topk_prob:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights.astype(y.dtype), chosen


def mlp(layer: Any, config: MoeConfig, y: Array) -> Array:
    """The layer's MLP over y [B, T, D]: the weighted sum of the outputs of each token's experts, [B, T, D].

    Args:
        layer: a Layer with a router.
    """
    assert config.backend in get_args(MoeBackend)
    run = _one_by_one if config.backend == "one by one" else _grouped
    weights = layer.router, layer.gate_up, layer.down
    if jax.sharding.get_abstract_mesh().empty:
        return run(y, *route(layer.router, config, y), *weights[1:]).astype(y.dtype)

    def part(y: Array, router: Array, *experts: AnyMatrix) -> Array:
        # Each device routes for itself: the compiler would gather what it can't divide, and it can't divide a top-k.
        shares, chosen = route(router, config, y)
        first = jax.lax.axis_index(MODEL) * experts[0].shape[0]
        return jax.lax.psum(run(y, shares, chosen - first, *experts).astype(y.dtype), MODEL)

    rows = spec("B T D")
    # No check of what varies over which axis: the sum of a loop begins with zeros, which vary over none.
    spread = jax.shard_map(
        part,
        in_specs=(rows, spec("RE D"), spec("E"), spec("E")),  # of each array of an expert's, scales too
        out_specs=rows,
        check_vma=False,
    )
    return spread(y, *weights)


def _grouped(y: Array, weights: Array, chosen: Array, gate_up: AnyMatrix, down: AnyMatrix) -> Array:
    """The experts that are here, by grouped products.

    Args:
        y: [B, T, D].
        weights, chosen: [B, T, k]; experts below 0 and from E on are elsewhere.
        gate_up: [E, 2, I, D]; down: [E, D, I].

    Returns:
        [B, T, D] float32.
    """
    count, each = gate_up.shape[0], chosen.shape[-1]
    tokens, experts = y.reshape(-1, y.shape[-1]), chosen.reshape(-1)
    here = (experts >= 0) & (experts < count)
    experts = jnp.where(here, experts, count)  # behind all groups, where no product reaches them
    order = jnp.argsort(experts)
    sizes = jnp.bincount(experts, length=count).astype(jnp.int32)
    rows = tokens[order // each]
    gate, up = jnp.moveaxis(dot_grouped(rows, gate_up, sizes), 1, 0)
    said = dot_grouped(jax.nn.silu(gate) * up, down, sizes)[jnp.argsort(order)].astype(jnp.float32)
    said = jnp.where(here[:, None], said * weights.reshape(-1, 1).astype(jnp.float32), 0.0)
    return jnp.sum(said.reshape(*chosen.shape, -1), axis=-2)


def _one_by_one(y: Array, weights: Array, chosen: Array, gate_up: AnyMatrix, down: AnyMatrix) -> Array:
    """`_grouped`, one expert after another."""
    count = gate_up.shape[0]
    tokens = y.reshape(-1, y.shape[-1])
    # [T, E]: the weight of each expert in each token, 0 where it was not chosen.
    pairs = chosen.reshape(tokens.shape[0], -1)[..., None] == jnp.arange(count, dtype=chosen.dtype)
    share = jnp.sum(jnp.where(pairs, weights.reshape(*pairs.shape[:2], 1).astype(jnp.float32), 0.0), axis=1)
    used = jnp.any(pairs, axis=(0, 1))
    (which,) = jnp.nonzero(used, size=count)

    def add(turn: Array, total: Array) -> Array:
        e = which[turn]
        gate, up = dot_each(tokens, select(gate_up, e))
        said = dot(jax.nn.silu(gate) * up, select(down, e))
        # Chosen, and not times zero: an expert may say infinity to a token that never asked it.
        mine = jnp.any(pairs[:, :, e], axis=1)[:, None]
        return total + jnp.where(mine, said.astype(jnp.float32) * share[:, e, None], 0.0)

    total = jax.lax.fori_loop(0, jnp.sum(used, dtype=jnp.int32), add, jnp.zeros(tokens.shape, jnp.float32))
    return total.reshape(y.shape)
