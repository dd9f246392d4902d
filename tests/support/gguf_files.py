"""GGUF files of tiny models, written by the gguf package: names, layouts and blocks are its own and llama.cpp's."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import factory
import gguf
import numpy as np
from gguf.constants import MODEL_ARCH, GGMLQuantizationType

from domino_jax.config import Llama3, TargetConfig, Yarn

ARCHITECTURES = {
    "qwen3": MODEL_ARCH.QWEN3,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
    "qwen2": MODEL_ARCH.QWEN2,
    "llama": MODEL_ARCH.LLAMA,
}
F32 = GGMLQuantizationType.F32
CONTROL = 3
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
NO_TOKENIZER: Mapping[str, Any] = {}


def byte_tokenizer() -> dict[str, Any]:
    """The metadata of `factory.make_tokenizer`'s tokenizer, a token for each byte, and of one token more."""
    vocabulary = factory.make_tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), "QZ"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if token in factory.SPECIALS else 1 for token in tokens],
        "tokenizer.ggml.merges": ["Q Z"],
        "tokenizer.ggml.eos_token_id": factory.CHAT_END_ID,
        "tokenizer.ggml.bos_token_id": factory.END_ID,
        "tokenizer.chat_template": TEMPLATE,
    }


def write_gguf(
    file: Path,
    config: TargetConfig,
    tensors: Mapping[str, np.ndarray],
    kind: Callable[[str], GGMLQuantizationType] = lambda name: F32,
    tokenizer: Mapping[str, Any] = NO_TOKENIZER,
    **changes: Any,
) -> Path:
    """Write a model as llama.cpp's conversion does.

    Args:
        tensors: by Hugging Face's names.
        kind: of the blocks of a matrix, by its name there.
        changes: to the metadata, by name without the architecture ("__" for a point); None leaves one out.
    """
    architecture = ARCHITECTURES[config.family]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    said = metadata(config) | {name.replace("__", "."): value for name, value in changes.items()}
    for name, value in said.items():
        if value is not None:
            _add(writer, f"{writer.arch}.{name}", value)
    for name, value in tokenizer.items():
        _add(writer, name, value)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in _as_llama_cpp(config, tensors).items():
        theirs = names.get_name(name, (".weight", ".bias"))
        assert theirs is not None, name
        of = kind(theirs) if tensor.ndim > 1 else F32
        if of == F32:
            writer.add_tensor(theirs, np.ascontiguousarray(tensor))
        else:
            writer.add_tensor(theirs, gguf.quants.quantize(np.ascontiguousarray(tensor), of), raw_dtype=of)
    if isinstance(config.rope_scaling, Llama3):
        writer.add_tensor("rope_freqs.weight", divisors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def metadata(config: TargetConfig) -> dict[str, Any]:
    """What llama.cpp's conversion says of a model, after the architecture's name."""
    said: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    if config.moe:
        said |= {
            "expert_count": config.moe.num_experts,
            "expert_used_count": config.moe.num_experts_per_tok,
            "expert_feed_forward_length": config.moe.moe_intermediate_size,
        }
    if isinstance(config.rope_scaling, Yarn):
        said |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": config.rope_scaling.factor,
            "rope.scaling.original_context_length": config.rope_scaling.original_max_position_embeddings,
        }
    return said


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](name, value)


def _as_llama_cpp(config: TargetConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts as one tensor a layer, and Llama's q and k with their rows as llama.cpp's kernels rotate them."""
    made: dict[str, np.ndarray] = {}
    experts: dict[str, list[np.ndarray]] = {}
    for name, tensor in tensors.items():
        if ".experts." in name:
            before, after = name.split(".experts.")
            number, after = after.split(".", 1)
            together = experts.setdefault(f"{before}.experts.{after}", [])
            assert len(together) == int(number)
            together.append(tensor)
            continue
        if config.family == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            shape = tensor.shape
            tensor = tensor.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        made[name] = tensor
    return made | {name: np.stack(parts) for name, parts in experts.items()}


def divisors(config: TargetConfig) -> np.ndarray:
    """Llama 3.1's divisor of each frequency, as llama.cpp's conversion computes them."""
    scaling = config.rope_scaling
    assert isinstance(scaling, Llama3)
    found = []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * np.pi * config.rope_theta ** (i / config.head_dim)
        if wavelength < scaling.original_max_position_embeddings / scaling.high_freq_factor:
            found.append(1.0)
        elif wavelength > scaling.original_max_position_embeddings / scaling.low_freq_factor:
            found.append(scaling.factor)
        else:
            smooth = scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            found.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(found, np.float32)
