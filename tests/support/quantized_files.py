"""Quantized weights as others' programs pack them, bit by bit and with their exact values, by nothing of the project's.

Each form is a function of a shape [out, in] and a generator of random numbers. It gives a module's tensors by the last
part of their names, and the weight's values in float32.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of the nibbles of a word, from the lowest

Packed = tuple[dict[str, np.ndarray], np.ndarray]


class QuantizedForm(NamedTuple):
    """A form: what config.json says of it, and how a weight is packed."""

    settings: Mapping[str, Any]
    pack: Callable[[tuple[int, int], np.random.Generator], Packed]
    shape: tuple[int, int] = (24, 48)  # one that is odd for it


def words_of(codes: np.ndarray, bits: int, columns: tuple[int, ...] | None = None) -> np.ndarray:
    """Rows of codes as rows of 32-bit words, the first code in the lowest bits; the last word may be partly empty."""
    count = 32 // bits
    rows = []
    for row in codes.tolist():
        words = []
        for start in range(0, len(row), count):
            word = 0
            for place in range(min(count, len(row) - start)):
                word |= (int(row[start + (columns[place] if columns else place)]) & (2**bits - 1)) << (bits * place)
            words.append(word)
        rows.append(words)
    return np.array(rows, np.uint32).view(np.int32)


def scales_of(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, largest: float, width: int) -> np.ndarray:
    """Scales with which weights are of the size that activations keep theirs with."""
    return (rng.uniform(0.5, 1.5, shape) * 2 / largest / width**0.5).astype(dtype)


def by_tiles(grid: np.ndarray, shape: tuple[int, int], tile: tuple[int, int]) -> np.ndarray:
    """Each entry of a grid for all rows and columns of its tile."""
    out = np.empty(shape, np.float32)
    for row in range(grid.shape[0]):
        for column in range(grid.shape[1]):
            rows = slice(row * tile[0], (row + 1) * tile[0])
            out[rows, column * tile[1] : (column + 1) * tile[1]] = np.float32(grid[row, column])
    return out


def tiles_of(shape: tuple[int, int], tile: tuple[int, int] | str) -> tuple[tuple[int, int], tuple[int, int]]:
    """A tile's height and width, and the grid of them."""
    height, width = {"tensor": shape, "channel": (1, shape[1])}[tile] if isinstance(tile, str) else tile
    return (height, width), (-(-shape[0] // height), -(-shape[1] // width))


def fp8(tile: tuple[int, int] | str, scale: str = "weight_scale_inv", dtype: Any = np.float32, flat: bool = False):
    def pack(shape: tuple[int, int], rng: np.random.Generator) -> Packed:
        size, grid = tiles_of(shape, tile)
        codes = rng.uniform(-448, 448, shape).astype(E4M3)
        scales = scales_of(rng, grid, dtype, 448, shape[1])
        values = codes.astype(np.float32) * by_tiles(scales, shape, size)
        return {"weight": codes, scale: scales.reshape(-1) if flat else scales}, values

    return pack


def int8(tile: str, symmetric: bool = True, flat: bool = False):
    def pack(shape: tuple[int, int], rng: np.random.Generator) -> Packed:
        size, grid = tiles_of(shape, tile)
        codes, scales = rng.integers(-128, 128, shape), scales_of(rng, grid, BF16, 128, shape[1])
        made = {"weight": codes.astype(np.int8), "weight_scale": scales.reshape(-1) if flat else scales}
        zeros = np.zeros(grid, np.int8) if symmetric else rng.integers(-100, 100, grid).astype(np.int8)
        if not symmetric:
            made["weight_zero_point"] = zeros.reshape(-1) if flat else zeros
        values = (codes - by_tiles(zeros, shape, size)).astype(np.float32) * by_tiles(scales, shape, size)
        return made, values

    return pack


def packed(bits: int, tile: int | str, symmetric: bool = True, act_order: bool = False):
    """compressed-tensors: codes are signed and stored with an offset, as zero points are."""
    half = 2 ** (bits - 1)

    def pack(shape: tuple[int, int], rng: np.random.Generator) -> Packed:
        size, grid = tiles_of(shape, (1, tile) if isinstance(tile, int) else tile)
        codes = rng.integers(-half, half, shape)
        scales = scales_of(rng, grid, BF16, half, shape[1])
        zeros = np.zeros(grid, np.int64) if symmetric else rng.integers(-half, half, grid)
        made = {"weight_packed": words_of(codes + half, bits), "weight_scale": scales, "weight_shape": np.array(shape)}
        if not symmetric:
            points = words_of((zeros + half).T, bits).T
            made["weight_zero_point"] = zeros.astype(np.int8).reshape(-1) if tile == "tensor" else points
        values, zeros_of = by_tiles(scales, shape, size), by_tiles(zeros, shape, size)
        if act_order:
            order = rng.permutation(shape[1])
            made["weight_g_idx"] = (np.arange(shape[1]) // size[1])[order].astype(np.int32)
            values, zeros_of = values[:, order], zeros_of[:, order]
        return made, (codes - zeros_of).astype(np.float32) * values

    return pack


def awq(group: int):
    def pack(shape: tuple[int, int], rng: np.random.Generator) -> Packed:
        out, width = shape
        group_size = width if group == -1 else group
        codes, zeros = rng.integers(0, 16, (width, out)), rng.integers(0, 16, (width // group_size, out))
        scales = scales_of(rng, zeros.shape, np.float16, 8, width)
        of = np.arange(width) // group_size
        values = (codes - zeros[of]).astype(np.float32) * scales[of].astype(np.float32)
        made = {"qweight": words_of(codes, 4, AWQ_COLUMNS), "qzeros": words_of(zeros, 4, AWQ_COLUMNS), "scales": scales}
        return made, values.T

    return pack


def gptq(bits: int, group: int, version: int = 1, order: str = "none"):
    """GPTQ; `order` is "none" (no g_idx), "in order" or "any"."""

    def pack(shape: tuple[int, int], rng: np.random.Generator) -> Packed:
        out, width = shape
        group_size = width if group == -1 else group
        codes = rng.integers(0, 2**bits, (width, out))
        zeros = rng.integers(1, 2**bits, (width // group_size, out))  # of version 1 one less is stored
        scales = scales_of(rng, zeros.shape, np.float16, 2 ** (bits - 1), width)
        of = np.arange(width) // group_size
        if order == "any":
            of = of[rng.permutation(width)]
        values = (codes - zeros[of]).astype(np.float32) * scales[of].astype(np.float32)
        stored = zeros - 1 if version == 1 else zeros
        made = {"qweight": words_of(codes.T, bits).T, "qzeros": words_of(stored, bits), "scales": scales}
        if order != "none":
            made["g_idx"] = of.astype(np.int32)
        return made, values.T

    return pack


def compressed(form: str, bits: int, kind: str, strategy: str, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    """The settings of compressed-tensors, as llm-compressor writes them."""
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric, "dynamic": False}
    weights |= {"group_size": None, "block_structure": None, "actorder": None, "observer": "minmax"} | more
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
    }


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
PACK, FLOAT, INT = "pack-quantized", "float-quantized", "int-quantized"

FORMS: dict[str, QuantizedForm] = {
    "FP8, blocks": QuantizedForm(FP8 | {"weight_block_size": [10, 20]}, fp8((10, 20))),
    "FP8, blocks, bfloat16 scales": QuantizedForm(
        FP8 | {"weight_block_size": [16, 7]}, fp8((16, 7), "weight_scale", BF16)
    ),
    "FP8, one scale": QuantizedForm(FP8 | {"activation_scheme": "static"}, fp8("tensor", "weight_scale", flat=True)),
    "FP8, scale a row": QuantizedForm(FP8, fp8("channel", "weight_scale")),
    "compressed, FP8 channel": QuantizedForm(
        compressed(FLOAT, 8, "float", "channel"), fp8("channel", "weight_scale", BF16)
    ),
    "compressed, FP8 tensor": QuantizedForm(
        compressed(FLOAT, 8, "float", "tensor"), fp8("tensor", "weight_scale", BF16, flat=True)
    ),
    "compressed, FP8 block": QuantizedForm(
        compressed("naive-quantized", 8, "float", "block", block_structure=[16, 10]), fp8((16, 10), "weight_scale")
    ),
    "compressed, int8 channel": QuantizedForm(compressed(INT, 8, "int", "channel"), int8("channel")),
    "compressed, int8 channel, zero points": QuantizedForm(
        compressed(INT, 8, "int", "channel", False), int8("channel", False)
    ),
    "compressed, int8 tensor, zero point": QuantizedForm(
        compressed(INT, 8, "int", "tensor", False), int8("tensor", False, flat=True)
    ),
    "compressed, 4 bits group": QuantizedForm(compressed(PACK, 4, "int", "group", group_size=16), packed(4, 16)),
    "compressed, 4 bits group, zero points": QuantizedForm(
        compressed(PACK, 4, "int", "group", False, group_size=16), packed(4, 16, False)
    ),
    "compressed, 4 bits channel, zero points": QuantizedForm(
        compressed(PACK, 4, "int", "channel", False), packed(4, "channel", False), (13, 43)
    ),
    "compressed, 8 bits channel": QuantizedForm(compressed(PACK, 8, "int", "channel"), packed(8, "channel"), (9, 42)),
    "compressed, 8 bits group, zero points": QuantizedForm(
        compressed(PACK, 8, "int", "group", False, group_size=8), packed(8, 8, False)
    ),
    "compressed, 4 bits tensor, zero point": QuantizedForm(
        compressed(PACK, 4, "int", "tensor", False), packed(4, "tensor", False)
    ),
    "compressed, act-order": QuantizedForm(
        compressed(PACK, 4, "int", "group", group_size=16, actorder="group"), packed(4, 16, act_order=True)
    ),
    "compressed, act-order, zero points": QuantizedForm(
        compressed(PACK, 4, "int", "group", False, group_size=8, actorder="group"), packed(4, 8, False, act_order=True)
    ),
    "AWQ": QuantizedForm(AWQ, awq(16)),
    "AWQ, one group": QuantizedForm(AWQ | {"group_size": -1}, awq(-1)),
    "GPTQ": QuantizedForm(GPTQ, gptq(4, 16)),
    "GPTQ, g_idx": QuantizedForm(GPTQ | {"desc_act": True}, gptq(4, 16, 1, "any")),
    "GPTQ, 8 bits": QuantizedForm(GPTQ | {"bits": 8, "group_size": -1}, gptq(8, -1, 1, "in order")),
    "GPTQ, 2 bits": QuantizedForm(GPTQ | {"bits": 2, "group_size": 8}, gptq(2, 8), (32, 48)),
    "GPTQ v2": QuantizedForm(
        GPTQ | {"checkpoint_format": "gptq_v2", "desc_act": True}, gptq(4, 16, 2, "any"), (20, 48)
    ),
}


def quantized_model(
    form: QuantizedForm, tensors: Mapping[str, np.ndarray], seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A model's tensors by name, those of its projections quantized (random ones); and the same with plain values."""
    rng = np.random.default_rng(seed)
    stored, plain = {}, {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            parts, plain[name] = form.pack((tensor.shape[0], tensor.shape[1]), rng)
            stored |= {name.removesuffix("weight") + ending: part for ending, part in parts.items()}
        else:
            stored[name] = plain[name] = tensor
    return stored, plain
