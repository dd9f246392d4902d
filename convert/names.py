"""The one table between Hugging Face tensors and our weights; import and export read the same rows.

A row is: the Hugging Face name, our path, and the einops pattern from their layout to ours. `{i}`
stands for a layer's number. `{e}` stands for an expert's, where each expert has a tensor of its own: the
pattern is then that of all of them, one after another along a first axis E. The letters are those of the
legend in `domino_jax.config`.
"""

import re
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
from einops import rearrange
from jax import Array

from domino_jax.config import DecoderConfig, TargetConfig
from domino_jax.sharding import constrain_stored
from domino_jax.weights import axes, flatten

LAYER = (
    ("layers.{i}.input_layernorm.weight", "layers.{i}.input_norm", "D -> D"),
    ("layers.{i}.self_attn.q_proj.weight", "layers.{i}.q", "(N H) D -> D N H"),
    ("layers.{i}.self_attn.k_proj.weight", "layers.{i}.k", "(K H) D -> D K H"),
    ("layers.{i}.self_attn.v_proj.weight", "layers.{i}.v", "(K H) D -> D K H"),
    ("layers.{i}.self_attn.q_proj.bias", "layers.{i}.q_bias", "(N H) -> N H"),
    ("layers.{i}.self_attn.k_proj.bias", "layers.{i}.k_bias", "(K H) -> K H"),
    ("layers.{i}.self_attn.v_proj.bias", "layers.{i}.v_bias", "(K H) -> K H"),
    ("layers.{i}.self_attn.q_norm.weight", "layers.{i}.q_norm", "H -> H"),
    ("layers.{i}.self_attn.k_norm.weight", "layers.{i}.k_norm", "H -> H"),
    ("layers.{i}.self_attn.o_proj.weight", "layers.{i}.o", "D (N H) -> N H D"),
    ("layers.{i}.self_attn.o_proj.bias", "layers.{i}.o_bias", "D -> D"),
    ("layers.{i}.post_attention_layernorm.weight", "layers.{i}.mlp_norm", "D -> D"),
    ("layers.{i}.mlp.gate_proj.weight", "layers.{i}.gate", "F D -> D F"),
    ("layers.{i}.mlp.up_proj.weight", "layers.{i}.up", "F D -> D F"),
    ("layers.{i}.mlp.down_proj.weight", "layers.{i}.down", "D F -> F D"),
)
EXPERTS = (
    ("layers.{i}.mlp.gate.weight", "layers.{i}.router", "RE D -> D RE"),
    ("layers.{i}.mlp.experts.{e}.gate_proj.weight", "layers.{i}.gate", "E I D -> E D I"),
    ("layers.{i}.mlp.experts.{e}.up_proj.weight", "layers.{i}.up", "E I D -> E D I"),
    ("layers.{i}.mlp.experts.{e}.down_proj.weight", "layers.{i}.down", "E D I -> E I D"),
)
TARGET = (
    ("model.embed_tokens.weight", "embed", "V D -> V D"),
    *((f"model.{name}", path, pattern) for name, path, pattern in (*LAYER, *EXPERTS)),
    ("model.norm.weight", "norm", "D -> D"),
    ("lm_head.weight", "lm_head", "V D -> V D"),
)
DRAFT = (
    ("fc.weight", "fc", "D LD -> LD D"),
    ("hidden_norm.weight", "context_norm", "D -> D"),
    *LAYER,
    ("norm.weight", "norm", "D -> D"),
    ("prefix_gru.weight_ih_l0", "head.gru_in", "GU D -> D GU"),
    ("prefix_gru.weight_hh_l0", "head.gru_state", "GU U -> U GU"),
    ("embed_proj.0.weight", "head.proj_in", "R DU -> DU R"),
    ("embed_proj.2.weight", "head.proj_out", "V R -> V R"),
)


@dataclass(frozen=True)
class Entry:
    """One weight of one model: its names and its two layouts.

    It is one tensor of Hugging Face's, or (`stacked`) several: the parts of `hf_shape` along its first axis, in the
    order of `hf_names`.
    """

    hf_names: tuple[str, ...]
    path: str
    pattern: str
    hf_shape: tuple[int, ...]
    sizes: tuple[tuple[str, int], ...]  # of the letters that share an axis with one before them
    stacked: bool = False

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Of each of Hugging Face's tensors."""
        return self.hf_shape[1:] if self.stacked else self.hf_shape

    def tensors(self, whole: Any) -> dict[str, Any]:
        """Hugging Face's tensors by name, from all of them in one array in its layout."""
        return dict(zip(self.hf_names, whole if self.stacked else [whole], strict=True))

    @property
    def hf_letters(self) -> list[str]:
        """The letter of each axis in Hugging Face's layout; of several in one the first, which the others divide."""
        return [axis[0] for axis in _axes(self.pattern)]

    def to_ours(self, tensor: Any, dtype: Any = None) -> Array:
        """An array in Hugging Face's layout, in ours, on a mesh laid out by it; `dtype` as it is when None."""
        theirs, ours = self.pattern.split(" -> ")
        if theirs == ours and dtype in (None, tensor.dtype):
            return tensor
        return _rearrange(tensor, self.pattern, self.sizes, dtype, ours)

    def to_hf(self, array: Any, dtype: Any = None) -> Array:
        """An array in our layout, in Hugging Face's; `dtype` as it is when None."""
        theirs, ours = self.pattern.split(" -> ")
        if theirs == ours and dtype in (None, array.dtype):
            return array
        return _rearrange(array, f"{ours} -> {theirs}", self.sizes, dtype, None)


# Compiled, because NumPy transposes slower than a disk reads; and on the device, next to where the weight is to be.
@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _rearrange(x: Array, pattern: str, sizes: tuple[tuple[str, int], ...], dtype: Any, letters: str | None) -> Array:
    """`x` rearranged, then laid out by its axis `letters` where a mesh is in context."""
    here = {letter: size for letter, size in sizes if letter in re.findall("[A-Z]+", pattern)}
    out = rearrange(x, pattern, **here).astype(dtype or x.dtype)
    return constrain_stored(out, letters) if letters else out


def _axes(pattern: str) -> list[list[str]]:
    """The letters of each axis of a pattern's left side: "(N H) D -> ..." gives [["N", "H"], ["D"]]."""
    found = re.findall(r"\(([^)]*)\)|(\S+)", pattern.split(" -> ")[0])
    return [several.split() if several else [one] for several, one in found]


def entries(config: DecoderConfig) -> list[Entry]:
    """Every weight that a model of this config has, in our tree's order.

    Raises:
        KeyError: a weight of ours has no row in the table (a mistake in this file).
    """
    table = TARGET if isinstance(config, TargetConfig) else DRAFT
    # By path and axes: a layer has one MLP or many, under the same path.
    rows = {
        (path.format(i=i), pattern.split(" -> ")[1]): (i, name, pattern)
        for name, path, pattern in table
        for i in range(config.num_hidden_layers)
    }
    sizes = config.sizes
    made = []
    for path, letters in flatten(axes(config)).items():
        i, name, pattern = rows[path, letters]
        stacked = "{e}" in name
        names = tuple(name.format(i=i, e=e) for e in range(sizes["E"] if stacked else 1))
        grouped = _axes(pattern)
        shape = tuple(prod(sizes[letter] for letter in axis) for axis in grouped)
        inner = tuple((letter, sizes[letter]) for axis in grouped for letter in axis[1:])
        made.append(Entry(names, path, pattern, shape, inner, stacked))
    return made
