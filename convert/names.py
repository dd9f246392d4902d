"""The one table between Hugging Face tensors and our weights; import and export read the same rows.

A row is: our path, the axes of Hugging Face's tensor by the letters of the legend in `domino_jax.config`, and the
tensor's name. Ours are the same axes in the same order, with heads split: nothing is transposed. `{i}` stands for a
layer's number.

Several names make one weight of ours, one tensor after another along the first axis ("2"). `{e}` stands for an expert's
number, where each expert has a tensor of its own: theirs lie along a first axis E. Rows with one name divide the
tensor's last axis between them, in their order.
"""

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from convert.safetensors import Index
from domino_jax.config import CustomDraftConfig, DecoderConfig, DraftConfig, TargetConfig
from domino_jax.drafters.convolution import Convolution
from domino_jax.drafters.dual_view import HEAD_PREFIX, DualViewConfig
from domino_jax.drafters.heads import head_of
from domino_jax.weights import TensorRow, axes, flatten

LAYER: tuple[TensorRow, ...] = (
    ("layers.{i}.input_norm", "D", ("layers.{i}.input_layernorm.weight",)),
    ("layers.{i}.q", "(N H) D", ("layers.{i}.self_attn.q_proj.weight",)),
    ("layers.{i}.kv", "(K H) D", ("layers.{i}.self_attn.k_proj.weight", "layers.{i}.self_attn.v_proj.weight")),
    ("layers.{i}.q_bias", "(N H)", ("layers.{i}.self_attn.q_proj.bias",)),
    ("layers.{i}.kv_bias", "(K H)", ("layers.{i}.self_attn.k_proj.bias", "layers.{i}.self_attn.v_proj.bias")),
    ("layers.{i}.q_norm", "H", ("layers.{i}.self_attn.q_norm.weight",)),
    ("layers.{i}.k_norm", "H", ("layers.{i}.self_attn.k_norm.weight",)),
    ("layers.{i}.o", "D NH", ("layers.{i}.self_attn.o_proj.weight",)),
    ("layers.{i}.o_bias", "D", ("layers.{i}.self_attn.o_proj.bias",)),
    ("layers.{i}.mlp_norm", "D", ("layers.{i}.post_attention_layernorm.weight",)),
    ("layers.{i}.gate_up", "F D", ("layers.{i}.mlp.gate_proj.weight", "layers.{i}.mlp.up_proj.weight")),
    ("layers.{i}.down", "D F", ("layers.{i}.mlp.down_proj.weight",)),
)
EXPERTS: tuple[TensorRow, ...] = (
    ("layers.{i}.router", "RE D", ("layers.{i}.mlp.gate.weight",)),
    (
        "layers.{i}.gate_up",
        "I D",
        ("layers.{i}.mlp.experts.{e}.gate_proj.weight", "layers.{i}.mlp.experts.{e}.up_proj.weight"),
    ),
    ("layers.{i}.down", "D I", ("layers.{i}.mlp.experts.{e}.down_proj.weight",)),
)
TARGET: tuple[TensorRow, ...] = (
    ("embed", "V D", ("model.embed_tokens.weight",)),
    *((path, theirs, tuple(f"model.{name}" for name in names)) for path, theirs, names in (*LAYER, *EXPERTS)),
    ("norm", "D", ("model.norm.weight",)),
    ("lm_head", "V D", ("lm_head.weight",)),
)
DRAFT: tuple[TensorRow, ...] = (
    ("fc", "D LD", ("fc.weight",)),
    ("context_norm", "D", ("hidden_norm.weight",)),
    *LAYER,
    *Convolution.tensors,
    ("norm", "D", ("norm.weight",)),
    ("lm_head", "DV D", ("lm_head.weight",)),
    ("d2t", "DT", ("d2t",)),
)
REDUCED = ("d2t", "t2d")  # of a reduced vocabulary: what to add to a draft's number, and which tokens there are


