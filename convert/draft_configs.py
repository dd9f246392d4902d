"""A drafter's config.json, in the layouts of the public ones (docs/algorithm.md, sections 3 and 4).

A field stands in `dflash_config`, or at top level, or in both alike. What the file does not state and had to be
guessed, and fields that are not known here, are warnings.
"""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from convert.configs import CHANGING, LAYERS, NEUTRAL, OF_TRANSFORMERS, SIZE, decoder_fields, refuse_others, said_of
from convert.speculators import SPECULATORS, from_speculators, is_speculators
from domino_jax.config import CustomDraftConfig, DraftConfig, default_target_layer_ids, last_layer_warning
from domino_jax.drafters.heads import HEADS
from domino_jax.drafters.heads.base import Head
from domino_jax.drafters.heads.none import NoHead
from domino_jax.errors import DominoError
from domino_jax.fields import BOOLEAN, INTEGERS, OBJECT, TEXTS, Fields, as_json, integer, listed, one_of

Custom = TypeVar("Custom", bound=CustomDraftConfig)
NESTED: Final = "dflash_config"
# Any of them makes a config.json a drafter's.
DRAFTER_FIELDS: Final = (NESTED, "block_size", "num_target_layers", "target_layer_ids", *SPECULATORS)
TARGET_LAYER_IDS: Final = ("target_layer_ids", "layer_ids")  # one setting, by two names
ARCHITECTURES: Final = ("DFlashDraftModel", "DominoDraftModel")  # the field's name, and the first Domino files'
# Fields of other drafters on the same backbone, and the values with which they change nothing.
NEUTRAL_IN_A_DRAFTER: Final[dict[str, tuple[Any, ...]]] = {
    "attention_sink": (None, False),
    "attention_sink_bias": (None, False),
    "add_swa_attention_sink_bias": (None, False),
    "swa_attention_sink_enabled": (None, False),
    "attention_value_scale": (None, 1),
    "use_aux_hidden_state": (None, True),
    "draft_shift": (None, False),
    "markov_rank": (None, 0),
    "enable_confidence_head": (None, False),
    "use_confidence_head": (None, False),
    "conv_kernel_size": (None, 0),
    "conv_group_size": (None, 0),
    "selector_rank": (None, 0),
    "selector_top_k": (None, 0),
    "draft_adapter_rank": (None, 0),
}
# Fields that change nothing: transformers' own, and notes about the training.
INERT: Final = {
    *OF_TRANSFORMERS,
    *("transformers_version", "output_hidden_states", "return_dict", "is_encoder_decoder", "chunk_size_feed_forward"),
    *("label2id", "model_type", "tie_word_embeddings", "auto_map", "name_or_path", "_name_or_path", "_commit_hash"),
    *("attn_implementation", "_attn_implementation", "pretraining_tp", "output_attentions", "torchscript"),
    *("use_bfloat16", "pruned_heads", "is_decoder", "add_cross_attention", "cross_attention_hidden_size"),
    *("tie_encoder_decoder", "finetuning_task", "task_specific_params", "problem_type"),
    *("tokenizer_class", "prefix", "sep_token_id", "decoder_start_token_id", "mask_token"),
    *("num_anchors", "max_anchors", "lambda_base_start", "lambda_base_decay_ratio"),
}
LAYER_TYPES: Final = listed(
    one_of("full_attention", "sliding_attention"), 'a list of "full_attention" and "sliding_attention"'
)


class DrafterFile(NamedTuple):
    """A drafter's config.json as it was read."""

    config: DraftConfig
    warnings: list[str]  # what had to be guessed, and fields that are not known here


