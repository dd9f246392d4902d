"""compressed-tensors, the form of llm-compressor and vLLM: FP8, int8, and 4 or 8 bits packed into words.

`config_groups` are schemes; which one a module has, its tensors tell: their names, dtypes and shapes.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from convert.quantized.codes import check_grid, scaled_codes
from convert.quantized.modules import (
    SCALES,
    QuantizedModule,
    QuantizedWeight,
    Tiles,
    grid_shape,
    group_numbers,
    packed_slice,
    read_whole,
    unpack,
)
from domino_jax.errors import DominoError
from domino_jax.fields import BOOLEAN, OBJECT, TEXT, Fields, Kind, as_json, either, integer, nullable, one_of

PACKED: Final = "pack-quantized"
FORMATS: Final = ("float-quantized", "int-quantized", "naive-quantized", PACKED)
MIXED: Final = "mixed-precision"
STRATEGIES: Final = ("tensor", "channel", "group", "block")
CODE, SCALE, ZERO, SHAPE, GROUPS = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"
BLOCK: Final = Kind(
    "two integers of at least 1",
    lambda x: type(x) is list and len(x) == 2 and all(map(integer(1).holds, x)),
    lambda x: (x[0], x[1]),
)
# What changes what a model computes, and the values with which it does not.
NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "kv_cache_scheme": (None,),
    "transform_config": (None, {}),
    "moe_sparsity_config": (None,),
}


class Scheme(NamedTuple):
    """How the weights of some modules are stored."""

    name: str  # of its group in config_groups
    packed: bool
    is_float: bool
    bits: int
    strategy: Literal["tensor", "channel", "group", "block"]
    tile: tuple[int, int]  # of group and block
    symmetric: bool
    act_order: bool  # whether groups are of inputs in any order

    @property
    def words(self) -> str:
        kind = "FP8" if self.is_float else f"{self.bits} bits" if self.packed else "int8"
        height, width = self.tile
        over = {
            "tensor": ", one scale",
            "channel": ", a scale a row",
            "group": f" in groups of {width}",
            "block": f" in blocks of {height} by {width}",
        }
        return f"{kind}{over[self.strategy]}{'' if self.symmetric else ', zero points'} (compressed-tensors)"

    def tile_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Height and width of what has one scale, in a weight of this shape."""
        whole = {"tensor": shape, "channel": (1, shape[1])}
        return whole.get(self.strategy, self.tile)


class CompressedForm:
    """The form of `quant_method` compressed-tensors.

    Raises:
        DominoError: a setting is of another kind, or not supported.
    """

    marks: frozenset[str] = frozenset({CODE, SCALE, ZERO, SHAPE, GROUPS})
    spare: frozenset[str] = frozenset({"input_scale", "input_zero_point", "output_scale", "output_zero_point"})

    def __init__(self, fields: Fields):
        self.where = where = fields.where
        form = fields.get("format", TEXT)
        for name, fine in NEUTRAL.items():
            for label, value in fields.given(name):
                if value not in fine:
                    raise DominoError(f"{where} has {label} {as_json(value)}, which is not supported.")
        sparse = Fields(where, ("sparsity_config.", fields.get("sparsity_config", OBJECT, {})), null_is_absent=True)
        if sparse.get("format", TEXT, "dense") != "dense":
            found = as_json(sparse.get("format", TEXT))
            raise DominoError(f"{where} has sparsity_config.format {found}; sparse weights are not supported.")
        self.schemes = [
            _scheme(where, name, group, form)
            for name, group in fields.get("config_groups", OBJECT).items()
            if not isinstance(group, Mapping) or group.get("weights") is not None
        ]

    def weight(self, module: QuantizedModule) -> QuantizedWeight:
        """A module's weight, by the scheme that its tensors fit."""
        made, wrong = [], []
        for scheme in self.schemes:
            try:
                made.append((_packed if scheme.packed else _plain)(module, scheme))
            except DominoError as error:
                wrong.append(error)
        if not made:
            if len(wrong) == 1:
                raise wrong[0]
            first = next(iter(module.parts.values()))
            among = f" (as to the first: {wrong[0]})" if wrong else ""
            raise DominoError(
                f"{first.file} has {first.name}, and none of the {len(self.schemes)} config_groups of {self.where} "
                f"fits the tensors of {module.name}{among}."
            )
        if len({weight.words for weight in made}) > 1:
            raise DominoError(
                f"{made[0].file} has {module.name}, which fits several config_groups of {self.where}: it can't be told "
                "which is meant."
            )
        return made[0]


