"""A config.json from the metadata of a GGUF file; what it does not say as one is refused by its name."""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from convert.configs import EXPERTS, LAYERS, SIZE
from convert.gguf.container import Header
from convert.gguf.tensors import FREQUENCIES, packed
from convert.safetensors import Stored
from domino_jax.config import ARCHITECTURES
from domino_jax.errors import DominoError
from domino_jax.fields import Fields, as_json, integer, number, one_of

FAMILIES: Final = {"qwen3": "qwen3", "qwen3moe": "qwen3_moe", "qwen2": "qwen2", "llama": "llama"}  # and model_type
# What others of these files have, and the values with which it changes nothing here; None stands for any.
NEUTRAL: Final[dict[str, tuple[Any, ...] | None]] = {
    "vocab_size": None,  # that of the embeddings counts
    "tensor_data_layout": None,
    "rope.scaling.finetuned": None,
    "attention.causal": (True,),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0, 1),
    "expert_gating_func": (1,),  # softmax
    "leading_dense_block_count": (0,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1,),
}
LLAMA3_FACTORS: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def config_json(header: Header, tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """The config.json of the model in a GGUF file.

    Args:
        tensors: of the model, by Hugging Face's names.

    Raises:
        DominoError: the architecture, or a setting that would change the result, is not supported; or one is missing.
    """
    where, architecture = str(header.file), header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise DominoError(
            f"{where} has general.architecture {as_json(architecture)}; {', '.join(FAMILIES)} are supported."
        )
    prefix = f"{architecture}."
    said = {name.removeprefix(prefix): x for name, x in header.metadata.items() if name.startswith(prefix)}
    fields, family = Fields(where, (prefix, said)), FAMILIES[architecture]
    embeddings = tensors.get("model.embed_tokens.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise DominoError(f"{where} has no table token_embd.weight of embeddings.")
    heads, width = fields.get("attention.head_count", SIZE), fields.get("embedding_length", SIZE)
    kv_heads = fields.get("attention.head_count_kv", SIZE, heads)
    head_dim = fields.get("attention.key_length", SIZE, width // heads)
    for same in ("attention.value_length", "rope.dimension_count"):
        if fields.get(same, SIZE, head_dim) != head_dim:
            raise DominoError(f"{where} has {prefix}{same} {said[same]}, which is supported as {head_dim} alone.")
    made: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_act": "silu",
        "vocab_size": embeddings.shape[0],
        "hidden_size": width,
        "num_hidden_layers": fields.get("block_count", LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": _short(fields.get("attention.layer_norm_rms_epsilon", number(above=0))),
        "rope_theta": _short(fields.get("rope.freq_base", number(above=1), 1e4)),
        "rope_scaling": _yarn(fields),
        "max_position_embeddings": fields.get("context_length", SIZE),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    if family != "qwen2":
        made["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in tensors
    experts = fields.get("expert_count", integer(), 0)
    if family == "qwen3_moe":
        made |= {
            "num_experts": fields.get("expert_count", EXPERTS),
            "num_experts_per_tok": fields.get("expert_used_count", SIZE),
            "moe_intermediate_size": fields.get("expert_feed_forward_length", SIZE),
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        # Of no layer here; a file may leave it out.
        made["intermediate_size"] = fields.get("feed_forward_length", SIZE, made["moe_intermediate_size"])
    else:
        if experts:
            raise DominoError(
                f"{where} has {prefix}expert_count {experts}; {architecture} is supported without experts."
            )
        fields.get("expert_used_count", integer(), 0)
        made["intermediate_size"] = fields.get("feed_forward_length", SIZE)
    _refuse_others(fields)
    rates = next((place for place in header.places if place.name == FREQUENCIES), None)
    if rates is not None:
        made["rope_scaling"] = _llama3(packed(header, rates), made)
    return made


def _refuse_others(fields: Fields) -> None:
    for label, name in fields.unread():
        value = dict(fields.given(name))[label]
        neutral = NEUTRAL.get(name, ())
        if neutral is not None and value not in neutral:
            raise DominoError(f"{fields.where} has {label} {as_json(value)}, which is not supported.")


def _short(value: float) -> float:
    """A number that is stored as float32, as the shortest that is the same there: 1e-05 and not 9.9999997e-06."""
    return float(str(np.float32(value)))


def _yarn(fields: Fields) -> dict[str, Any] | None:
    if fields.get("rope.scaling.type", one_of("none", "yarn"), "none") == "none":
        fields.get("rope.scaling.factor", number(), 1)  # of nothing
        return None
    made = {
        "rope_type": "yarn",
        "factor": _short(fields.get("rope.scaling.factor", number(least=1))),
        "original_max_position_embeddings": fields.get("rope.scaling.original_context_length", SIZE),
    }
    for name in ("beta_fast", "beta_slow"):
        given = fields.get(f"rope.scaling.yarn_{name}", number(above=0), None)
        made |= {} if given is None else {name: _short(given)}
    return made


def _llama3(divisors: Stored, config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3.1's rope_scaling, of which a file has the divisor of each frequency and not the settings.

    Its largest is the factor. The other settings are the same in all of Meta's models: with them the divisors must come
    out as they are in the file.
    """
    found = divisors.read((slice(None),) * len(divisors.shape)).astype(np.float64)
    factor = _short(float(found.max(initial=1)))
    made = {"rope_type": "llama3", "factor": factor, **LLAMA3_FACTORS}
    inverse = config["rope_theta"] ** -(np.arange(0, config["head_dim"], 2) / config["head_dim"])
    low, high = LLAMA3_FACTORS["low_freq_factor"], LLAMA3_FACTORS["high_freq_factor"]
    turns = LLAMA3_FACTORS["original_max_position_embeddings"] * inverse / (2 * math.pi)
    fast = np.clip((turns - low) / (high - low), 0, 1)
    if found.shape != inverse.shape or not np.allclose(1 / found, (1 - fast) / factor + fast, rtol=1e-4, atol=0):
        raise DominoError(
            f"{divisors.file} has {FREQUENCIES}, whose divisors are not those of Llama 3.1 (factor {factor:g}); others "
            "are not supported."
        )
    return made
