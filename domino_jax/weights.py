"""Parameters as modules that hold arrays and nothing else, with each weight's axes written once.

A module is built by a function from axis letters to a leaf: `axes(config)` builds the tree of the
letters themselves, `weight_shapes` and `init_weights` derive from that tree, and so do the checks of files. Matrices
are [out..., in], as in Hugging Face's files. They are plain arrays, or made another form of `domino_jax.matrix` for
decoding.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from domino_jax.config import CustomDraftConfig, DecoderConfig, DraftConfig, TargetConfig
from domino_jax.matrix import AnyMatrix

Leaf = Callable[[str], Any]  # axis letters, separated by spaces -> what to put there
# A row of the table between a file's tensors and ours (`convert.names`): our path, the axes of the file's, its names.
TensorRow = tuple[str, str, tuple[str, ...]]


class Attention(nnx.Module):
    """The projections of a layer's attention, and its norms of queries and keys.

    K lies with V in one matrix: both are products of the same input. What the config does not have is None.

    Args:
        bias: of q, k, v and o, of "qkv" alone, or none.
    """

    def __init__(self, leaf: Leaf, bias: bool | Literal["qkv"] = False, qk_norm: bool = True):
        none = nnx.data(None)
        self.q: Array = leaf("N H D")
        self.kv: Array = leaf("2 K H D")
        self.q_bias: Array | None = leaf("N H") if bias else none
        self.kv_bias: Array | None = leaf("2 K H") if bias else none
        self.q_norm: Array | None = leaf("H") if qk_norm else none
        self.k_norm: Array | None = leaf("H") if qk_norm else none
        self.o: Array = leaf("D NH")
        self.o_bias: Array | None = leaf("D") if bias is True else none


class Layer(Attention):
    """One decoder layer; target and drafter share the form.

    Gate lies with up in one matrix, as K does with V. The router is None where the layer has one MLP. Where it has
    experts, `gate_up` and `down` hold all of theirs.
    """

    def __init__(self, leaf: Leaf, bias: bool | Literal["qkv"] = False, experts: bool = False, qk_norm: bool = True):
        super().__init__(leaf, bias, qk_norm)
        self.input_norm: Array = leaf("D")
        self.mlp_norm: Array = leaf("D")
        self.router: Array | None = leaf("RE D") if experts else nnx.data(None)
        self.gate_up: Array = leaf("E 2 I D" if experts else "2 F D")
        self.down: Array = leaf("E D I" if experts else "D F")


JOINED = {"qk": ("q", "kv"), "v": ("kv",), "qk_norm": ("q_norm", "k_norm")}  # of a JoinedLayer, and whose values


class JoinedLayer(Layer):
    """A layer in which each KV head's queries and its key are one matrix: one product, norm and rotation for both.

    Args:
        layer: one with norms of queries and keys, and without biases.
        qk: [K, G + 1, H, D], the key behind the queries.
        v: [K, H, D].
        qk_norm: [K, G + 1, H].
    """

    def __init__(self, layer: Layer, qk: AnyMatrix, v: AnyMatrix, qk_norm: Array):
        none = nnx.data(None)
        self.q = self.kv = self.q_norm = self.k_norm = self.q_bias = self.kv_bias = none  # type: ignore[assignment]
        self.qk, self.v, self.qk_norm = nnx.data(qk), nnx.data(v), nnx.data(qk_norm)
        for name in ("input_norm", "o", "o_bias", "mlp_norm", "router", "gate_up", "down"):
            setattr(self, name, nnx.data(getattr(layer, name)))


class Target(nnx.Module):
    """A target; `lm_head` is None where the embeddings are tied."""

    def __init__(self, config: TargetConfig, leaf: Leaf):
        self.embed: Array = leaf("V D")
        bias = "qkv" if config.qkv_bias else config.attention_bias
        self.layers = nnx.List(
            [Layer(leaf, bias, config.is_sparse(i), config.qk_norm) for i in range(config.num_hidden_layers)]
        )
        self.norm: Array = leaf("D")
        self.lm_head: Array | None = nnx.data(None) if config.tie_word_embeddings else leaf("V D")


class Draft(nnx.Module):
    """The block-parallel backbone, and the weights of its head; None without (plain DFlash).

    With a reduced vocabulary it has an LM head of its own, and says what target's token each draft's is: its number and
    `d2t` of it, added (the name is speculators').
    """

    def __init__(self, config: DraftConfig, leaf: Leaf):
        self.fc: Array = leaf("D LD")
        self.context_norm: Array = leaf("D")
        layer = config.convolution.layer if config.convolution else Layer
        self.layers = nnx.List([layer(leaf, config.attention_bias) for _ in range(config.num_hidden_layers)])
        self.norm: Array = leaf("D")
        reduced = config.draft_vocab_size is not None
        self.lm_head: Array | None = leaf("DV D") if reduced else nnx.data(None)
        self.d2t: Array | None = leaf("DT") if reduced else nnx.data(None)
        self.head: Any = config.head.weights(leaf) if config.head else nnx.data(None)


def build_module(config: DecoderConfig, leaf: Leaf) -> Any:
    """The module of `config` (Target, Draft, or a drafter's own), every weight being `leaf(its axis letters)`."""

    def data(letters: str) -> Any:
        return nnx.data(leaf(letters))

    if isinstance(config, TargetConfig):
        return Target(config, data)
    if isinstance(config, CustomDraftConfig):
        return config.weights(data)
    return Draft(cast(DraftConfig, config), data)


def axes(config: DecoderConfig) -> Any:
    """The module of `config` with each weight's axis letters ("D N H") in its place."""
    return build_module(config, lambda letters: letters)


def weight_shapes(config: DecoderConfig, dtype: Any = jnp.float32) -> Any:
    """The module of `config` with a jax.ShapeDtypeStruct for each weight."""
    sizes = config.sizes

    def leaf(letters: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(sizes[a] for a in letters.split()), jnp.int32 if letters == "DT" else dtype)

    return build_module(config, leaf)


def init_weights(config: DecoderConfig, key: Array, dtype: Any = jnp.float32, std: float = 0.02) -> Any:
    """Random weights: norms are ones and biases zeros, the rest is normal with standard deviation `std`."""
    leaves = flatten(weight_shapes(config, dtype))
    keys = jax.random.split(key, len(leaves))

    def make(path: str, shape: tuple[int, ...], key: Array) -> Array:
        if is_bias(path) or is_table(path):  # the table's are the first tokens
            return jnp.zeros(shape, leaves[path].dtype if is_table(path) else dtype)
        return jnp.ones(shape, dtype) if len(shape) == 1 else (std * jax.random.normal(key, shape)).astype(dtype)

    return unflatten(config, {path: make(path, leaves[path].shape, k) for path, k in zip(leaves, keys, strict=True)})


def is_bias(path: str) -> bool:
    """Whether the weight at that dotted path is added, and not multiplied by."""
    return path.endswith("_bias")


def is_table(path: str) -> bool:
    """Whether the weight at that dotted path, or of that name in a file, holds numbers of tokens: integers."""
    return path == "d2t"


def in_dtype(path: str, weight: Any, dtype: Any) -> Any:
    """The weight at that dotted path in another dtype; as it is where it holds integers, or `dtype` is None."""
    return weight if dtype is None or is_table(path) else weight.astype(dtype)


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


class Params(NamedTuple):
    """The weights of a target and its drafter."""

    target: Target
    draft: Any = None  # the drafter's, such as a Draft; None without a drafter, or for one without weights
    output: AnyMatrix | None = None  # an 8-bit copy of the LM head, for drafting alone

    @property
    def without_drafter(self) -> "Params":
        """The target's alone."""
        return Params(self.target)


def is_matrix(path: str, letters: str) -> bool:
    """Whether the weight at that path, of those axis letters, is multiplied by, and no norm, bias or filter."""
    return len(letters.split()) > 1 and not is_bias(path) and "CT" not in letters.split()


def lm_head(target: Target) -> AnyMatrix:
    """[V, D]: the output projection, the embedding itself where they are tied."""
    return target.embed if target.lm_head is None else target.lm_head
