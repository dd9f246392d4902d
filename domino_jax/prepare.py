"""Weights made ready for decoding: in the form that a CPU or TPU multiplies fastest, and in 8 bits where asked.

A target in 8 bits is another model, near the one of the files. Nothing else here changes the output: the products are
the same sums, up to float32's rounding, and an 8-bit drafter only proposes other tokens (docs/algorithm.md, section 8).
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from domino_jax import matrix
from domino_jax.config import DecoderConfig, DraftConfig, TargetConfig
from domino_jax.drafters.dual_view import DualViewConfig
from domino_jax.drafters.heads import head_of
from domino_jax.drafters.heads.base import under
from domino_jax.matrix import AnyMatrix, ForTpu, Scaled, Separate, Tabulated, select
from domino_jax.sharding import constrain, constrain_stored
from domino_jax.weights import (
    JoinedLayer,
    Layer,
    Params,
    Target,
    axes,
    flatten,
    in_dtype,
    is_matrix,
    lm_head,
    unflatten,
)

LARGEST_TABLE = 32 << 20  # bytes


def prepare_for_cpu(module: Any, config: DecoderConfig) -> None:
    """Make a Target or Draft ready for a float32 run on a CPU: its matrices take the form of `matrix.for_cpu`.

    Matrices in bfloat16 stay so, all else becomes float32. Products are float32's either way. Processors that multiply
    bfloat16 matrices (Intel's AMX) have them sooner, from half the memory; elsewhere they are slow. Experts, their
    router and the head become plain float32 arrays: experts are selected one by one, and the head's products are
    too small to gain.

    One weight at most is held twice.
    """
    for path, letters in flatten(axes(config)).items():
        *parents, name = path.split(".")
        owner = module
        for parent in parents:
            owner = owner[int(parent)] if parent.isdigit() else getattr(owner, parent)
        weight = getattr(owner, name)
        plain = not is_matrix(path, letters) or "E" in letters.split() or name == "router" or "head" in parents
        if plain:
            prepared = in_dtype(path, weight, "float32")
        elif letters.startswith("2 "):
            prepared = Separate(tuple(map(matrix.for_cpu, _unstacked(weight, letters.removeprefix("2 ")))))
        else:
            prepared = matrix.for_cpu(weight)
        setattr(owner, name, nnx.data(jax.block_until_ready(prepared)))


def quantized_for_cpu(params: Params) -> Params:
    """The params with their 8-bit matrices in the form of `matrix.for_cpu`; nothing is copied."""

    def form(leaf: Any) -> Any:
        return matrix.for_cpu(leaf) if isinstance(leaf, Scaled) else leaf

    return jax.tree.map(form, params, is_leaf=lambda leaf: isinstance(leaf, matrix.Matrix))


def prepare_for_tpu(
    params: Params,
    target: DecoderConfig,
    draft: DecoderConfig | None,
    groups: int = 1,
    call: Callable[..., Any] = lambda run, *given: run(*given),
) -> Params:
    """The params as a TPU runs them fastest: matrices as `matrix.ForTpu`, and a target's layers as `JoinedLayer`.

    Experts and their router stay plain arrays, and so does what is a table. Layers stay as they are where heads have
    biases or no norms. A target's gate and up are held one by one: there is sooner room to read a half ahead.

    The layers of `params.target` itself are replaced, and one at most is held twice.

    Args:
        groups: of devices that have rows of their own: the mesh's `data`.
        call: runs a function of arrays; of arrays that are only described, another one says what it would give.
    """

    def wrapped(module: Any, config: DecoderConfig) -> Any:
        letters = flatten(axes(config))
        plain = {path for path, names in letters.items() if not is_matrix(path, names) or "E" in names.split()}
        plain |= {path for path in letters if path.rpartition(".")[2] == "router"}

        def one(path: Any, leaf: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            if name in plain or name.endswith("qk_norm") or isinstance(leaf, Tabulated):
                return leaf
            if isinstance(leaf, Separate):
                return Separate(tuple(ForTpu(part, groups) for part in leaf.parts))
            return ForTpu(leaf, groups)

        if isinstance(module, Target):
            for number, layer in enumerate(module.layers):
                module.layers[number] = _layer_for_tpu(layer, call)
        return jax.tree_util.tree_map_with_path(one, module, is_leaf=lambda leaf: isinstance(leaf, matrix.Matrix))

    output = None if params.output is None else ForTpu(params.output, groups)
    drafter = params.draft if draft is None else wrapped(params.draft, draft)
    return Params(wrapped(params.target, target), drafter, output)


def _layer_for_tpu(layer: Layer, call: Callable[..., Any]) -> Layer:
    """A target's layer with other matrices, see `prepare_for_tpu`."""
    if layer.q_norm is not None and layer.q_bias is None:
        layer = JoinedLayer(layer, *call(_joined_heads, layer.q, layer.kv, layer.q_norm, layer.k_norm))
    if layer.router is None:
        layer.gate_up = nnx.data(Separate(call(_halves, layer.gate_up)))  # type: ignore[assignment]
    return jax.block_until_ready(layer)


@jax.jit
def _joined_heads(q: AnyMatrix, kv: AnyMatrix, q_norm: Array, k_norm: Array) -> tuple[AnyMatrix, AnyMatrix, Array]:
    """What `JoinedLayer` takes, of a layer's weights."""
    heads, width = kv.shape[1], kv.shape[2]
    norms = jnp.broadcast_to(q_norm, (heads, q.shape[0] // heads, width)), jnp.broadcast_to(k_norm, (heads, 1, width))
    norm = jnp.concatenate(norms, axis=1)

    def joined(q: Array, kv: Array) -> Array:
        return jnp.concatenate([q.reshape(heads, -1, *q.shape[1:]), kv[0][:, None]], axis=1)

    qk = jax.tree.map(joined, q, kv)  # of the values, and of the scales
    return constrain_stored(qk, "K - H D"), constrain_stored(select(kv, 1), "K H D"), constrain(norm, "K - H")


def _halves(gate_up: AnyMatrix) -> tuple[AnyMatrix, ...]:
    return _unstacked(gate_up, "F D")


@partial(jax.jit, static_argnums=1)
def _unstacked(weight: AnyMatrix, letters: str) -> tuple[AnyMatrix, ...]:
    """The matrices of a stack, each laid out by its axis letters."""
    return tuple(constrain_stored(select(weight, index), letters) for index in range(weight.shape[0]))


def tabulate_head(params: Params, config: DecoderConfig | None, largest: int = LARGEST_TABLE) -> None:
    """Let the drafter's head look up what a token gives it, where the vocabulary is small; see `Head.tabulate`.

    Args:
        config: the drafter's.
        largest: bytes that the table may take. At a vocabulary of 151,936 it would be a gigabyte.
    """
    if isinstance(config, DraftConfig | DualViewConfig):
        head_of(config).tabulate(params.draft.head, params.target.embed, largest)


def target_form(
    config: TargetConfig, kind: str, call: Callable[..., Any] = lambda run, *given: run(*given)
) -> Callable[[str, Array], AnyMatrix] | None:
    """What becomes of each weight of a target in 8 bits, by its path: matrices are `matrix.Scaled`, all else stays.

    None where all of them stay, which is "exact".

    In 8 bits are the layers' matrices, those of experts too, and the LM head. A router stays, for it is small and
    chooses; embeddings stay where they are a table of their own, of which a step reads a few rows. Tied to the LM head
    they are in its 8 bits.

    Args:
        kind: one of `runtime.weight_forms.FORMS`.
        call: see `prepare_for_tpu`.
    """
    if kind == "exact":
        return None
    letters = flatten(axes(config))
    stay = {path for path, names in letters.items() if not is_matrix(path, names) or path.endswith(".router")}
    stay |= set() if config.tie_word_embeddings else {"embed"}

    def form(path: str, weight: Array) -> AnyMatrix:
        return weight if path in stay else call(_quantizer(letters[path], kind), weight)

    return form


def quantize_target(
    target: Target, config: TargetConfig, kind: str, call: Callable[..., Any] = lambda run, *given: run(*given)
) -> Target:
    """The target with its matrices in 8 bits; see `target_form`, which loading gives them one by one."""
    form = target_form(config, kind, call)
    if form is None:
        return target
    return unflatten(config, {path: form(path, weight) for path, weight in flatten(target).items()})


def quantize_drafter(
    params: Params, config: DraftConfig, kind: str, call: Callable[..., Any] = lambda run, *given: run(*given)
) -> Params:
    """The params with the drafter's matrices in 8 bits, and an 8-bit copy of the LM head for drafting.

    Where the target's own LM head is in 8 bits it serves for drafting too, and a drafter's own is among its matrices.

    Args:
        kind: one of `matrix.QUANTIZED`.
        call: see `prepare_for_tpu`.
    """
    assert params.draft is not None, "there is no drafter to quantize"
    letters = flatten(axes(config))
    leaves, form = jax.tree.flatten(params.draft)
    named = zip(flatten(params.draft), leaves, strict=True)
    whole = under("head", head_of(config).unquantized)

    def stays(path: str) -> bool:
        return path in whole or not is_matrix(path, letters[path])

    done = [leaf if stays(path) else call(_quantizer(letters[path], kind), leaf) for path, leaf in named]
    output = lm_head(params.target)
    copy = (
        None
        if isinstance(output, Scaled) or config.draft_vocab_size is not None
        else call(_quantizer("V D", kind), output)
    )
    return Params(params.target, jax.tree.unflatten(form, done), copy)


@cache
def _quantizer(letters: str, kind: str) -> Callable[[AnyMatrix], AnyMatrix]:
    """`matrix.quantize`, laid out by axis letters: one compiled function for all weights that have them."""
    return jax.jit(lambda weight: constrain_stored(matrix.quantize(weight, kind), letters))
