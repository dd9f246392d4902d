"""What a model is: frozen dataclasses read from Hugging Face config.json files.

Axis legend, used in every docstring and einsum of the project:

    B   sequences                    D   model width
    T   query tokens                 N   query heads
    S   cache or context positions   K   KV heads, G = N / K query heads share one
    V   vocabulary                   H   head width
    L   tapped target layers         F   MLP width
    M   draft block length           U   GRU width (GU = its three gates, 3·U)
    J   proposals of a block         R   rank of the head's projection
    A   anchors in training          LD  width of the target's features, L·D
    E   experts                      I   MLP width of one expert
    RE  the router's scores of all experts: as many as E, but whole on every device
    NH  query heads side by side, N·H    2   K and V, or gate and up
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from domino_jax.errors import DominoError

MoeBackend = Literal["grouped", "one by one"]


@dataclass(frozen=True)
class Yarn:
    """RoPE for more positions than a model was trained with (Peng et al. 2023); the names are Hugging Face's.

    `layers.rotary` says what they do.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @classmethod
    def from_hf(cls, rope: Mapping[str, Any], max_position_embeddings: int, what: str) -> "Yarn":
        """Read `rope_scaling` or `rope_parameters` as transformers does, its attention factor settled.

        Raises:
            DominoError: there is no factor, or a value makes no sense.
        """
        factor = float(_get(rope, "factor", what))
        stated, mscale, all_dim = (rope.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
        if stated is None:
            stated = _attention_factor(factor, 1.0)
            if mscale and all_dim:
                stated = _attention_factor(factor, float(mscale)) / _attention_factor(factor, float(all_dim))
        yarn = cls(
            factor=factor,
            original_max_position_embeddings=int(
                rope.get("original_max_position_embeddings") or max_position_embeddings
            ),
            attention_factor=float(stated),
            beta_fast=float(rope.get("beta_fast") or cls.beta_fast),
            beta_slow=float(rope.get("beta_slow") or cls.beta_slow),
            truncate=bool(rope.get("truncate", cls.truncate)),
        )
        for key, least in (("factor", 1), ("original_max_position_embeddings", 1), ("attention_factor", 0)):
            if not least <= getattr(yarn, key) < math.inf:
                raise DominoError(f"{what} has a YaRN {key} of {getattr(yarn, key):g}; the least is {least}.")
        if not math.inf > yarn.beta_fast > 0 < yarn.beta_slow < math.inf:
            raise DominoError(
                f"{what} has a YaRN beta_fast of {yarn.beta_fast:g} and beta_slow of {yarn.beta_slow:g}; both must be "
                "above 0."
            )
        return yarn

    def to_hf(self) -> dict[str, Any]:
        """The `rope_scaling` of a config.json."""
        return {"rope_type": "yarn", **asdict(self)}


def _attention_factor(factor: float, scale: float) -> float:
    """What cos and sin are multiplied by: 0.1 · scale · ln(factor) + 1."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class MoeConfig:
    """Mixture-of-experts MLPs; the field names are Hugging Face's."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    backend: MoeBackend = "grouped"  # how the experts are computed; set for a platform by `moe.resolve_moe_backend`

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"):
            if getattr(self, name) < 1:
                raise DominoError(f"{name} must be at least 1, found {getattr(self, name)}.")
        if self.num_experts_per_tok > self.num_experts:
            raise DominoError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) is more than num_experts ({self.num_experts})."
            )

    def is_sparse(self, layer: int) -> bool:
        """Whether that decoder layer has experts; the others have one MLP of `intermediate_size`."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], what: str) -> "MoeConfig":
        """Read a Qwen3 MoE's config.json.

        Raises:
            DominoError: a key is missing or a value makes no sense.
        """
        experts = raw.get("num_experts", raw.get("num_local_experts"))  # the public files; transformers 5
        return cls(
            num_experts=int(_get({"num_experts": experts}, "num_experts", what)),
            num_experts_per_tok=int(_get(raw, "num_experts_per_tok", what)),
            moe_intermediate_size=int(_get(raw, "moe_intermediate_size", what)),
            norm_topk_prob=bool(_get(raw, "norm_topk_prob", what)),
            decoder_sparse_step=int(_get(raw, "decoder_sparse_step", what, default=1)),
            mlp_only_layers=tuple(int(i) for i in raw.get("mlp_only_layers") or ()),
        )

    def to_hf(self) -> dict[str, Any]:
        """Its part of a config.json."""
        fields = asdict(self) | {"mlp_only_layers": list(self.mlp_only_layers)}
        del fields["backend"]
        return fields


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a stack of Qwen3 decoder layers; the field names are Hugging Face's, `yarn` its `rope_scaling`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    attention_bias: bool = field(default=False, kw_only=True)
    yarn: Yarn | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise DominoError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.head_dim % 2:
            raise DominoError(f"head_dim must be even for RoPE, found {self.head_dim}.")

    def geometry(self, **changes: Any) -> dict[str, Any]:
        """The fields that a target and its drafter share, by name; `changes` replace some."""
        return {name: getattr(self, name) for name in DecoderConfig.__dataclass_fields__} | changes

    @property
    def positions(self) -> int:
        """Positions that may be used. Qwen's recipe for YaRN adds `rope_scaling` and leaves max_position_embeddings."""
        stretched = round(self.yarn.factor * self.yarn.original_max_position_embeddings) if self.yarn else 0
        return max(self.max_position_embeddings, stretched)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every axis letter of the legend that this model has."""
        return {
            "V": self.vocab_size,
            "D": self.hidden_size,
            "N": self.num_attention_heads,
            "K": self.num_key_value_heads,
            "H": self.head_dim,
            "NH": self.num_attention_heads * self.head_dim,
            "2": 2,
            "F": self.intermediate_size,
        }


@dataclass(frozen=True)
class TargetConfig(DecoderConfig):
    """A Qwen3 language model, dense or (with `moe`) a mixture of experts."""

    tie_word_embeddings: bool
    moe: MoeConfig | None = field(default=None, kw_only=True)

    @property
    def sizes(self) -> dict[str, int]:
        if self.moe is None:
            return super().sizes
        experts = self.moe.num_experts
        return super().sizes | {"E": experts, "RE": experts, "I": self.moe.moe_intermediate_size}

    def is_sparse(self, layer: int) -> bool:
        """Whether that decoder layer has experts."""
        return self.moe is not None and self.moe.is_sparse(layer)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "TargetConfig":
        """Read a parsed config.json of either spelling (docs/algorithm.md, section 2).

        Raises:
            DominoError: a key is missing, or a value would change the result and is not supported.
        """
        what = "the target's config.json"
        kind = raw.get("model_type")
        if kind not in ("qwen3", "qwen3_moe"):
            raise DominoError(
                f"{what} has model_type {kind!r}; Qwen3 models (model_type 'qwen3' and 'qwen3_moe') are supported."
            )
        if "sliding_attention" in (raw.get("layer_types") or ()) or raw.get("use_sliding_window"):
            raise DominoError(
                f"{what} asks for sliding-window attention (layer_types, use_sliding_window), which is not supported "
                "in a target."
            )
        unknown = set(raw.get("layer_types") or ()) - {"full_attention"}
        if unknown:
            raise DominoError(f"{what} has layer_types {sorted(unknown)}; a target's layers are all full_attention.")
        return cls(
            **_decoder_fields(raw, what),
            tie_word_embeddings=bool(_get(raw, "tie_word_embeddings", what, default=False)),
            moe=MoeConfig.from_hf(raw, what) if kind == "qwen3_moe" else None,
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json that transformers loads as this model."""
        return {
            "architectures": ["Qwen3MoeForCausalLM" if self.moe else "Qwen3ForCausalLM"],
            **_hf_fields(self),
            **({"model_type": "qwen3_moe", **self.moe.to_hf()} if self.moe else {}),
            "tie_word_embeddings": self.tie_word_embeddings,
        }


