"""The one table between Hugging Face tensors and our weights; import and export read the same rows.

A row is: the Hugging Face name, our path, and the einops pattern from their layout to ours. `{i}`
stands for a layer's number, `{e}` for an expert's: there each expert has a tensor of its own, and ours is
all of them, one after another along a first axis E that the pattern leaves out. The letters are those of
the legend in `domino_jax.config`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange

from domino_jax.config import DecoderConfig, TargetConfig
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
    ("layers.{i}.mlp.experts.{e}.gate_proj.weight", "layers.{i}.gate", "I D -> D I"),
    ("layers.{i}.mlp.experts.{e}.up_proj.weight", "layers.{i}.up", "I D -> D I"),
    ("layers.{i}.mlp.experts.{e}.down_proj.weight", "layers.{i}.down", "D I -> I D"),
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
    """One weight of ours, and what it is made of: one tensor of theirs, or one for each expert.

    `hf_names` are in the order of the experts; `pattern` and `hf_shape` are those of each tensor.
    """

    hf_names: tuple[str, ...]
    path: str
    pattern: str
    hf_shape: tuple[int, ...]
    sizes: tuple[tuple[str, int], ...]
    stacked: bool = False

    def to_ours(self, tensor):
        """One of their tensors in our layout (a view where NumPy can give one): the weight, or that expert's of it."""
        return rearrange(tensor, self.pattern, **self._named())

    def to_hf(self, array):
        """The weight, or one expert's of it, in Hugging Face's layout."""
        theirs, ours = self.pattern.split(" -> ")
        return rearrange(array, f"{ours} -> {theirs}", **self._named())

    def join(self, tensors: Iterable[Any]):
        """Our weight, from all of their tensors in the order of `hf_names`."""
        parts = [self.to_ours(tensor) for tensor in tensors]
        return np.stack(parts) if self.stacked else parts[0]

    def split(self, array) -> dict[str, Any]:
        """Their tensors by name, from our weight: `join` undone."""
        parts = array if self.stacked else [array]
        return {name: self.to_hf(part) for name, part in zip(self.hf_names, parts, strict=True)}

    def _named(self) -> dict[str, int]:
        return {letter: size for letter, size in self.sizes if letter in self.pattern.split(" -> ")[1].split()}


def entries(config: DecoderConfig) -> list[Entry]:
    """Every weight that a model of this config has, in our tree's order.

    Raises:
        KeyError: a weight of ours has no row in the table (a mistake in this file).
    """
    sizes = config.sizes
    rows = {}
    for name, path, pattern in TARGET if isinstance(config, TargetConfig) else DRAFT:
        stacked = "{e}" in name
        ours = ("E " if stacked else "") + pattern.split(" -> ")[1]
        for i in range(config.num_hidden_layers):
            names = tuple(name.format(i=i, e=e) for e in range(sizes.get("E", 0) if stacked else 1))
            rows[path.format(i=i), ours] = names, pattern, stacked
    made = []
    for path, letters in flatten(axes(config)).items():
        names, pattern, stacked = rows[path, letters]
        shape = _shape(pattern.split(" -> ")[0], sizes)
        made.append(Entry(names, path, pattern, shape, tuple(sizes.items()), stacked))
    return made


def _shape(letters: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a side of a pattern: "D (N H)" is two axes."""
    groups = re.findall(r"\((.*?)\)|(\S+)", letters)
    return tuple(math.prod(sizes[letter] for letter in (group or alone).split()) for group, alone in groups)
