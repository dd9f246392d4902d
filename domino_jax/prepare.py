"""Weights made ready for decoding: in the order a CPU wants, products of one input fused, the drafter in 8 bits.

None of it changes what the target says: the products are the same sums, up to float32's rounding, and an 8-bit drafter
only proposes other tokens (docs/algorithm.md, section 8).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from domino_jax.config import DecoderConfig, DraftConfig
from domino_jax.decode import Params
from domino_jax.drafters.heads.domino import fused
from domino_jax.sharding import constrain
from domino_jax.weights import FusedLayer, Head, OutputsFirst, Quantized, axes, flatten, is_bias, lm_head

KINDS = {"int8": jnp.int8, "float8": jnp.float8_e4m3fn}

# The recurrent part stays as it is: it is small, and its error would be carried from proposal to proposal.
WHOLE = ("head.gru_in", "head.gru_state", "head.proj_in")
LARGEST_TABLE = 32 << 20  # bytes
# Axes that a product with the weight sums over; the others are outputs, which have a scale each.
SUMMED = {"D N H": 1, "D K H": 1, "N H D": 2, "D F": 1, "F D": 1, "LD D": 1, "V R": -1, "V D": -1}


def outputs_first(module: Any, config: DecoderConfig) -> None:
    """Make a Target or Draft ready for a float32 run on a CPU: its matrices become OutputsFirst.

    Those in bfloat16 stay so, all else becomes float32. Products are float32's either way (`layers.product`).
    Processors that multiply bfloat16 matrices (Intel's AMX) have them sooner, from half the memory; elsewhere they are
    slow. Experts and the causal head become float32 and stay in their order: the products of the first are of another
    kind, those of the second too small to gain.

    Weight after weight is replaced, so that one at most is held twice.
    """
    for path, letters in flatten(axes(config)).items():
        *parents, name = path.split(".")
        owner = module
        for parent in parents:
            owner = owner[int(parent)] if parent.isdigit() else getattr(owner, parent)
        weight = getattr(owner, name)
        turned = letters in SUMMED and "head" not in parents
        if not turned or weight.dtype != jnp.bfloat16:
            weight = weight.astype(jnp.float32)
        if turned:
            weight = _outputs_first(weight, letters)
        setattr(owner, name, nnx.data(jax.block_until_ready(weight)))


@partial(jax.jit, static_argnums=1)
def _outputs_first(weight: Array, letters: str) -> OutputsFirst:
    """A matrix with its output axes in front."""
    names, summed = letters.split(), SUMMED[letters]
    if summed < 0:  # a vocabulary's: they are
        return OutputsFirst(constrain(weight, letters))
    order = [*range(summed, weight.ndim), *range(summed)]
    return OutputsFirst(constrain(jnp.transpose(weight, order), " ".join(names[i] for i in order)))


def fuse(module: Any) -> None:
    """Replace the layers of a Target or Draft by FusedLayers, one after another, so that nothing is held twice.

    Experts stay as they are: a copy of theirs would be most of the model, and their products are large enough.
    After `quantize` where both are wanted. Q stays by itself: a drafter's context has keys and values alone.
    """
    layers: list[Any] = [None] * len(module.layers)
    for i in range(len(layers)):
        layer, module.layers[i] = module.layers[i], nnx.data(None)
        kv_bias = None if layer.k_bias is None else _stacked(layer.k_bias, layer.v_bias, "- K H")
        gate_up = _together(layer.gate, layer.up, "D - F") if layer.router is None else None
        layers[i] = FusedLayer(layer, _together(layer.k, layer.v, "D - K H"), kv_bias, gate_up)
        del layer
    module.layers = nnx.List(layers)


def fuse_head(params: Params, largest: int = LARGEST_TABLE) -> None:
    """Replace the drafter's causal head, if it has one, by a FusedHead: fewer products between two proposals.

    Args:
        largest: bytes that the table of what every token gives the GRU's gates may take; 0 for none. At a vocabulary
            of 151,936 it would be a gigabyte.
    """
    head = params.draft.head if params.draft else None
    if params.draft is None or not isinstance(head, Head):
        return
    vocabulary = jax.tree.leaves(params.target.embed)[0].shape[0]
    small = vocabulary * head.gru_in.shape[1] * head.gru_in.dtype.itemsize <= largest
    params.draft.head = jax.jit(fused)(head, params.target.embed if small else None)  # type: ignore[assignment]


@partial(jax.jit, static_argnums=2)
def _together(first: Any, second: Any, letters: str) -> Any:
    """Two weights [in, out...] as one [in, 2, out...], laid out by its axis letters."""
    if isinstance(first, OutputsFirst):
        values = jnp.stack([first.values, second.values])
        return OutputsFirst(constrain(values, f"{letters.removeprefix('D ')} D"))
    if isinstance(first, Quantized):
        values, scale = jnp.stack([first.values, second.values], axis=1), jnp.stack([first.scale, second.scale])
        return Quantized(constrain(values, letters), constrain(scale, letters.removeprefix("D ")))
    return constrain(jnp.stack([first, second], axis=1), letters)


@partial(jax.jit, static_argnums=2)
def _stacked(first: Array, second: Array, letters: str) -> Array:
    """Two biases as one with a leading axis of two."""
    return constrain(jnp.stack([first, second]), letters)


def quantize(params: Params, config: DraftConfig, kind: str) -> Params:
    """The params with the drafter's matrices in 8 bits, and an 8-bit copy of the LM head for drafting.

    Args:
        kind: one of KINDS.
    """
    assert params.draft is not None, "there is no drafter to quantize"
    letters = flatten(axes(config))
    leaves, form = jax.tree.flatten(params.draft)
    named = zip(flatten(params.draft), leaves, strict=True)

    def stays(path: str) -> bool:
        return path in WHOLE or is_bias(path) or len(letters[path].split()) == 1

    done = [leaf if stays(path) else to_8_bits(leaf, letters[path], kind) for path, leaf in named]
    output = lm_head(params.target)
    output = output.values.astype(jnp.float32) if isinstance(output, OutputsFirst) else output
    return Params(params.target, jax.tree.unflatten(form, done), to_8_bits(output, "V D", kind))


@partial(jax.jit, static_argnums=(1, 2))
def to_8_bits(weight: Array, letters: str, kind: str) -> Quantized:
    """The weight as values times scale, the largest of each output's column at the end of the range.

    Args:
        letters: its axes, "D N H".
        kind: one of KINDS.
    """
    dtype, summed = KINDS[kind], SUMMED[letters]
    axis = tuple(range(summed)) if summed > 0 else (summed,)
    whole = jnp.issubdtype(dtype, jnp.integer)
    most = float(jnp.iinfo(dtype).max if whole else jnp.finfo(dtype).max)
    w = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(w), axis=axis, keepdims=True)
    # Of an output that is zero any scale is right; a subnormal one would be flushed to zero, and divided by.
    scale = jnp.where(largest > 0, jnp.maximum(largest / most, jnp.finfo(jnp.float32).tiny), 1.0)
    values = w / scale
    values = constrain((jnp.round(values) if whole else values).astype(dtype), letters)
    names = letters.split()
    outputs = " ".join(names[summed:] if summed > 0 else names[:summed])
    return Quantized(values, constrain(jnp.squeeze(scale, axis).astype(weight.dtype), outputs))
