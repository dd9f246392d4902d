"""FP8 as Qwen and DeepSeek publish it: codes in E4M3, and a scale for each tile, row or matrix."""

from convert.quantized.codes import scaled_codes
from convert.quantized.modules import QuantizedModule, QuantizedWeight
from domino_jax.errors import DominoError
from domino_jax.fields import Fields, integer, listed, one_of

SCALE = ("weight_scale_inv", "weight_scale")  # a multiplier, in spite of the first name
SIZES = listed(integer(1), "a list of integers of at least 1")


class Fp8Form:
    """The form of `quant_method` fp8.

    Raises:
        DominoError: a setting is of another kind, or not supported.
    """

    marks: frozenset[str] = frozenset(SCALE)
    spare: frozenset[str] = frozenset({"input_scale", "output_scale"})

    def __init__(self, fields: Fields):
        fields.get("fmt", one_of("e4m3", "float8_e4m3fn"), None)
        fields.get("activation_scheme", one_of("dynamic", "static"), None)
        block = fields.get("weight_block_size", SIZES, None)
        if block is not None and len(block) != 2:
            raise DominoError(f"{fields.where} has a weight_block_size of {len(block)} sizes, expected two.")
        self.block = block

    def weight(self, module: QuantizedModule) -> QuantizedWeight:
        """A module's weight."""
        named = [ending for ending in SCALE if ending in module.parts]
        module.refuse(*named[1:])
        codes = module.part("weight", ("F8_E4M3",))
        scale = named[0] if named else SCALE[self.block is None]
        if self.block is None:
            return scaled_codes(module, codes, scale, None, "FP8")
        height, width = self.block
        return scaled_codes(module, codes, scale, (height, width), f"FP8 in blocks of {height} by {width}")
