"""A target's config.json (docs/algorithm.md, section 2), and what a drafter's has in common with it.

Every field is read by kind. What would change the result and is not supported is refused.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from convert.quantized import QUANTIZATION, quantized_form
from domino_jax.config import ARCHITECTURES, DecoderConfig, Llama3, MoeConfig, TargetConfig, Yarn
from domino_jax.errors import DominoError
from domino_jax.fields import (
    BOOLEAN,
    INTEGERS,
    OBJECT,
    TEXT,
    TEXTS,
    Fields,
    Kind,
    as_json,
    either,
    integer,
    nullable,
    number,
    one_of,
)

LAYERS: Final = integer(1, 1000)
EXPERTS: Final = integer(1, 4096)
SIZE: Final = integer(1)

# Fields that other models of the same make have, and the values with which they change nothing here. Everything else is
# refused: it would be ignored, and the answer be another than the model's.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "per_layer_config": (None,),
    "quantization_config": (None,),
    "compression_config": (None,),
    "mlp_bias": (None, False),
    "qkv_bias": (None, False),
    "use_qk_norm": (None, True),
    "partial_rotary_factor": (None, 1),
    "rotary_pct": (None, 1),
    "rope_interleave": (None, False),
    "rope_interleaved": (None, False),
    "is_neox_style": (None, True),
    "rope_is_neox_style": (None, True),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1),
    "embedding_scale": (None, 1),
    "embed_scale": (None, 1),
    "input_embedding_scale": (None, 1),
    "scale_emb": (None, 1),
    "scale_depth": (None,),
    "residual_multiplier": (None, 1),
    "lm_head_multiplier": (None, 1),
    "output_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "shared_expert_intermediate_size": (None, 0),
    "n_shared_experts": (None, 0),
    "scoring_func": (None, "softmax"),
    "routed_scaling_factor": (None, 1),
    "n_group": (None, 1),
    "topk_group": (None, 1),
}
CHANGING: Final = re.compile(r"soft_?cap|^dspark_")  # names of more such fields; null, 0 and false change nothing
# Fields that change nothing here, of the kinds that transformers wants: with others it refuses the file, and the
# tokenizer beside it.
DTYPE: Final = Kind(
    'a dtype\'s name, such as "bfloat16"',
    lambda x: type(x) is str and re.fullmatch(r"bfloat16|float(16|32|64|8_\w+)?|half|double", x) is not None,
    str,
)
TOKEN_IDS: Final = either(integer(-1), INTEGERS)
LABELS: Final = Kind(
    "an object of labels by number", lambda x: isinstance(x, Mapping) and all(str(key).isdecimal() for key in x), dict
)
OF_TRANSFORMERS: dict[str, Kind[Any]] = {
    "architectures": nullable(TEXTS),
    "dtype": nullable(DTYPE),
    "torch_dtype": nullable(DTYPE),
    "id2label": nullable(LABELS),
    "num_labels": integer(),
    "initializer_range": number(point=True),
    "attention_dropout": number(),
    "use_cache": BOOLEAN,
    "sliding_window": nullable(integer(-1)),  # of no layer
    "max_window_layers": integer(),
    "output_router_logits": BOOLEAN,
    "router_aux_loss_coef": number(point=True),
    "bos_token_id": nullable(integer(-1)),  # -1 stands for none in some files
    "pad_token_id": nullable(integer(-1)),
    "eos_token_id": nullable(TOKEN_IDS),
}
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
OF_LLAMA: dict[str, Kind[Any]] = {
    "initializer_range": number(least=0, point=True, most=1),
    "pretraining_tp": nullable(integer(-1)),
    "mlp_bias": BOOLEAN,
}
KINDS_OF_ROPE: dict[str, set[str]] = {  # and their settings
    "default": set(),
    "yarn": {*Yarn.__dataclass_fields__, "mscale", "mscale_all_dim"},
    "llama3": {*Llama3.__dataclass_fields__},
}
# What transformers takes where a config.json of this family says nothing.
DEFAULT_THETA: Final = {"llama": 1e4, "qwen2": 1e4}


def read_target_config(raw: Mapping[str, Any], file: Path | None = None) -> TargetConfig:
    """A target's config, from a parsed config.json of either spelling (docs/algorithm.md, section 2).

    Args:
        file: where `raw` is from, for errors.

    Raises:
        DominoError: a field is missing or of another kind, or its value would change the result and is not supported.
    """
    where = str(file or "the target's config.json")
    fields = Fields(where, ("", raw))
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise DominoError(f"{where} has model_type {as_json(kind)}; supported are {', '.join(ARCHITECTURES)}.")
    has_norms = kind.startswith("qwen3")
    refuse_others(where, raw, NEUTRAL | {"use_qk_norm": (None, has_norms)})
    for name, of in (OF_TRANSFORMERS | (OF_LLAMA if kind == "llama" else {})).items():
        fields.get(name, of, None)
    types = fields.get("layer_types", nullable(TEXTS), None)
    if "sliding_attention" in (types or ()) or fields.get("use_sliding_window", BOOLEAN, False):
        raise DominoError(
            f"{where} asks for sliding-window attention (layer_types, use_sliding_window), which is not supported "
            "in a target."
        )
    unknown = set(types or ()) - {"full_attention"}
    if unknown:
        raise DominoError(f"{where} has layer_types {sorted(unknown)}; a target's layers are all full_attention.")
    with said_of(where):
        config = TargetConfig(
            **decoder_fields(fields, kind),
            tie_word_embeddings=fields.get("tie_word_embeddings", BOOLEAN, False),
            moe=_read_moe(fields) if kind == "qwen3_moe" else None,
            qk_norm=has_norms,
            qkv_bias=kind == "qwen2",
        )
    if types is not None and len(types) != config.num_hidden_layers:
        raise DominoError(
            f"{where} has layer_types of {len(types)} layers and num_hidden_layers {config.num_hidden_layers}; they "
            "must be as many."
        )
    return config


def refuse_others(where: str, raw: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse, at any level, what this implementation would compute wrongly.

    The model's own quantization_config is read instead.
    """
    quantized_form(where, raw.get(QUANTIZATION))
    rest = {name: value for name, value in raw.items() if name != QUANTIZATION}
    levels: list[tuple[str, Mapping[str, Any]]] = [("", rest)]
    while levels:
        prefix, level = levels.pop(0)
        for name, value in level.items():
            allowed = neutral.get(name, (False, 0, None) if CHANGING.search(str(name)) else None)
            if allowed is not None and not any(_same(value, one) for one in allowed):
                raise DominoError(
                    f"{where} has {prefix}{name} {as_json(value)}, which is not supported (expected "
                    f"{as_json(allowed[-1])})."
                )
            if isinstance(value, Mapping):
                levels.append((f"{prefix}{name}.", value))


