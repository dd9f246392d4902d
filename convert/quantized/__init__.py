"""Quantized Hugging Face folders: which stored tensors make a weight, and the weight, in four forms.

A config.json's `quantization_config` names the form and its settings; which modules are quantized, their tensors tell.
A weight's values are those of its codes, scales and zero points in float32, made part by part as they are read.
"""

from convert.quantized.forms import (
    MARKS,
    QUANTIZATION,
    QuantizedForm,
    quantized_form,
    with_weights,
)

__all__ = ["MARKS", "QUANTIZATION", "QuantizedForm", "quantized_form", "with_weights"]