@dataclass(frozen=True)
class Entry:
    """One weight of one model: its names and its two layouts.

    It is one tensor of Hugging Face's, or several along its first axes (`stacked` of them), or (`columns`) a part of
    the last axis of one.
    """

    path: str
    letters: tuple[str, ...]
    shape: tuple[int, ...]
    hf_names: tuple[str, ...]
    hf_shape: tuple[int, ...]  # of each of Hugging Face's tensors
    stacked: int  # of our axes, how many number Hugging Face's tensors
    groups: tuple[tuple[int, ...], ...]  # for each axis of Hugging Face's, the sizes of ours that share it
    columns: slice

    def read(self, read: Callable[[str, Index], np.ndarray], index: Index | None = None) -> np.ndarray:
        """The weight in our layout, or the part of it at `index`, from Hugging Face's tensors.

        Args:
            read: gives the part of a tensor by its name and slices.
        """
        index = index or (slice(None),) * len(self.shape)
        index = tuple(slice(*one.indices(size)) for one, size in zip(index, self.shape, strict=True))
        theirs, own = [], list(index[self.stacked :])
        for group in self.groups:
            first, inner = own[0], prod(group[1:])
            assert all(one == slice(0, size, 1) for one, size in zip(own[1 : len(group)], group[1:], strict=True)), (
                "of axes that share one only the first is divided"
            )
            theirs.append(slice(first.start * inner, first.stop * inner))
            del own[: len(group)]
        theirs[-1] = slice(theirs[-1].start + self.columns.start, theirs[-1].stop + self.columns.start)
        lead, inner = index[: self.stacked], [one.stop - one.start for one in index[self.stacked :]]
        numbers = np.arange(len(self.hf_names)).reshape(self.shape[: self.stacked])[lead]
        if numbers.size == 1:
            return read(self.hf_names[numbers.item()], tuple(theirs)).reshape(*numbers.shape, *inner)
        for place, number in enumerate(numbers.flat):
            part = read(self.hf_names[number], tuple(theirs))
            if place == 0:
                whole = np.empty((numbers.size, *inner), part.dtype)
            whole[place] = part.reshape(inner)
            del part  # before the next is read
        return whole.reshape(*numbers.shape, *inner)


def entries(config: DecoderConfig) -> list[Entry]:
    """Every weight that a model of this config has, in our tree's order.

    Raises:
        KeyError: a weight of ours has no row in the table (a mistake in this file, or in a drafter's).
    """
    table = TARGET if isinstance(config, TargetConfig) else DRAFT
    if isinstance(config, DraftConfig):
        head = head_of(config)
        table += tuple((f"head.{path}", theirs, names) for path, theirs, names in head.tensors)
    if isinstance(config, CustomDraftConfig):
        table = config.tensors
    if isinstance(config, DualViewConfig) and config.head:
        ours = ((f"head.{path}", theirs, names) for path, theirs, names in config.head.tensors)
        table += tuple((path, theirs, tuple(f"{HEAD_PREFIX}{name}" for name in names)) for path, theirs, names in ours)
    sizes = config.sizes
    # By path and letters: a layer has one MLP or many, under the same path.
    rows = {}
    for (path, theirs, names), i in itertools.product(table, range(config.num_hidden_layers)):
        stack = ["E"] * ("{e}" in names[0]) + ["2"] * (len(names) > 1)
        letters = (*stack, *re.findall(r"\w+", theirs))
        rows[path.format(i=i), letters] = (theirs, [name.replace("{i}", str(i)) for name in names])
    taken: dict[str, int] = {}  # columns of each divided tensor
    made = {}
    ours = {(path, tuple(text.split())): path for path, text in flatten(axes(config)).items()}
    for path, letters in sorted(ours, key={row: place for place, row in enumerate(rows)}.__getitem__):
        theirs, names = rows[path, letters]
        experts = range(sizes["E"]) if "{e}" in names[0] else range(1)
        names = tuple(name.replace("{e}", str(e)) for e in experts for name in names)
        grouped = [axis.strip("()").split() for axis in re.findall(r"\([^)]*\)|\S+", theirs)]
        groups = tuple(tuple(sizes[letter] for letter in axis) for axis in grouped)
        shape, width = tuple(sizes[letter] for letter in letters), prod(groups[-1])
        columns = slice(taken.get(names[0], 0), taken.get(names[0], 0) + width)
        taken[names[0]] = columns.stop
        stacked = len(letters) - sum(map(len, groups))
        made[path] = Entry(path, letters, shape, names, tuple(map(prod, groups)), stacked, groups, columns)
    return [
        replace(made[path], hf_shape=(*made[path].hf_shape[:-1], taken[made[path].hf_names[0]]))
        for path in ours.values()
    ]


def units(table: list[Entry]) -> list[list[Entry]]:
    """The entries in groups that share tensors: mostly one each."""
    found: dict[str, list[Entry]] = {}
    for entry in table:
        found.setdefault(entry.hf_names[0], []).append(entry)
    return [sorted(unit, key=lambda entry: entry.columns.start) for unit in found.values()]


def to_hf(unit: list[Entry], leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face's tensors by name, from the weights of a group of `units` by path."""
    shape = (len(unit[0].hf_names), *unit[0].hf_shape[:-1], -1)
    parts = [np.asarray(leaves[entry.path]).reshape(shape) for entry in unit]
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)  # one is mostly all, and large
    return dict(zip(unit[0].hf_names, whole, strict=True))


def vocabulary_tables(d2t: np.ndarray, vocab_size: int) -> dict[str, np.ndarray]:
    """speculators' two tensors of a reduced vocabulary, from the first."""
    t2d = np.zeros(vocab_size, bool)
    t2d[np.arange(len(d2t)) + d2t] = True
    return dict(zip(REDUCED, (np.asarray(d2t).astype(np.int64), t2d), strict=True))


def export(config: DecoderConfig, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All of Hugging Face's tensors by name, from a model's weights by path."""
    return {name: tensor for unit in units(entries(config)) for name, tensor in to_hf(unit, leaves).items()}