def _same(value: Any, other: Any) -> bool:
    """Whether two values of JSON are the same: 1 is 1.0, and neither is true."""
    return value == other and (type(value) is bool) == (type(other) is bool)


@contextmanager
def said_of(where: str) -> Iterator[None]:
    """What a config itself refuses is said of the file that it is read from."""
    try:
        yield
    except DominoError as error:
        text = str(error)
        raise DominoError(text if where in text else f"{where}: {text}") from None


def decoder_fields(fields: Fields, family: str = "qwen3") -> dict[str, Any]:
    """The fields of DecoderConfig.

    Args:
        family: a model_type. Llama's files may leave out what follows from other fields, and Qwen2's the head's width.
    """
    fields.get("hidden_act", one_of("silu"), "silu")
    read: dict[str, Any] = {
        name: fields.get(name, LAYERS if name == "num_hidden_layers" else SIZE)
        for name, kind in DecoderConfig.__annotations__.items()
        if kind is int and name not in ("head_dim", "num_key_value_heads")
    }
    heads, llama = read["num_attention_heads"], family == "llama"
    kv_heads = fields.get("num_key_value_heads", nullable(SIZE), None) if llama else None
    read["num_key_value_heads"] = kv_heads or (heads if llama else fields.get("num_key_value_heads", SIZE))
    head_dim = fields.get("head_dim", nullable(SIZE), None) if family in DEFAULT_THETA else None
    # transformers wants this of every Llama.
    if read["hidden_size"] % heads and (llama or (head_dim is None and family in DEFAULT_THETA)):
        raise DominoError(
            f"{fields.where} has num_attention_heads {heads}, which does not divide hidden_size {read['hidden_size']}."
        )
    read["head_dim"] = head_dim or (
        read["hidden_size"] // heads if family in DEFAULT_THETA else fields.get("head_dim", SIZE)
    )
    read["rms_norm_eps"] = fields.get("rms_norm_eps", number(above=0, point=True))
    # Qwen2's are where they are, whatever this field says.
    read["attention_bias"] = fields.get("attention_bias", BOOLEAN, False) and family != "qwen2"
    return read | _rope(fields, read["max_position_embeddings"], DEFAULT_THETA.get(family))


