"""The forms of quantized folders, and what a folder's tensors are with the weights of its quantized modules made."""

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from convert.quantized.awq import AwqForm
from convert.quantized.compressed import CompressedForm
from convert.quantized.fp8 import Fp8Form
from convert.quantized.gptq import GptqForm
from convert.quantized.modules import SCALES, QuantizedModule, QuantizedWeight
from convert.safetensors import Stored, TensorFiles
from domino_jax.errors import DominoError
from domino_jax.fields import OBJECT, TEXT, Fields, as_json

QUANTIZATION: Final = "quantization_config"  # of config.json
MARKS: Final = ("qweight", "weight_packed", "weight_scale_inv")  # of names that no other model has


class QuantizedForm(Protocol):
    """One form, with the settings of one config.json."""

    marks: frozenset[str]  # last parts of the names of tensors that quantized modules have
    spare: frozenset[str]  # likewise, of scales for activations, which are not quantized here

    def weight(self, module: QuantizedModule) -> QuantizedWeight:
        """A module's weight.

        Raises:
            DominoError: tensors are missing, or of another dtype or shape.
        """
        ...


FORMS: Final[dict[str, Callable[[Fields], QuantizedForm]]] = {
    "fp8": Fp8Form,
    "compressed-tensors": CompressedForm,
    "awq": AwqForm,
    "gptq": GptqForm,
}


def quantized_form(where: str, settings: Any) -> QuantizedForm | None:
    """The form that a config.json's quantization_config describes, None where that is null.

    Args:
        where: the file, for errors.

    Raises:
        DominoError: the form or a setting is not supported, or is of another kind.
    """
    if settings is None:
        return None
    if not OBJECT.holds(settings):
        raise DominoError(f"{where} has {QUANTIZATION} {as_json(settings)}; expected {OBJECT.words}.")
    fields = Fields(where, (f"{QUANTIZATION}.", settings), null_is_absent=True)
    method = fields.get("quant_method", TEXT)
    if method not in FORMS:
        raise DominoError(
            f"{where} has {QUANTIZATION}.quant_method {as_json(method)}, which is not supported; {', '.join(FORMS)} "
            "are, and GGUF files."
        )
    return FORMS[method](fields)


def with_weights(form: QuantizedForm, files: TensorFiles) -> dict[str, Stored]:
    """The tensors of a folder by name, those of each quantized module replaced with its weight.

    Raises:
        DominoError: tensors of a module are missing, or of another dtype or shape.
    """
    own = {"weight"} | form.marks | form.spare
    modules: dict[str, dict[str, Stored]] = {}
    for name, stored in files.stored.items():
        module, _, ending = name.rpartition(".")
        if ending in own:
            modules.setdefault(module, {})[ending] = stored
    found = dict(files.stored)
    for name, parts in modules.items():
        if _is_quantized(form, parts):
            weight = form.weight(QuantizedModule(name, parts, files.read))
            for part in parts.values():
                del found[part.name]
            found[weight.name] = weight
    return found


def _is_quantized(form: QuantizedForm, parts: Mapping[str, Stored]) -> bool:
    """Whether the tensors of a module say that it is quantized."""
    return bool(form.marks & parts.keys()) or ("weight" in parts and parts["weight"].dtype not in SCALES)
