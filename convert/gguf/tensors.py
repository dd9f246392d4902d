"""The tensors of a GGUF file under Hugging Face's names, dequantized as they are read."""

import re
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Final

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from convert.gguf.container import BlockPlace, Header
from convert.safetensors import DTYPES, Index, Stored, fill
from domino_jax.errors import DominoError

BLOCK_VALUES = 2**22  # dequantized at once
# What is stored as it is; all else becomes float32.
PLAIN: Final = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
TOP: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
OF_A_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
OF_EXPERTS: Final = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
FREQUENCIES = "rope_freqs.weight"  # Llama 3.1's, which its config says otherwise
# In Llama's files each head's rows 0, 1, 2, ... of q and k are Hugging Face's 0, H/2, 1, H/2 + 1, ...
INTERLEAVED: Final = {
    "attn_q": ("attention.head_count",),
    "attn_k": ("attention.head_count_kv", "attention.head_count"),
}


@dataclass(frozen=True)
class Packed(Stored):
    """A tensor in blocks of a GGUF file; `dtype` is that of the values it gives."""

    kind: GGMLQuantizationType
    heads: int = 0  # whose rows lie interleaved; 0 where they do not

    @property
    def bytes(self) -> int:
        return _bytes(self.kind, prod(self.shape))

    @property
    def form(self) -> str:
        return self.kind.name

    def read(self, index: Index) -> np.ndarray:
        if len(self.shape) == 1:
            return self._in_order(self._rows(0, 1, (slice(None),))[0])[index]
        begin, end, _ = index[0].indices(self.shape[0])
        size = self.shape[0] // self.heads if self.heads else 1  # of what is kept together
        first, last = begin // size * size, -(-end // size) * size
        return self._in_order(self._rows(first, last, index[1:]))[begin - first : end - first]

    def _in_order(self, rows: np.ndarray) -> np.ndarray:
        """Whole heads' rows in Hugging Face's order."""
        if not self.heads:
            return rows
        size = self.shape[0] // self.heads
        apart = rows.reshape(-1, size // 2, 2, *rows.shape[1:]).swapaxes(1, 2)
        return np.ascontiguousarray(apart).reshape(rows.shape)

    def _rows(self, first: int, last: int, columns: Index) -> np.ndarray:
        """Rows as they lie in the file, of those columns; a tensor of one axis is one row."""
        inner = self.shape[1:] or self.shape
        row_bytes, step = _bytes(self.kind, prod(inner)), max(1, BLOCK_VALUES // prod(inner))
        kept = [len(range(*one.indices(size))) for one, size in zip(columns, inner, strict=True)]
        part = np.empty((last - first, *kept), DTYPES[self.dtype])
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.begin + first * row_bytes)
            for start in range(0, len(part), step):
                raw = np.empty((min(step, len(part) - start), row_bytes), np.uint8)
                fill(raw, stream)
                values = raw.view(part.dtype) if self.kind in PLAIN else dequantize(raw, self.kind)
                part[start : start + step] = values.reshape(-1, *inner)[:, *columns]
        return part


def _bytes(kind: GGMLQuantizationType, values: int) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return values // block * size


def packed_tensors(header: Header, first: Header) -> list[Stored]:
    """The tensors of a GGUF file by Hugging Face's names; what has none keeps its own.

    Args:
        first: of the model's files the one that has its metadata.

    Raises:
        DominoError: it has values that can't be dequantized, or rows that are not its heads'.
    """
    places = (place for place in header.places if place.name != FREQUENCIES)
    return [stored for place in places for stored in _named(packed(header, place), first)]


def packed(header: Header, place: BlockPlace) -> Packed:
    """A tensor of a GGUF file, by its own name.

    Raises:
        DominoError: its values can't be dequantized.
    """
    if not can_dequantize(place.kind):
        raise DominoError(
            f"{header.file} has {place.name} in {place.kind.name}, which the gguf package can't dequantize."
        )
    dtype = place.kind.name if place.kind in PLAIN else "F32"
    return Packed(header.file, place.name, place.shape, dtype, place.begin, place.kind)


def _named(one: Packed, first: Header) -> list[Packed]:
    if one.name in TOP:
        return [replace(one, name=TOP[one.name])]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", one.name)
    if not match:
        return [one]
    number, name, ending = match.groups()
    layer = f"model.layers.{number}."
    if name in OF_EXPERTS and len(one.shape) == 3:
        experts, *shape = one.shape
        size = _bytes(one.kind, prod(shape))
        return [
            replace(
                one,
                name=f"{layer}mlp.experts.{e}.{OF_EXPERTS[name]}.{ending}",
                shape=tuple(shape),
                begin=one.begin + e * size,
            )
            for e in range(experts)
        ]
    if name not in OF_A_LAYER:
        return [one]
    heads = 0
    if first.metadata.get("general.architecture") == "llama" and name in INTERLEAVED:
        known = (first.metadata.get(f"llama.{key}") for key in INTERLEAVED[name])
        heads = next((count for count in known if type(count) is int and count > 0), 1)
        if one.shape[0] % (2 * heads):
            raise DominoError(f"{one.file} has {one.name} of {one.shape[0]} rows, which are not {heads} heads'.")
    return [replace(one, name=f"{layer}{OF_A_LAYER[name]}.{ending}", heads=heads)]


@cache
def can_dequantize(kind: GGMLQuantizationType) -> bool:
    """Whether the gguf package gives the values of blocks of that kind."""
    if kind in PLAIN:
        return True
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
