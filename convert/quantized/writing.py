"""Weights quantized for other programs: compressed-tensors' forms, as vLLM reads them.

Scales are those of the library's minmax observers, in the dtype of the weight; codes are rounded by the scale as it is
kept.
"""

from typing import Any, Final, Literal, get_args

import ml_dtypes
import numpy as np

from domino_jax.errors import DominoError

WrittenForm = Literal["fp8", "int8", "int4", "awq-like"]
WRITTEN: Final[tuple[WrittenForm, ...]] = get_args(WrittenForm)
GROUP: Final = 128  # inputs that have a scale together, of the forms of 4 bits
FORMATS: Final = {
    "fp8": "float-quantized",
    "int8": "int-quantized",
    "int4": "pack-quantized",
    "awq-like": "pack-quantized",
}
LARGEST_FP8, HALF = 448.0, 8


class QuantizingWriter:
    """Quantizes the linear layers of a model as they are written.

    The LM head, embeddings, norms and routers stay, and so do matrices whose inputs the groups do not divide.
    """

    def __init__(self, form: WrittenForm):
        self.form: WrittenForm = form
        self.quantized = 0  # matrices so far
        self._ignored = ["lm_head"]

    @property
    def settings(self) -> dict[str, Any]:
        """The quantization_config; what it ignores is known when all is written."""
        packed = FORMATS[self.form] == "pack-quantized"
        weights: dict[str, Any] = {
            "num_bits": 4 if packed else 8,
            "type": "float" if self.form == "fp8" else "int",
            "strategy": "group" if packed else "channel",
            "group_size": GROUP if packed else None,
            "symmetric": self.form != "awq-like",
            "dynamic": False,
        }
        # vLLM's products of 8 bits quantize their inputs too, each token by a scale of its own.
        inputs = {"num_bits": 8, "type": weights["type"], "strategy": "token", "symmetric": True, "dynamic": True}
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None if packed else inputs,
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": FORMATS[self.form],
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": self._ignored,
            "kv_cache_scheme": None,
        }

    def tensors(self, name: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """What is written of a tensor: itself, or what its weight becomes.

        Raises:
            DominoError: a value of it is not finite.
        """
        module = name.removesuffix(".weight")
        if tensor.ndim != 2 or module == name or "layers." not in name:
            return {name: tensor}
        if module.endswith("mlp.gate") or (self.form in ("int4", "awq-like") and tensor.shape[1] % GROUP):
            self._ignored.append(module)
            return {name: tensor}
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise DominoError(f"{name} has values that are not finite, which a quantized form can't hold.")
        self.quantized += 1
        return {f"{module}.{part}": x for part, x in quantize_weight(self.form, tensor).items()}


def quantize_weight(form: WrittenForm, weight: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of a weight [out, in], by the last parts of their names."""
    w = weight.astype(np.float32)
    if form == "fp8":
        scale = _scale(np.abs(w).max(axis=1, keepdims=True), LARGEST_FP8, weight.dtype)
        codes = np.clip(w / scale.astype(np.float32), -LARGEST_FP8, LARGEST_FP8).astype(ml_dtypes.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale}
    if form == "int8":
        scale = _scale(np.abs(w).max(axis=1, keepdims=True), 127.5, weight.dtype)
        codes = np.clip(np.round(w / scale.astype(np.float32)), -128, 127).astype(np.int8)
        return {"weight": codes, "weight_scale": scale}
    groups = w.reshape(len(w), -1, GROUP)
    least, most = (np.minimum(groups.min(axis=2), 0), np.maximum(groups.max(axis=2), 0))
    if form == "int4":
        scale = _scale(np.maximum(-least, most), HALF - 0.5, weight.dtype)
        zeros = np.zeros_like(scale, np.float32)
    else:
        scale = _scale(most - least, 2 * HALF - 1, weight.dtype)
        zeros = np.clip(np.round(-HALF - least / scale.astype(np.float32)), -HALF, HALF - 1)
    codes = np.round(groups / scale.astype(np.float32)[..., None]) + zeros[..., None]
    codes = np.clip(codes, -HALF, HALF - 1).reshape(w.shape)
    made = {
        "weight_packed": pack_words(codes, axis=1),
        "weight_scale": scale,
        "weight_shape": np.array(w.shape, np.int64),
    }
    if form == "awq-like":
        made["weight_zero_point"] = pack_words(zeros, axis=0)
    return made


def _scale(largest: np.ndarray, steps: float, dtype: Any) -> np.ndarray:
    """Scales of so many steps up to the largest; 1 where all is zero. A subnormal one would be divided by."""
    least = float(np.finfo(np.float32).tiny)
    return np.where(largest > 0, np.maximum(largest / steps, least), 1.0).astype(dtype)


def pack_words(codes: np.ndarray, axis: int) -> np.ndarray:
    """Codes from -8 to 7 as 32-bit words along an axis, eight each, the first in the lowest bits, 8 added to each."""
    rows = np.moveaxis(codes, axis, -1).astype(np.int64) + HALF
    padded = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % 8)])
    nibbles = padded.reshape(*rows.shape[:-1], -1, 8).astype(np.uint32)
    words = (nibbles << (4 * np.arange(8, dtype=np.uint32))).sum(axis=-1, dtype=np.uint32)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)