@dataclass(frozen=True)
class HeadConfig:
    """The causal head (docs/algorithm.md, section 4): GRU width U, rank R, uncorrected prefix P."""

    gru_hidden_dim: int
    emb_dim: int
    pure_draft_prefix_len: int = 0


@dataclass(frozen=True)
class DraftConfig(DecoderConfig):
    """A block-parallel drafter: plain DFlash where `head` is None, Domino where it is not.

    `windows[i]` is the sliding window of layer i in positions, or None for full attention.
    """

    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    shift_label: bool = False
    head: HeadConfig | None = None
    windows: tuple[int | None, ...] = field(default=())

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_hidden_layers)
        if len(self.windows) != self.num_hidden_layers:
            raise DominoError(
                f"the drafter's layer_types names {len(self.windows)} layers, "
                f"its num_hidden_layers is {self.num_hidden_layers}."
            )
        if any(window is not None and window < 1 for window in self.windows):
            raise DominoError(f"the drafter's sliding_window must be at least 1, found {self.windows}.")
        if self.num_proposals < 1:
            raise DominoError(
                f"block_size {self.block_size} with shift_label {self.shift_label} proposes nothing; "
                "block_size must be at least 2 (1 with shift_label)."
            )
        outside = [i for i in self.target_layer_ids if not 0 <= i < self.num_target_layers]
        if not self.target_layer_ids or outside:
            raise DominoError(
                f"target_layer_ids {list(self.target_layer_ids)} must name layers 0 to "
                f"{self.num_target_layers - 1} of the target."
            )
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise DominoError(f"mask_token_id {self.mask_token_id} is outside the vocabulary of {self.vocab_size}.")
        if self.head and not 0 <= self.head.pure_draft_prefix_len < self.num_proposals:
            raise DominoError(
                f"pure_draft_prefix_len must be from 0 to {self.num_proposals - 1} "
                f"(one less than the proposals of a block), found {self.head.pure_draft_prefix_len}."
            )

    @property
    def num_proposals(self) -> int:
        """J: the anchor's own row proposes with `shift_label`, and is unused without."""
        return self.block_size if self.shift_label else self.block_size - 1

    @property
    def sizes(self) -> dict[str, int]:
        sizes = {**super().sizes, "LD": len(self.target_layer_ids) * self.hidden_size}
        if self.head:
            width = self.head.gru_hidden_dim
            sizes |= {"U": width, "GU": 3 * width, "R": self.head.emb_dim}
        return sizes

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], num_target_layers: int | None = None) -> "DraftConfig":
        """Read a drafter's config.json (docs/algorithm.md, sections 3 and 4).

        Args:
            raw: the parsed file; block_size at top level, the rest under `dflash_config`.
            num_target_layers: the target's depth, for files that do not state it.

        Raises:
            DominoError: a key is missing, or a value would change the result and is not supported.
        """
        what = "the drafter's config.json"
        draft = raw.get("dflash_config")
        if not isinstance(draft, Mapping):
            raise DominoError(f"{what} has no dflash_config; this is not a DFlash or Domino drafter.")
        if raw.get("model_type") == "qwen3_moe" or raw.get("num_experts") or raw.get("num_local_experts"):
            raise DominoError(f"{what} asks for experts (num_experts); a drafter's layers are dense.")
        fields = _decoder_fields(raw, what)
        layers = fields["num_hidden_layers"]
        depth = raw.get("num_target_layers") or num_target_layers
        if depth is None:
            raise DominoError(f"{what} has no num_target_layers and no target was given to take it from.")
        taps = draft.get("target_layer_ids")
        projector = draft.get("projector_type")
        if projector not in (None, "domino"):
            raise DominoError(
                f"{what} has projector_type {projector!r}; 'domino' and none (plain DFlash) are supported."
            )
        head = None
        if projector == "domino":
            head = HeadConfig(
                gru_hidden_dim=int(_get(draft, "gru_hidden_dim", what)),
                emb_dim=int(_get(draft, "emb_dim", what)),
                pure_draft_prefix_len=int(draft.get("pure_draft_prefix_len") or 0),
            )
        return cls(
            **fields,
            block_size=int(_get(raw, "block_size", what)),
            mask_token_id=int(_get(draft, "mask_token_id", what)),
            target_layer_ids=default_taps(depth, layers) if taps is None else tuple(int(i) for i in taps),
            num_target_layers=int(depth),
            shift_label=bool(draft.get("shift_label", False)),
            head=head,
            windows=_windows(raw, layers, what),
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json of the public drafters for this model."""
        draft: dict[str, Any] = {
            "mask_token_id": self.mask_token_id,
            "target_layer_ids": list(self.target_layer_ids),
            "shift_label": self.shift_label,
        }
        if self.head:
            draft |= {
                "projector_type": "domino",
                "gru_hidden_dim": self.head.gru_hidden_dim,
                "emb_dim": self.head.emb_dim,
                "pure_draft_prefix_len": self.head.pure_draft_prefix_len,
            }
        raw = {
            "architectures": ["DominoDraftModel" if self.head else "DFlashDraftModel"],
            **_hf_fields(self),
            "tie_word_embeddings": False,
            "block_size": self.block_size,
            "num_target_layers": self.num_target_layers,
            "layer_types": ["sliding_attention" if w else "full_attention" for w in self.windows],
            "dflash_config": draft,
        }
        window = next((w for w in self.windows if w), None)
        return raw | ({"use_sliding_window": True, "sliding_window": window} if window else {})


def default_taps(num_target_layers: int, num_draft_layers: int) -> tuple[int, ...]:
    """The target layers that a drafter reads whose config.json does not list them (docs/algorithm.md, section 2).

    The order of operations is that of z-lab's DFlash code: another one rounds differently for some depths.
    """
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    span = num_target_layers - 4
    return tuple(round(1 + i * span / (num_draft_layers - 1)) for i in range(num_draft_layers))


def check_pair(target: TargetConfig, draft: DraftConfig) -> list[str]:
    """Refuse a drafter made for another target; return warnings about settings that merely look wrong.

    Raises:
        DominoError: width, vocabulary or number of layers differ.
    """
    for label, ours, theirs in (
        ("hidden_size", target.hidden_size, draft.hidden_size),
        ("vocab_size", target.vocab_size, draft.vocab_size),
        ("number of layers", target.num_hidden_layers, draft.num_target_layers),
    ):
        if ours != theirs:
            raise DominoError(
                f"the drafter was made for another target: its target's {label} is {theirs}, this target's is {ours}; "
                "give the drafter that belongs to this target with --draft, or --draft none."
            )
    warnings = []
    if target.rope_theta != draft.rope_theta:
        warnings.append(
            f"the drafter's rope_theta ({draft.rope_theta:g}) differs from the target's ({target.rope_theta:g}); "
            "acceptance may be low."
        )
    if target.yarn != draft.yarn:
        ours, theirs = (f"YaRN, {config.yarn}" if config.yarn else "none" for config in (target, draft))
        warnings.append(
            f"the drafter's rope_scaling ({theirs}) differs from the target's ({ours}); acceptance may be low."
        )
    return warnings


def _get(raw: Mapping[str, Any], key: str, what: str, **default: Any) -> Any:
    value = raw.get(key, default.get("default"))
    if value is None:
        raise DominoError(f"{what} has no {key}.")
    return value


# Fields that other models of the same make have, and the values with which they change nothing here. Everything else is
# refused: it would be ignored, and the answer be another than the model's.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "compression_config": (None,),
    "mlp_bias": (None, False),
    "qkv_bias": (None, False),
    "use_qk_norm": (None, True),
    "partial_rotary_factor": (None, 1),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "shared_expert_intermediate_size": (None, 0),
    "n_shared_experts": (None, 0),
    "scoring_func": (None, "softmax"),
    "routed_scaling_factor": (None, 1),
    "n_group": (None, 1),
    "topk_group": (None, 1),
}
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
YARN_KEYS = {*Yarn.__dataclass_fields__, "mscale", "mscale_all_dim"}


def _decoder_fields(raw: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The fields of DecoderConfig, after refusing what this implementation would compute wrongly."""
    for key, neutral in NEUTRAL.items():
        if key in raw and raw[key] not in neutral:
            raise DominoError(f"{what} has {key} {raw[key]!r}, which is not supported (expected {neutral[-1]!r}).")
    whole = [key for key, kind in DecoderConfig.__annotations__.items() if kind is int]
    fields: dict[str, Any] = {key: int(_get(raw, key, what)) for key in whole}
    if any(value < 1 for value in fields.values()):
        raise DominoError(f"{what} has a size below 1: {fields}.")
    fields["rms_norm_eps"] = float(_get(raw, "rms_norm_eps", what))
    fields["attention_bias"] = bool(raw.get("attention_bias"))
    return fields | _rope(raw, fields["max_position_embeddings"], what)


def _rope(raw: Mapping[str, Any], max_position_embeddings: int, what: str) -> dict[str, Any]:
    """`rope_theta` and `yarn`, in either spelling: rope_scaling beside rope_theta, or both in rope_parameters."""
    rope = dict(raw.get("rope_parameters") or {}) | dict(raw.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise DominoError(f"{what} has rope type {kind!r}; 'default' and 'yarn' are supported.")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise DominoError(f"{what} rotates only a part of each head (partial_rotary_factor), which is not supported.")
    unknown = sorted(rope.keys() - ROPE_KEYS - (YARN_KEYS if kind == "yarn" else set()))
    if unknown:
        raise DominoError(f"{what} has {unknown[0]} among its RoPE settings, which is not supported with {kind!r}.")
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    theta = float(_get({"rope_theta": theta}, "rope_theta", what))
    if not 1 < theta < math.inf:
        raise DominoError(f"{what} has a rope_theta of {theta:g}; it must be above 1.")
    if kind == "default":
        return {"rope_theta": theta}
    if raw.get("original_max_position_embeddings"):  # transformers lets one beside the settings win
        rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    return {"rope_theta": theta, "yarn": Yarn.from_hf(rope, max_position_embeddings, what)}


def _windows(raw: Mapping[str, Any], layers: int, what: str) -> tuple[int | None, ...]:
    kinds = raw.get("layer_types")
    if not kinds:
        # As transformers fills in a list that is not there.
        first = int(_get(raw, "max_window_layers", what, default=28)) if raw.get("use_sliding_window") else layers
        kinds = ["full_attention"] * min(first, layers) + ["sliding_attention"] * max(layers - first, 0)
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise DominoError(
            f"{what} has layer_types {sorted(unknown)}; full_attention and sliding_attention are supported."
        )
    return tuple(int(_get(raw, "sliding_window", what)) if kind == "sliding_attention" else None for kind in kinds)


def _hf_fields(config: DecoderConfig) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_scaling": config.yarn.to_hf() if config.yarn else None,
        **{name: value for name, value in config.geometry().items() if name != "yarn"},
    }
