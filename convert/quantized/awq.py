"""AWQ, the version for matrix products (GEMM): 4 bits, with scales and zero points of groups of inputs.

`qweight` [in, out / 8], `qzeros` [in / group, out / 8], both packed along outputs, and `scales` [in / group, out] lie
input by input.
"""

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
from domino_jax.fields import BOOLEAN, TEXT, Fields, as_json, integer

BITS: Final = 4
PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibbles of a word are columns 0, 2, 4, 6, 1, 3, 5, 7 from the lowest


class AwqForm:
    """The form of `quant_method` awq.

    Raises:
        DominoError: a setting is of another kind, or not supported.
    """

    marks: frozenset[str] = frozenset({"qweight", "qzeros", "scales"})
    spare: frozenset[str] = frozenset()

    def __init__(self, fields: Fields):
        version = fields.get("version", TEXT, "gemm")
        if version.lower() != "gemm":
            raise DominoError(f"{fields.where} has version {as_json(version)} of AWQ; gemm alone is supported.")
        backend = fields.get("backend", TEXT, "autoawq")
        if backend.lower() not in ("autoawq", "auto"):
            raise DominoError(f"{fields.where} has backend {as_json(backend)} of AWQ; autoawq alone is supported.")
        bits = fields.get("bits", integer(1), also=["w_bit"])
        if bits != BITS:
            raise DominoError(f"{fields.where} has {bits} bits of AWQ; {BITS} are supported.")
        if not fields.get("zero_point", BOOLEAN, True):
            raise DominoError(f"{fields.where} has zero_point false, which is not supported with AWQ.")
        self.group_size = fields.get("group_size", integer(-1), also=["q_group_size"])
        if self.group_size == 0:
            raise DominoError(f"{fields.where} has a group_size of 0 of AWQ.")

    def weight(self, module: QuantizedModule) -> QuantizedWeight:
        """A module's weight."""
        module.refuse("weight")
        codes, zeros = module.part("qweight", ("I32",)), module.part("qzeros", ("I32",))
        scales = module.part("scales", SCALES)
        shape = (codes.shape[1] * 32 // BITS, codes.shape[0])
        group = shape[1] if self.group_size == -1 else self.group_size
        count = grid_shape(shape, (1, group))[1]
        module.check_shape(scales, (count, shape[0]), f"groups of {group} inputs")
        module.check_shape(zeros, (count, codes.shape[1]), f"groups of {group} inputs, eight outputs a word")

        def values(rows: range, columns: range) -> np.ndarray:
            words, inside = packed_slice(rows, BITS)
            numbers = group_numbers(columns, group, None, count)
            found = unpack(codes.read((slice(columns.start, columns.stop), words)), BITS, 1, PLACES)[:, inside]
            points = unpack(zeros.read((slice(None), words)), BITS, 1, PLACES)[:, inside]
            made = found.astype(np.float32)
            made -= points.astype(np.float32)[numbers]
            made *= scales.read((slice(None), slice(rows.start, rows.stop))).astype(np.float32)[numbers]
            return made.T

        return module.weight(shape, (codes, zeros, scales), f"AWQ, {BITS} bits in groups of {group}", values, axis=1)
