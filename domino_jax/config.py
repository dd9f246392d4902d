"""What a model is: frozen dataclasses; `convert.configs` reads them from Hugging Face config.json files.

Axis legend, used in every docstring and einsum of the project:

    B   sequences                    D   model width
    T   query tokens                 N   query heads
    S   cache or context positions   K   KV heads, G = N / K query heads share one
    V   vocabulary                   H   head width
    L   target layers that are read  F   MLP width
    M   draft block length           U   GRU width (GU = its three gates, 3·U)
    J   proposals of a block         R   rank of the head's projection (3R = three of them side by side)
    A   anchors in training          LD  width of the target's features, L·D
    E   experts                      I   MLP width of one expert
    RE  the router's scores of all experts: as many as E, but whole on every device
    NH  query heads side by side, N·H    2   K and V, or gate and up    1   one number, such as a confidence
    DV  the drafter's vocabulary: V, or as many tokens as it can propose; DT the same, whole on every device
    CS, CT, CG  of convolutions: input and output, taps of a filter, what of the filters depends on the input
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from domino_jax.errors import DominoError
from domino_jax.fields import Fields

if TYPE_CHECKING:  # they import this file
    from domino_jax.drafters.convolution import Convolution
    from domino_jax.drafters.heads.base import Head
    from domino_jax.weights import TensorRow

MoeBackend = Literal["grouped", "one by one"]
# Of each family of targets, by its model_type: the name of transformers' model.
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}


CALIBRATION = ("confidence_temperatures", "tree_candidates")  # a drafter's fields that its weights leave open
MarkovHeadType = Literal["vanilla", "gated", "rnn"]  # of DSpark's head; training's settings name it without JAX


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

    def to_hf(self) -> dict[str, Any]:
        """The `rope_scaling` of a config.json."""
        return {"rope_type": "yarn", **asdict(self)}


@dataclass(frozen=True)
class Llama3:
    """RoPE of Llama 3.1 and later, whose slow frequencies are divided; the names are Hugging Face's.

    `layers.divided` says what they do.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise DominoError(
                f"high_freq_factor ({self.high_freq_factor:g}) must be above low_freq_factor "
                f"({self.low_freq_factor:g})."
            )

    def to_hf(self) -> dict[str, Any]:
        """The `rope_scaling` of a config.json."""
        return {"rope_type": "llama3", **asdict(self)}


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

    def to_hf(self) -> dict[str, Any]:
        """Its part of a config.json."""
        fields = asdict(self) | {"mlp_only_layers": list(self.mlp_only_layers)}
        del fields["backend"]
        return fields


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a stack of decoder layers; the field names are Hugging Face's."""

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
    rope_scaling: Yarn | Llama3 | None = field(default=None, kw_only=True)

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

    def hf_fields(self) -> dict[str, Any]:
        """Its part of a config.json."""
        return {
            "model_type": "qwen3",
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            **self.geometry(),
            "rope_scaling": self.rope_scaling.to_hf() if self.rope_scaling else None,
        }

    @property
    def positions(self) -> int:
        """Positions that may be used. Qwen's recipe for YaRN adds `rope_scaling` and leaves max_position_embeddings."""
        yarn = self.rope_scaling
        stretched = round(yarn.factor * yarn.original_max_position_embeddings) if isinstance(yarn, Yarn) else 0
        return max(self.max_position_embeddings, stretched)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every axis letter of the legend that this model has."""
        return {
            "V": self.vocab_size,
            "DV": self.vocab_size,
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
    """A language model: Qwen3, dense or (with `moe`) a mixture of experts; Llama; Qwen2."""

    tie_word_embeddings: bool
    moe: MoeConfig | None = field(default=None, kw_only=True)
    qk_norm: bool = field(default=True, kw_only=True)  # Qwen3's norms of queries and keys
    qkv_bias: bool = field(default=False, kw_only=True)  # Qwen2's biases; those of `attention_bias` are on o too

    def __post_init__(self) -> None:
        super().__post_init__()
        assert not (self.qkv_bias and (self.qk_norm or self.attention_bias)), "no family has these"
        assert self.qk_norm or not self.moe, "no family has these"

    @property
    def family(self) -> str:
        """The kind of model, as config.json's model_type names it."""
        if self.moe:
            return "qwen3_moe"
        return "qwen3" if self.qk_norm else "qwen2" if self.qkv_bias else "llama"

    @property
    def sizes(self) -> dict[str, int]:
        if self.moe is None:
            return super().sizes
        experts = self.moe.num_experts
        return super().sizes | {"E": experts, "RE": experts, "I": self.moe.moe_intermediate_size}

    def is_sparse(self, layer: int) -> bool:
        """Whether that decoder layer has experts."""
        return self.moe is not None and self.moe.is_sparse(layer)

    def to_hf(self) -> dict[str, Any]:
        """The config.json that transformers loads as this model."""
        fields = self.hf_fields() | (self.moe.to_hf() if self.moe else {})
        if self.qkv_bias:
            del fields["attention_bias"]
        return {
            "architectures": [ARCHITECTURES[self.family]],
            **fields,
            "model_type": self.family,
            "tie_word_embeddings": self.tie_word_embeddings,
        }


