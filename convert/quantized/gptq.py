"""GPTQ: codes packed along inputs, scales and zero points of groups of inputs, which `g_idx` may order anyhow.

`qweight` [in · bits / 32, out], `qzeros` [groups, out · bits / 32] (packed along outputs), `scales` [groups, out] and
`g_idx` [in] lie input by input. The older format stores zero points less one.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np

from convert.quantized.modules import (
    SCALES,
    QuantizedModule,
    QuantizedWeight,
    grid_shape,
    group_numbers,
    packed_slice,
    unpack,
)
from domino_jax.errors import DominoError
from domino_jax.fields import BOOLEAN, OBJECT, TEXT, Fields, as_json, integer

OFFSETS: Final = {"gptq": 1, "gptq_v2": 0}  # of stored zero points


class GptqForm:
    """The form of `quant_method` gptq.

    Raises:
        DominoError: a setting is of another kind, or not supported.
    """

    marks: frozenset[str] = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    spare: frozenset[str] = frozenset()

    def __init__(self, fields: Fields):
        where = fields.where
        self.bits = fields.get("bits", integer(1))
        if self.bits not in (2, 4, 8):
            raise DominoError(f"{where} has {self.bits} bits of GPTQ; 2, 4 and 8 are supported.")
        self.format = fields.get("checkpoint_format", TEXT, "gptq", also=["format"])
        if self.format not in OFFSETS:
            raise DominoError(
                f"{where} has checkpoint_format {as_json(self.format)} of GPTQ; {' and '.join(OFFSETS)} are supported."
            )
        if fields.get("is_marlin_format", BOOLEAN, False):
            raise DominoError(f"{where} has is_marlin_format true, which is not supported.")
        packed = fields.get("pack_dtype", TEXT, "int32")
        if packed != "int32":
            raise DominoError(f"{where} has pack_dtype {as_json(packed)} of GPTQ; int32 alone is supported.")
        dynamic: Mapping[str, object] = fields.get("dynamic", OBJECT, {})
        other = next((rule for rule, settings in dynamic.items() if not rule.startswith("-:") and settings), None)
        if other is not None:
            raise DominoError(f"{where} has dynamic settings of its own for {as_json(other)}, which is not supported.")
        self.in_order = not fields.get("desc_act", BOOLEAN, False)
        self.group_size = fields.get("group_size", integer(-1))
        if self.group_size == 0:
            raise DominoError(f"{where} has a group_size of 0 of GPTQ.")

    def weight(self, module: QuantizedModule) -> QuantizedWeight:
        """A module's weight."""
        module.refuse("weight")
        bits, offset = self.bits, OFFSETS[self.format]
        codes, zeros = module.part("qweight", ("I32",)), module.part("qzeros", ("I32",))
        scales = module.part("scales", SCALES)
        # Where inputs may have any order, what says which is needed.
        needed = "g_idx" in module.parts or not self.in_order
        groups = module.part("g_idx", ("I32", "I64"), dims=1) if needed else None
        shape = (codes.shape[1], codes.shape[0] * 32 // bits)
        if groups is not None:
            module.check_shape(groups, (shape[1],), f"one group for each input of {bits} bits")
        group = shape[1] if self.group_size == -1 else self.group_size
        count = grid_shape(shape, (1, group))[1]
        module.check_shape(scales, (count, shape[0]), f"groups of {group} inputs")
        module.check_shape(
            zeros, (count, -(-shape[0] * bits // 32)), f"groups of {group} inputs, {bits} bits an output"
        )

        def values(rows: range, columns: range) -> np.ndarray:
            words, inside = packed_slice(columns, bits)
            numbers = group_numbers(columns, group, groups, count)
            made = unpack(codes.read((words, slice(rows.start, rows.stop))), bits, 0)[inside].astype(np.float32)
            words, inside = packed_slice(rows, bits)
            points = unpack(zeros.read((slice(None), words)), bits, 1)[:, inside].astype(np.float32) + offset
            made -= points[numbers]
            made *= scales.read((slice(None), slice(rows.start, rows.stop))).astype(np.float32)[numbers]
            return made.T

        parts = (codes, zeros, scales, *([groups] if groups else []))
        described = f"{self.format.upper().replace('_', ' ')}, {bits} bits in groups of {group}"
        return module.weight(shape, parts, described, values, axis=1)
