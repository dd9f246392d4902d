"""What a model is: frozen dataclasses read from Hugging Face config.json files.

Axis legend, used in every docstring and einsum of the project:

    B   sequences                    D   model width
    T   query tokens                 N   query heads
    S   cache or context positions   K   KV heads, G = N / K query heads share one
    V   vocabulary                   H   head width
    L   tapped target layers         F   MLP width
    M   draft block length           U   GRU width (GU = its three gates, 3·U)
    J   proposals of a block         R   rank of the head's projection (DU = D + U)
    A   anchors in training          LD  width of the target's features, L·D
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from domino_jax.errors import DominoError


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a stack of Qwen3 decoder layers; the field names are Hugging Face's."""

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
    def sizes(self) -> dict[str, int]:
        """Size of every axis letter of the legend that this model has."""
        return {
            "V": self.vocab_size,
            "D": self.hidden_size,
            "N": self.num_attention_heads,
            "K": self.num_key_value_heads,
            "H": self.head_dim,
            "F": self.intermediate_size,
        }


@dataclass(frozen=True)
class TargetConfig(DecoderConfig):
    """A dense Qwen3 language model."""

    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "TargetConfig":
        """Read a parsed config.json of either spelling (SPEC section 2).

        Raises:
            DominoError: a key is missing, or a value would change the result and is not supported.
        """
        what = "the target's config.json"
        if raw.get("model_type") != "qwen3":
            raise DominoError(
                f"{what} has model_type {raw.get('model_type')!r}; only dense Qwen3 models "
                "(model_type 'qwen3') are supported."
            )
        if "sliding_attention" in (raw.get("layer_types") or ()) or raw.get("use_sliding_window"):
            raise DominoError(f"{what} asks for sliding-window attention, which is not supported in a target.")
        return cls(
            **_decoder_fields(raw, what),
            tie_word_embeddings=bool(_get(raw, "tie_word_embeddings", what, default=False)),
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json that transformers loads as this model."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            **_hf_fields(self),
            "tie_word_embeddings": self.tie_word_embeddings,
        }


@dataclass(frozen=True)
class HeadConfig:
    """The causal head (SPEC section 4): GRU width U, rank R, uncorrected prefix P."""

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
            sizes |= {"U": width, "GU": 3 * width, "DU": self.hidden_size + width, "R": self.head.emb_dim}
        return sizes

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], num_target_layers: int | None = None) -> "DraftConfig":
        """Read a drafter's config.json (SPEC sections 3 and 4).

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
    """Tapped target layers of a drafter that does not list them (SPEC section 2)."""
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    step = (num_target_layers - 4) / (num_draft_layers - 1)
    return tuple(round(1 + i * step) for i in range(num_draft_layers))


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
    if target.rope_theta != draft.rope_theta:
        return [
            f"the drafter's rope_theta ({draft.rope_theta:g}) differs from the target's ({target.rope_theta:g}); "
            "acceptance may be low."
        ]
    return []


def _get(raw: Mapping[str, Any], key: str, what: str, **default: Any) -> Any:
    value = raw.get(key, default.get("default"))
    if value is None:
        raise DominoError(f"{what} has no {key}.")
    return value


def _decoder_fields(raw: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The fields of DecoderConfig, after refusing what this implementation would compute wrongly."""
    for key, supported in (("hidden_act", "silu"), ("attention_bias", False), ("quantization_config", None)):
        if raw.get(key, supported) != supported:
            raise DominoError(f"{what} has {key} {raw[key]!r}, which is not supported (expected {supported!r}).")
    rope = raw.get("rope_parameters") or {}
    for spelling in (rope, raw.get("rope_scaling") or {}):
        kind = spelling.get("rope_type", spelling.get("type", "default"))
        if kind != "default":
            raise DominoError(f"{what} has rope type {kind!r}; only 'default' is supported.")
    if any(spelling.get("partial_rotary_factor", 1) != 1 for spelling in (rope, raw)):
        raise DominoError(f"{what} rotates only a part of each head (partial_rotary_factor), which is not supported.")
    whole = [key for key, kind in DecoderConfig.__annotations__.items() if kind is int]
    fields: dict[str, Any] = {key: int(_get(raw, key, what)) for key in whole}
    if any(value < 1 for value in fields.values()):
        raise DominoError(f"{what} has a size below 1: {fields}.")
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    fields["rope_theta"] = float(_get({"rope_theta": theta}, "rope_theta", what))
    fields["rms_norm_eps"] = float(_get(raw, "rms_norm_eps", what))
    return fields


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
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": None,
        **config.geometry(),
    }
