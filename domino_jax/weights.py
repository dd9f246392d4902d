"""Parameters as modules that hold arrays and nothing else, with each weight's axes written once.

A module is built by a function from axis letters to a leaf: `axes(config)` builds the tree of the
letters themselves, `weight_shapes` and `init_weights` derive from that tree, and so do the checks of files. Matrices
are [in, out] (a float32 run on a CPU turns them, see OutputsFirst); the two vocabulary projections are
[V, in], because they are read by row as well.
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


class OutputsFirst(NamedTuple):
    """A matrix of a float32 run in the order that CPUs multiply fastest (see `prepare.outputs_first`).

    Float32, or bfloat16 as it is stored: half the memory, the same precision (`layers.exact_product`).
    """

    values: Array  # the weight's output axes, then those that a product sums over


class Layer(nnx.Module):
    """One Qwen3 decoder layer; target and drafter share the form.

    The biases are None where the config has no `attention_bias`, the router where the layer has one MLP. Where it has
    experts, `gate`, `up` and `down` hold all of theirs.
    """

    def __init__(self, leaf: Leaf, bias: bool = False, experts: bool = False):
        none = nnx.data(None)
        self.input_norm: Array = leaf("D")
        self.q: Array = leaf("D N H")
        self.k: Array = leaf("D K H")
        self.v: Array = leaf("D K H")
        self.q_bias: Array | None = leaf("N H") if bias else none
        self.k_bias: Array | None = leaf("K H") if bias else none
        self.v_bias: Array | None = leaf("K H") if bias else none
        self.q_norm: Array = leaf("H")
        self.k_norm: Array = leaf("H")
        self.o: Array = leaf("N H D")
        self.o_bias: Array | None = leaf("D") if bias else none
        self.mlp_norm: Array = leaf("D")
        self.router: Array | None = leaf("D RE") if experts else none
        self.gate: Array = leaf("E D I" if experts else "D F")
        self.up: Array = leaf("E D I" if experts else "D F")
        self.down: Array = leaf("E I D" if experts else "F D")


class FusedLayer(nnx.Module):
    """A Layer whose products of one input are one product each: K with V, gate with up (see `prepare.fuse`).

    Experts stay as they are: there `gate_up` is None, elsewhere `gate` and `up` are.
    """

    def __init__(self, layer: Layer, kv: Any, kv_bias: Any, gate_up: Any):
        """Args: kv: [D, 2, K, H]; kv_bias: [2, K, H] or None; gate_up: [D, 2, F] or None."""
        self.input_norm: Array = nnx.data(layer.input_norm)
        self.q: Array = nnx.data(layer.q)
        self.q_bias: Array | None = nnx.data(layer.q_bias)
        self.kv: Array = nnx.data(kv)
        self.kv_bias: Array | None = nnx.data(kv_bias)
        self.q_norm: Array = nnx.data(layer.q_norm)
        self.k_norm: Array = nnx.data(layer.k_norm)
        self.o: Array = nnx.data(layer.o)
        self.o_bias: Array | None = nnx.data(layer.o_bias)
        self.mlp_norm: Array = nnx.data(layer.mlp_norm)
        self.router: Array | None = nnx.data(layer.router)
        self.gate_up: Array | None = nnx.data(gate_up)
        self.gate: Array | None = nnx.data(layer.gate if gate_up is None else None)
        self.up: Array | None = nnx.data(layer.up if gate_up is None else None)
        self.down: Array = nnx.data(layer.down)


class Target(nnx.Module):
    """Qwen3; `lm_head` is None where the embeddings are tied."""

    def __init__(self, config: TargetConfig, leaf: Leaf):
        self.embed: Array = leaf("V D")
        self.layers = nnx.List(
            [Layer(leaf, config.attention_bias, config.is_sparse(i)) for i in range(config.num_hidden_layers)]
        )
        self.norm: Array = leaf("D")
        self.lm_head: Array | None = nnx.data(None) if config.tie_word_embeddings else leaf("V D")


class Head(nnx.Module):
    """The causal head: a GRU over realised tokens and a low-rank correction of the logits."""

    def __init__(self, leaf: Leaf):
        self.gru_in: Array = leaf("D GU")
        self.gru_state: Array = leaf("U GU")
        self.proj_in: Array = leaf("DU R")
        self.proj_out: Array = leaf("V R")


class FusedHead(nnx.Module):
    """A Head as decoding takes it: one product with a GRU state instead of two (see `prepare.fuse_head`).

    Where the vocabulary is small, `gates` holds what each token gives the GRU's gates, and `gru_in` is None.
    """

    def __init__(self, head: Head, state: Array, block: Array, gates: Array | None):
        """Args: state: [U, GU + R], for the gates and the projection; block: [D, R]; gates: [V, GU] or None."""
        self.gates: Array | None = nnx.data(gates)
        self.gru_in: Array | None = nnx.data(head.gru_in if gates is None else None)
        self.state: Array = nnx.data(state)
        self.block: Array = nnx.data(block)
        self.proj_out: Array = nnx.data(head.proj_out)


class Draft(nnx.Module):
    """The block-parallel backbone, with its causal head or (plain DFlash) without."""

    def __init__(self, config: DraftConfig, leaf: Leaf):
        self.fc: Array = leaf("LD D")
        self.context_norm: Array = leaf("D")
        self.layers = nnx.List([Layer(leaf, config.attention_bias) for _ in range(config.num_hidden_layers)])
        self.norm: Array = leaf("D")
        self.head: Head | None = Head(leaf) if config.head else nnx.data(None)


def build_module(config: DecoderConfig, leaf: Leaf) -> Any:
    """The module of `config` (Target or Draft), every weight being `leaf(its axis letters)`."""

    def data(letters: str) -> Any:
        return nnx.data(leaf(letters))

    if isinstance(config, TargetConfig):
        return Target(config, data)
    return Draft(cast(DraftConfig, config), data)


def axes(config: DecoderConfig) -> Any:
    """The module of `config` with each weight's axis letters ("D N H") in its place."""
    return build_module(config, lambda letters: letters)


def weight_shapes(config: DecoderConfig, dtype: Any = jnp.float32) -> Any:
    """The module of `config` with a jax.ShapeDtypeStruct for each weight."""
    sizes = config.sizes
    return build_module(config, lambda letters: jax.ShapeDtypeStruct(tuple(sizes[a] for a in letters.split()), dtype))


def init_weights(config: DecoderConfig, key: Array, dtype: Any = jnp.float32, std: float = 0.02) -> Any:
    """Random weights: norms are ones and biases zeros, the rest is normal with standard deviation `std`."""
    leaves = flatten(weight_shapes(config, dtype))
    keys = jax.random.split(key, len(leaves))

    def make(path: str, shape: tuple[int, ...], key: Array) -> Array:
        if is_bias(path):
            return jnp.zeros(shape, dtype)
        return jnp.ones(shape, dtype) if len(shape) == 1 else (std * jax.random.normal(key, shape)).astype(dtype)

    return unflatten(config, {path: make(path, leaves[path].shape, k) for path, k in zip(leaves, keys, strict=True)})


def is_bias(path: str) -> bool:
    """Whether the weight at that dotted path is added, and not multiplied by."""
    return path.endswith("_bias")


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


def lm_head(target: Target) -> Array | OutputsFirst:
    """[V, D]: the output projection, the embedding itself where they are tied."""
    return target.embed if target.lm_head is None else target.lm_head