def is_drafter(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is a drafter's, of whatever kind."""
    names = raw.get("architectures")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return any(name in raw for name in DRAFTER_FIELDS) or any("Draft" in n or "Speculator" in n for n in names)


def read_draft_config(
    raw: Mapping[str, Any], num_target_layers: int | None = None, file: Path | None = None
) -> DrafterFile:
    """A drafter's config from a parsed config.json, and warnings.

    Args:
        num_target_layers: the target's depth, for files that do not state it.
        file: where `raw` is from, for errors.

    Raises:
        DominoError: a field is missing, of another kind, or given twice with different values; or its value would
            change the result and is not supported.
    """
    where = str(file or "the drafter's config.json")
    if not is_drafter(raw):
        raise DominoError(f"{where} has no dflash_config and no block_size; this is not a DFlash or Domino drafter.")
    warnings: list[str] = []
    if is_speculators(raw):
        raw, warnings = from_speculators(raw, where)
    _refuse_other_drafters(where, raw)
    nested = Fields(where, ("", raw), null_is_absent=True).get(NESTED, OBJECT, {})
    refuse_others(where, raw, NEUTRAL | NEUTRAL_IN_A_DRAFTER)
    fields = Fields(where, (f"{NESTED}.", nested), ("", raw), null_is_absent=True)
    with said_of(where):
        config, guesses = _read_draft(fields, num_target_layers)
    warnings += guesses
    _check_directions(fields, config)
    known = INERT | NEUTRAL.keys() | NEUTRAL_IN_A_DRAFTER.keys() | {NESTED}
    return DrafterFile(config, warnings + _unread(fields, known))


def read_custom_config(
    kind: type[Custom], raw: Mapping[str, Any], file: Path | None = None
) -> tuple[Custom, list[str]]:
    """The config of a drafter whose own file says how it is read, and warnings.

    Raises:
        DominoError: see `read_draft_config`.
    """
    where, warnings = str(file or "the drafter's config.json"), []
    refuse_others(where, raw, NEUTRAL)
    fields = Fields(where, ("", raw), null_is_absent=True)
    with said_of(where):
        config = kind.read(fields, decoder_fields(fields), warnings)
    return config, warnings + _unread(fields, INERT | NEUTRAL.keys())


def export_warnings(
    raw: Mapping[str, Any], num_target_layers: int | None = None, file: Path | None = None
) -> list[str]:
    """What to know of a drafter's config.json before others are given it: see `read_draft_config`.

    Besides its warnings: whether it reads the target's last layer, where the target's depth is known.
    """
    config, warnings = read_draft_config(raw, num_target_layers or least_depth(raw), file)
    known = num_target_layers is not None or any(level.get("num_target_layers") for level in _levels(raw))
    return warnings + (last_layer_warning(config.target_layer_ids, config.num_target_layers) if known else [])


def least_depth(raw: Mapping[str, Any]) -> int | None:
    """The least depth of a target that a drafter's list of layers fits; None where there is no such list.

    A drafter's file need not state the true depth, nor do its weights need it.
    """
    for level in _levels(raw):
        for name in (*TARGET_LAYER_IDS, "aux_hidden_state_layer_ids"):
            target_layer_ids = level.get(name)
            if target_layer_ids and INTEGERS.holds(target_layer_ids):
                return max(target_layer_ids) + (name in TARGET_LAYER_IDS)  # the last name's count from 1
    return None


def _levels(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Where a field may stand, in order."""
    nested = raw.get(NESTED)
    return (nested, raw) if isinstance(nested, Mapping) else (raw,)


def _read_draft(fields: Fields, num_target_layers: int | None) -> DrafterFile:
    where = fields.where
    warnings: list[str] = []
    decoder = decoder_fields(fields)
    for name, own in (("target_hidden_size", "hidden_size"), ("draft_vocab_size", "vocab_size")):
        stated = fields.get(name, SIZE, decoder[own])
        if stated != decoder[own]:
            raise DominoError(f"{where} has {name} {stated} and {own} {decoder[own]}; here they must be the same.")
    layers, depth = decoder["num_hidden_layers"], fields.get("num_target_layers", LAYERS, num_target_layers)
    fields.get(
        TARGET_LAYER_IDS[0], INTEGERS, None, also=TARGET_LAYER_IDS[1:]
    )  # before the depth, which may be taken from them
    if depth is None:
        raise DominoError(f"{where} has no num_target_layers and no target was given to take it from.")
    target_layer_ids = _target_layer_ids(fields, depth, layers, warnings)
    head = _head(fields, warnings)
    return DrafterFile(
        DraftConfig(
            **decoder,
            block_size=fields.get("block_size", SIZE),
            mask_token_id=fields.get("mask_token_id", integer()),
            target_layer_ids=target_layer_ids,
            num_target_layers=depth,
            head=head,
            shift_label=_shift_label(fields, head, warnings),
            windows=_windows(fields, layers),
        ),
        warnings,
    )


def _head(fields: Fields, warnings: list[str]) -> Head | None:
    """The head, None for a plain DFlash drafter."""
    kind = HEADS[fields.get("projector_type", one_of(*HEADS), NoHead.projector_type)]
    if kind is not NoHead:
        return kind.read(fields, warnings)
    if ARCHITECTURES[1] in fields.get("architectures", TEXTS, ()):
        raise DominoError(
            f'{fields.where} has architectures ["{ARCHITECTURES[1]}"] and no projector_type "domino": it can\'t be '
            "told whether the drafter has a causal head."
        )
    return None


def _shift_label(fields: Fields, head: Head | None, warnings: list[str]) -> bool:
    """Whether the anchor's own row proposes. Without a head a file need not say that it does not: none else can."""
    given = fields.get("shift_label", BOOLEAN, None, also=["sample_from_anchor"])
    if given is None and head is not None:
        warnings.append(
            f"{fields.where} has no shift_label: taken as false, the format's default. Where acceptance lengths are "
            'near 1, the drafter was trained with "shift_label": true.'
        )
    return bool(given)


def _target_layer_ids(fields: Fields, depth: int, layers: int, warnings: list[str]) -> tuple[int, ...]:
    """The target layers that the drafter reads."""
    where = fields.where
    target_layer_ids = fields.get(TARGET_LAYER_IDS[0], INTEGERS, None, also=TARGET_LAYER_IDS[1:])
    above = fields.get("eagle_aux_hidden_state_layer_ids", INTEGERS, None)
    if target_layer_ids is None:
        target_layer_ids = default_target_layer_ids(depth, layers)
        if above is not None or not all(0 <= i < depth for i in target_layer_ids):
            raise DominoError(
                f"{where} has no target_layer_ids, and it can't be told which of the target's {depth} layers the "
                "drafter reads: add the list that it was trained with."
            )
        warnings.append(
            f"{where} has no target_layer_ids: the public formula gives {', '.join(map(str, target_layer_ids))}. If "
            "acceptance is low, the drafter was trained with others."
        )
    if above is not None and above != tuple(i + 1 for i in target_layer_ids):
        raise DominoError(
            f"{where} has eagle_aux_hidden_state_layer_ids {list(above)}, counted from 1, and target_layer_ids "
            f"{list(target_layer_ids)}, counted from 0; they must name the same layers."
        )
    return target_layer_ids


def _windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, None for full attention."""
    kinds = fields.get("layer_types", LAYER_TYPES, ())
    slides, first = fields.get("use_sliding_window", BOOLEAN, False), fields.get("max_window_layers", integer(), 28)
    if not kinds:
        # As transformers fills in a list that is not there.
        first = min(first, layers) if slides else layers
        kinds = ("full_attention",) * first + ("sliding_attention",) * (layers - first)
    everywhere = fields.get("use_swa", BOOLEAN, False)
    if "sliding_attention" not in kinds:
        if everywhere:
            raise DominoError(
                f"{fields.where} has use_swa true and no sliding_attention among layer_types: windows that see the "
                "whole block are not supported."
            )
        return (None,) * len(kinds)
    window = fields.get("sliding_window", SIZE, also=["swa_window_size"])
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _check_directions(fields: Fields, config: DraftConfig) -> None:
    """Refuse a block that is to be seen otherwise than here, where only a sliding window hides later rows."""
    full, sliding = (None in config.windows), any(config.windows)
    for name, wrong in (
        ("is_causal", {True: full, False: sliding}),
        ("causal", {True: full, False: sliding}),
        ("causal_head", {True: full, False: False}),
        ("sliding_window_non_causal", {True: sliding, False: False}),
    ):
        value = fields.get(name, BOOLEAN, None)
        if value is not None and wrong[value]:
            raise DominoError(
                f"{fields.where} has {fields.given(name)[0][0]} {as_json(value)}, which is not supported: a layer with "
                "full attention sees the whole block here, and one with a sliding window the rows before."
            )


def _unread(fields: Fields, known: Set[str]) -> list[str]:
    """A warning, if there are fields of which nothing is known here."""
    unknown = [label for label, name in fields.unread() if name not in known and not CHANGING.search(name)]
    if not unknown:
        return []
    return [
        f"{fields.where} has fields that are not read here: {', '.join(unknown)}. If acceptance is low, one of them "
        "may be the reason."
    ]


def _refuse_other_drafters(where: str, raw: Mapping[str, Any]) -> None:
    """Drafters of other kinds, by their names."""
    names = Fields(where, ("", raw), null_is_absent=True).get("architectures", TEXTS, ())
    if not set(names) <= set(ARCHITECTURES):
        raise DominoError(
            f'{where} has architectures {as_json(list(names))}: another kind of drafter; ["{ARCHITECTURES[0]}"] is '
            "supported."
        )
    if raw.get("model_type") == "qwen3_moe" or raw.get("num_experts") or raw.get("num_local_experts"):
        raise DominoError(f"{where} asks for experts (num_experts); a drafter's layers are dense.")
    if raw.get("model_type") not in (None, "qwen3"):
        raise DominoError(f'{where} has model_type {as_json(raw["model_type"])}; a drafter\'s layers are "qwen3".')