def _scheme(where: str, name: str, group: Any, of_all: str) -> Scheme:
    """A scheme of config_groups.

    Args:
        of_all: the format of the whole model.
    """
    label = f"quantization_config.config_groups.{name}"
    if not isinstance(group, Mapping):
        raise DominoError(f"{where} has {label} {as_json(group)}; expected an object.")
    outer = Fields(where, (f"{label}.", group), null_is_absent=True)
    weights = Fields(where, (f"{label}.weights.", outer.get("weights", OBJECT)), null_is_absent=True)
    form = outer.get("format", TEXT, of_all)
    if form not in FORMATS:
        known = ", ".join(FORMATS)
        raise DominoError(f"{where} has the format {as_json(form)} of compressed-tensors; {known} are supported.")
    bits, kind = weights.get("num_bits", integer(1), 8), weights.get("type", one_of("int", "float"), "int")
    size = weights.get("group_size", integer(-1), -1)
    inferred = "tensor" if not weights.given("group_size") else "group" if size > 0 else "channel"
    strategy = weights.get("strategy", TEXT, inferred)
    if strategy not in STRATEGIES:
        known = ", ".join(STRATEGIES)
        raise DominoError(f"{where} has {label}.weights.strategy {as_json(strategy)}; {known} are supported.")
    tile = (1, max(size, 1))
    if strategy == "group" and size < 1:
        raise DominoError(f"{where} has {label}.weights.strategy group and no group_size of at least 1.")
    if strategy == "block":
        tile = weights.get("block_structure", BLOCK)
    allowed = {True: (8,), False: (4, 8)}[kind == "float"]
    if bits not in allowed or (kind == "float" and form == PACKED):
        raise DominoError(
            f"{where} has {label}.weights of type {kind} and {bits} bits in {form}; FP8, and integers of 4 and 8 bits, "
            "are supported."
        )
    symmetric = weights.get("symmetric", BOOLEAN, True)
    if kind == "float" and not symmetric:
        raise DominoError(f"{where} has {label}.weights.symmetric false of type float, which is not supported.")
    order = weights.get("actorder", nullable(either(BOOLEAN, one_of("weight", "static", "group", "dynamic"))), None)
    act_order = order in (True, "group", "dynamic")
    return Scheme(name, form == PACKED, kind == "float", bits, strategy, tile, symmetric, act_order)


def _plain(module: QuantizedModule, scheme: Scheme) -> QuantizedWeight:
    """The weight of a matrix of codes of a byte each."""
    module.refuse(CODE, SHAPE, GROUPS, *([ZERO] if scheme.symmetric else []))
    codes = module.part("weight", ("F8_E4M3" if scheme.is_float else "I8",))
    tile = scheme.tile_of((codes.shape[0], codes.shape[1]))
    return scaled_codes(module, codes, SCALE, tile, scheme.words, None if scheme.symmetric else ZERO)


def _packed(module: QuantizedModule, scheme: Scheme) -> QuantizedWeight:
    """The weight of codes that are packed along inputs, with zero points that are packed along outputs."""
    bits = scheme.bits
    module.refuse("weight", *([ZERO] if scheme.symmetric else []))
    codes, scales = module.part(CODE, ("I32",)), module.part(SCALE, SCALES, dims=None)
    stated = module.part(SHAPE, ("I64", "I32"), dims=1)
    module.check_shape(stated, (2,), "rows and columns")
    rows_and_columns = module.read(stated)
    shape = (int(rows_and_columns[0]), int(rows_and_columns[1]))
    if min(shape) < 1 or codes.shape != (shape[0], -(-shape[1] * bits // 32)):
        raise DominoError(
            f"{codes.file} has {codes.name} of shape {list(codes.shape)}, which does not hold the {list(shape)} codes "
            f"of {stated.name} in {bits} bits."
        )
    tile = scheme.tile_of(shape)
    grid = grid_shape(shape, tile)
    check_grid(module, scales, grid, tile)
    groups = None
    if GROUPS in module.parts:
        groups = module.part(GROUPS, ("I32", "I64"), dims=1)
        module.check_shape(groups, (shape[1],), "one group for each input")
    elif scheme.act_order:
        module.part(GROUPS, ("I32",))  # which is missing
    parts, zeros = [codes, scales, stated, *([groups] if groups else [])], None
    if not scheme.symmetric:
        # One for the whole matrix is not packed.
        zeros = module.part(ZERO, ("I8",) if scheme.strategy == "tensor" else ("I32",), dims=None)
        wanted = grid if scheme.strategy == "tensor" else (-(-grid[0] * bits // 32), grid[1])
        check_grid(module, zeros, wanted, tile)
        parts.append(zeros)
    tiles, half = Tiles(scales, *tile, groups), 2 ** (bits - 1)

    def values(rows: range, columns: range) -> np.ndarray:
        words, inside = packed_slice(columns, bits)
        made = unpack(codes.read((slice(rows.start, rows.stop), words)), bits, 1)[:, inside].astype(np.float32)
        if zeros is None:
            made -= half
        elif scheme.strategy == "tensor":
            made -= half + read_whole(zeros).reshape(1, 1).astype(np.float32)
        else:  # both are stored with the same offset
            points = unpack(read_whole(zeros), bits, 0)[rows.start : rows.stop].astype(np.float32)
            numbers = group_numbers(columns, tile[1], groups, points.shape[1]) if points.shape[1] > 1 else slice(None)
            made -= points[:, numbers]
        made *= tiles.values(rows, columns)
        return made

    return module.weight(shape, parts, scheme.words, values)