class Headed(Protocol):
    """What is said of a drafter that may have a head."""

    @property
    def head(self) -> "Head | None": ...


class BlockShape(Protocol):
    """What is said of a drafter whose input is an anchor and masks."""

    @property
    def block_size(self) -> int: ...
    @property
    def mask_token_id(self) -> int: ...


@dataclass(frozen=True)
class DraftConfig(DecoderConfig):
    """A block-parallel drafter: DFlash's backbone, and its head (`domino_jax.drafters.heads`); None is plain DFlash.

    `windows[i]` is the sliding window of layer i in positions, or None for full attention. With `causal` (JetSpec) no
    row of a block sees later ones. In layers with a window none does either, unless `sliding_window_non_causal`: then
    it sees as far ahead as back. With `convolution` (DFlash 2) layers mix each row with those before it. With a
    `draft_vocab_size` (speculators) it proposes only so many tokens of the target's `vocab_size`, by an LM head of its
    own.

    `confidence_temperatures` are J numbers that the logits of its proposals' confidences are divided by; none when
    empty. `tree_candidates` is how many of the highest base logits trees need of each depth, where no other number is
    asked for; all when None. `python -m train calibrate` finds both.
    """

    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    shift_label: bool = False
    head: "Head | None" = None
    windows: tuple[int | None, ...] = field(default=())
    causal: bool = False
    confidence_temperatures: tuple[float, ...] = ()
    sliding_window_non_causal: bool = False
    convolution: "Convolution | None" = None
    draft_vocab_size: int | None = None
    tree_candidates: int | None = None

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
        if self.causal and None not in self.windows:
            object.__setattr__(self, "causal", False)  # it says nothing
        if self.sliding_window_non_causal and not any(self.windows):
            object.__setattr__(self, "sliding_window_non_causal", False)  # nor does it
        if self.sliding_window_non_causal and self.causal:
            raise DominoError("a drafter whose windows see both ways has no causal layers: is_causal is one field.")
        if self.convolution:
            self.convolution.check(self.hidden_size)
        if self.draft_vocab_size == self.vocab_size:
            object.__setattr__(self, "draft_vocab_size", None)  # it says nothing
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size < self.vocab_size:
            raise DominoError(
                f"draft_vocab_size {self.draft_vocab_size} must be from 1 to vocab_size, {self.vocab_size}: the "
                "drafter's tokens are some of the target's."
            )
        outside = [i for i in self.target_layer_ids if not 0 <= i < self.num_target_layers]
        if not self.target_layer_ids or outside:
            raise DominoError(
                f"target_layer_ids {list(self.target_layer_ids)} must name layers 0 to "
                f"{self.num_target_layers - 1} of the target."
            )
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise DominoError(f"mask_token_id {self.mask_token_id} is outside the vocabulary of {self.vocab_size}.")
        if self.head:
            self.head.check(self.num_proposals)
        else:
            object.__setattr__(self, "tree_candidates", None)  # without a head nothing is scored anew
        if self.tree_candidates is not None and self.tree_candidates < 1:
            raise DominoError(f"tree_candidates must be at least 1, found {self.tree_candidates}.")
        given = self.confidence_temperatures
        if given and (len(given) != self.num_proposals or not all(0 < t < math.inf for t in given)):
            raise DominoError(
                f"confidence_temperatures must be {self.num_proposals} numbers above 0, one for each proposal of a "
                f"block, found {list(given)}."
            )

    @property
    def calibration(self) -> dict[str, Any]:
        """What `python -m train calibrate` has found of it, as fields of config.json."""
        found = {name: getattr(self, name) for name in CALIBRATION}
        return {name: list(x) if isinstance(x, tuple) else x for name, x in found.items() if x}

    @property
    def num_proposals(self) -> int:
        """J: the anchor's own row proposes with `shift_label`, and is unused without."""
        return self.block_size if self.shift_label else self.block_size - 1

    @property
    def sizes(self) -> dict[str, int]:
        own = {"LD": len(self.target_layer_ids) * self.hidden_size}
        if self.draft_vocab_size is not None:
            own |= {"DV": self.draft_vocab_size, "DT": self.draft_vocab_size}
        own |= self.convolution.sizes(self.hidden_size) if self.convolution else {}
        return super().sizes | own | (self.head.sizes if self.head else {})

    def to_hf(self) -> dict[str, Any]:
        """The config.json of the public drafters for this model."""
        draft: dict[str, Any] = {
            "mask_token_id": self.mask_token_id,
            "target_layer_ids": list(self.target_layer_ids),
            "shift_label": self.shift_label,
        }
        top: dict[str, Any] = {}
        if self.causal:
            draft |= {"causal_head": True, "causal": True}  # JetSpec's name and vLLM's
        if self.head:
            nested, top = self.head.to_hf()
            draft |= nested
        elif self.shift_label:
            draft |= {"sample_from_anchor": True}  # without a head other loaders know this by that name alone
        architecture = self.head.architecture if self.head else "DFlashDraftModel"
        if self.convolution:
            draft |= self.convolution.to_hf()
            architecture = "DFlash2DraftModel" if architecture == "DFlashDraftModel" else architecture
        if self.draft_vocab_size is not None:
            top = {**top, "draft_vocab_size": self.draft_vocab_size}
        if self.sliding_window_non_causal:
            top = {**top, "is_causal": False}
        raw = {
            "architectures": [architecture],
            **self.hf_fields(),
            **top,
            "tie_word_embeddings": False,
            "block_size": self.block_size,
            "num_target_layers": self.num_target_layers,
            "layer_types": ["sliding_attention" if w else "full_attention" for w in self.windows],
            "dflash_config": draft,
        }
        raw |= self.calibration
        window = next((w for w in self.windows if w), None)
        return raw | ({"use_sliding_window": True, "sliding_window": window} if window else {})