def _rope(fields: Fields, max_position_embeddings: int, default_theta: float | None) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` in either spelling: beside each other, or both in rope_parameters."""
    where = fields.where
    spellings = {name: fields.get(name, nullable(OBJECT), None) or {} for name in ("rope_scaling", "rope_parameters")}
    both = spellings["rope_parameters"] | spellings["rope_scaling"]  # transformers lets the second win
    label = next((f"{name}." for name, given in spellings.items() if given), "")
    rope = Fields(where, (label, both), null_is_absent=True)
    kind = rope.get("rope_type" if "rope_type" in both else "type", TEXT, "default")
    if kind not in KINDS_OF_ROPE:
        known = ", ".join(map(as_json, KINDS_OF_ROPE))
        raise DominoError(f"{where} has rope type {as_json(kind)}; {known} are supported.")
    unknown = sorted(both.keys() - ROPE_KEYS - KINDS_OF_ROPE[kind])
    if unknown:
        raise DominoError(
            f"{where} has {unknown[0]} among its RoPE settings, which is not supported with {as_json(kind)}."
        )
    stated = fields.get("rope_theta", number(above=1), None)
    levels = [(f"{name}.", given) for name, given in spellings.items()]
    if stated is not None:
        levels.append(("", {"rope_theta": stated}))
    theta = Fields(where, *levels, null_is_absent=True)
    found = theta.get("rope_theta", number(above=1), default_theta) if default_theta else None
    read: dict[str, Any] = {"rope_theta": found or theta.get("rope_theta", number(above=1))}
    if kind == "default":
        return read
    # transformers lets one beside the settings win.
    positions = fields.get("original_max_position_embeddings", nullable(SIZE), None)
    inside = rope.get("original_max_position_embeddings", SIZE, max_position_embeddings)
    scaled = _read_yarn if kind == "yarn" else _read_llama3
    return read | {"rope_scaling": scaled(rope, positions or inside)}


def _read_llama3(rope: Fields, positions: int) -> Llama3:
    """The settings of Llama 3.1 and later, which are all needed."""
    low, high = (rope.get(name, number(above=0)) for name in ("low_freq_factor", "high_freq_factor"))
    return Llama3(rope.get("factor", number(least=1)), low, high, positions)


def _read_yarn(rope: Fields, positions: int) -> Yarn:
    """YaRN's settings as transformers reads them, its attention factor settled."""
    factor = rope.get("factor", number(least=1))
    stated = rope.get("attention_factor", number(least=0), None)
    scale, all_dim = (rope.get(name, number(), None) for name in ("mscale", "mscale_all_dim"))
    return Yarn(
        factor=factor,
        original_max_position_embeddings=positions,
        attention_factor=_attention_factor(factor, scale, all_dim) if stated is None else stated,
        beta_fast=rope.get("beta_fast", number(above=0), Yarn.beta_fast),
        beta_slow=rope.get("beta_slow", number(above=0), Yarn.beta_slow),
        truncate=rope.get("truncate", BOOLEAN, Yarn.truncate),
    )


def _attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """What cos and sin are multiplied by where a config does not state it."""

    def scaled(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scaled(mscale) / scaled(mscale_all_dim) if mscale and mscale_all_dim else scaled(1.0)


def _read_moe(fields: Fields) -> MoeConfig:
    """A mixture's fields."""
    return MoeConfig(
        # The public files' name, and transformers 5's.
        num_experts=fields.get("num_experts", EXPERTS, also=["num_local_experts"]),
        num_experts_per_tok=fields.get("num_experts_per_tok", SIZE),
        moe_intermediate_size=fields.get("moe_intermediate_size", SIZE),
        norm_topk_prob=fields.get("norm_topk_prob", BOOLEAN),
        decoder_sparse_step=fields.get("decoder_sparse_step", SIZE, 1),
        mlp_only_layers=fields.get("mlp_only_layers", nullable(INTEGERS), None) or (),
    )
