"""Parameters as modules that hold arrays and nothing else, with each weight's axes written once.

A module is built by a function from axis letters to a leaf: `axes(config)` builds the tree of the
letters themselves, `shapes` and `init` derive from that tree, and so do the checks of files. Matrices
are [in, out], which XLA multiplies fastest; the two vocabulary projections are [V, in], because
they are read by row as well.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from domino_jax.config import DecoderConfig, DraftConfig, TargetConfig

Leaf = Callable[[str], Any]  # axis letters, separated by spaces -> what to put there


class Quantized(NamedTuple):
    """An 8-bit matrix in the place of a weight: values times scale, one scale for each output (see `quantize`)."""

    values: Array  # int8 or float8, of the weight's shape
    scale: Array  # of the output axes' shape, in the weight's dtype


class Layer(nnx.Module):
    """One Qwen3 decoder layer; target and drafter share the form."""

    def __init__(self, leaf: Leaf):
        self.input_norm: Array = leaf("D")
        self.q: Array = leaf("D N H")
        self.k: Array = leaf("D K H")
        self.v: Array = leaf("D K H")
        self.q_norm: Array = leaf("H")
        self.k_norm: Array = leaf("H")
        self.o: Array = leaf("N H D")
        self.mlp_norm: Array = leaf("D")
        self.gate: Array = leaf("D F")
        self.up: Array = leaf("D F")
        self.down: Array = leaf("F D")


class FusedLayer(nnx.Module):
    """A Layer whose products of one input are one product each: K with V, gate with up (see `prepare.fuse`)."""

    def __init__(self, layer: Layer, kv: Any, gate_up: Any):
        """Args: kv: [D, 2, K, H]; gate_up: [D, 2, F]."""
        self.input_norm: Array = nnx.data(layer.input_norm)
        self.q: Array = nnx.data(layer.q)
        self.kv: Array = nnx.data(kv)
        self.q_norm: Array = nnx.data(layer.q_norm)
        self.k_norm: Array = nnx.data(layer.k_norm)
        self.o: Array = nnx.data(layer.o)
        self.mlp_norm: Array = nnx.data(layer.mlp_norm)
        self.gate_up: Array = nnx.data(gate_up)
        self.down: Array = nnx.data(layer.down)


class Target(nnx.Module):
    """Qwen3; `lm_head` is None where the embeddings are tied."""

    def __init__(self, config: TargetConfig, leaf: Leaf):
        self.embed: Array = leaf("V D")
        self.layers = nnx.List([Layer(leaf) for _ in range(config.num_hidden_layers)])
        self.norm: Array = leaf("D")
        self.lm_head: Array | None = nnx.data(None) if config.tie_word_embeddings else leaf("V D")


class Head(nnx.Module):
    """The causal head: a GRU over realised tokens and a low-rank correction of the logits."""

    def __init__(self, leaf: Leaf):
        self.gru_in: Array = leaf("D GU")
        self.gru_state: Array = leaf("U GU")
        self.proj_in: Array = leaf("DU R")
        self.proj_out: Array = leaf("V R")


class Draft(nnx.Module):
    """The block-parallel backbone, with its causal head or (plain DFlash) without."""

    def __init__(self, config: DraftConfig, leaf: Leaf):
        self.fc: Array = leaf("LD D")
        self.context_norm: Array = leaf("D")
        self.layers = nnx.List([Layer(leaf) for _ in range(config.num_hidden_layers)])
        self.norm: Array = leaf("D")
        self.head: Head | None = Head(leaf) if config.head else nnx.data(None)


def build(config: DecoderConfig, leaf: Leaf) -> Any:
    """The module of `config` (Target or Draft), every weight being `leaf(its axis letters)`."""

    def data(letters: str) -> Any:
        return nnx.data(leaf(letters))

    if isinstance(config, TargetConfig):
        return Target(config, data)
    return Draft(cast(DraftConfig, config), data)


def axes(config: DecoderConfig) -> Any:
    """The module of `config` with each weight's axis letters ("D N H") in its place."""
    return build(config, lambda letters: letters)


def shapes(config: DecoderConfig, dtype: Any = jnp.float32) -> Any:
    """The module of `config` with a jax.ShapeDtypeStruct for each weight."""
    sizes = config.sizes
    return build(config, lambda letters: jax.ShapeDtypeStruct(tuple(sizes[a] for a in letters.split()), dtype))


def init(config: DecoderConfig, key: Array, dtype: Any = jnp.float32, std: float = 0.02) -> Any:
    """Random weights: norms are ones, the rest is normal with standard deviation `std`."""
    leaves, tree = jax.tree.flatten(shapes(config, dtype))
    keys = jax.random.split(key, len(leaves))
    made = [
        jnp.ones(leaf.shape, dtype) if len(leaf.shape) == 1 else (std * jax.random.normal(k, leaf.shape)).astype(dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, made)


def flatten(module: Any) -> dict[str, Any]:
    """The module's leaves by dotted path, such as "layers.3.q"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(module)[0]
    }


def unflatten(config: DecoderConfig, leaves: dict[str, Any]) -> Any:
    """The module of `config` from its leaves by dotted path, the inverse of `flatten`."""
    form = axes(config)
    return jax.tree.unflatten(jax.tree.structure(form), [leaves[path] for path in flatten(form)])


def lm_head(target: Target) -> Array:
    """[V, D]: the output projection, the embedding itself where they are tied."""
    return target.embed if target.lm_head is None else target.lm_head