@dataclass(frozen=True)
class CustomDraftConfig(DecoderConfig, ABC):
    """A drafter whose weights are of its own kind: a subclass says all of them (docs/adding-a-drafter.md).

    The fields of DecoderConfig stand at the top level of its config.json.
    """

    architecture: ClassVar[str]
    """By which its config.json is known: one of `architectures`"""
    tensors: ClassVar[tuple["TensorRow", ...]]
    """Its rows of the table in `convert.names`"""

    @classmethod
    @abstractmethod
    def read(cls, fields: Fields, decoder: dict[str, Any], warnings: list[str]) -> Self:
        """The config of a config.json.

        Args:
            fields: the file's; those that are never asked for become a warning.
            decoder: the fields of DecoderConfig, read.
            warnings: for what had to be guessed.

        Raises:
            DominoError: a field is missing, of another kind, or asks for what is not supported.
        """

    @abstractmethod
    def weights(self, leaf: Callable[[str], Any]) -> Any:
        """The module of its weights, each made by `leaf` from its axis letters."""

    def check_target(self, target: TargetConfig) -> list[str]:
        """Refuse a drafter made for another target; return warnings about settings that merely look wrong.

        Raises:
            DominoError: width or vocabulary differ.
        """
        _refuse_other_target(target, self)
        return []

    def describe(self) -> str:
        """The drafter in a line."""
        return f"{self.architecture}: width {self.hidden_size}, vocabulary {self.vocab_size}"


def default_target_layer_ids(num_target_layers: int, num_draft_layers: int) -> tuple[int, ...]:
    """The target layers that a drafter reads whose config.json does not list them (docs/algorithm.md, section 2).

    The order of operations is that of z-lab's DFlash code: another one rounds differently for some depths.
    """
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    span = num_target_layers - 4
    return tuple(round(1 + i * span / (num_draft_layers - 1)) for i in range(num_draft_layers))


def choose_target_layer_ids(num_target_layers: int, num_draft_layers: int) -> tuple[int, ...]:
    """The target layers that a drafter trained here reads: those of the public formula, in a shallow target fewer.

    The target's last layer is none of them, unless it is its only one: other engines can't take its output.
    """
    target_layer_ids = default_target_layer_ids(num_target_layers, num_draft_layers)
    if num_target_layers >= 4:
        return target_layer_ids
    return tuple(sorted({max(0, min(i, num_target_layers - 2)) for i in target_layer_ids}))


def last_layer_warning(target_layer_ids: Sequence[int], num_target_layers: int) -> list[str]:
    """A warning, if a drafter reads its target's last layer."""
    last = num_target_layers - 1
    if last not in target_layer_ids:
        return []
    return [
        f"target_layer_ids {list(target_layer_ids)} name the target's last layer, {last}, whose output other engines "
        "can't give to a drafter: they can't serve this one."
    ]


def check_pair(target: TargetConfig, draft: DraftConfig | CustomDraftConfig) -> list[str]:
    """Refuse a drafter made for another target; return warnings about settings that merely look wrong.

    Raises:
        DominoError: width, vocabulary or number of layers differ.
    """
    if isinstance(draft, CustomDraftConfig):
        return draft.check_target(target)
    _refuse_other_target(target, draft, ("number of layers", target.num_hidden_layers, draft.num_target_layers))
    warnings = []
    if target.rope_theta != draft.rope_theta:
        warnings.append(
            f"the drafter's rope_theta ({draft.rope_theta:g}) differs from the target's ({target.rope_theta:g}); "
            "acceptance may be low."
        )
    if target.rope_scaling != draft.rope_scaling:
        ours, theirs = (config.rope_scaling or "none" for config in (target, draft))
        warnings.append(
            f"the drafter's rope_scaling ({theirs}) differs from the target's ({ours}); acceptance may be low."
        )
    return warnings


def _refuse_other_target(target: TargetConfig, draft: DecoderConfig, *more: tuple[str, int, int]) -> None:
    for label, ours, theirs in (
        ("hidden_size", target.hidden_size, draft.hidden_size),
        ("vocab_size", target.vocab_size, draft.vocab_size),
        *more,
    ):
        if ours != theirs:
            raise DominoError(
                f"the drafter was made for another target: its target's {label} is {theirs}, this target's is {ours}; "
                "give the drafter that belongs to this target with --draft, or --draft none."
            )
