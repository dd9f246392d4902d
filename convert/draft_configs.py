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
from domino_jax.drafters.convolution import Convolution
from domino_jax.drafters.heads import HEADS
from domino_jax.drafters.heads.base import Head
from domino_jax.drafters.heads.markov import MarkovHead
from domino_jax.drafters.heads.none import NoHead
from domino_jax.drafters.heads.selector import FIELDS, SelectorHead
from domino_jax.errors import DominoError
from domino_jax.fields import BOOLEAN, INTEGERS, OBJECT, TEXT, TEXTS, Fields, as_json, integer, listed, number, one_of

Custom = TypeVar("Custom", bound=CustomDraftConfig)
NESTED: Final = "dflash_config"
# Any of them makes a config.json a drafter's.
DRAFTER_FIELDS: Final = (NESTED, "block_size", "num_target_layers", "target_layer_ids", *SPECULATORS)
TARGET_LAYER_IDS: Final = ("target_layer_ids", "layer_ids")  # one setting, by two names
DFLASH, DOMINO = "DFlashDraftModel", "DominoDraftModel"  # the field's name, and the first Domino files'
DFLASH2 = SelectorHead.architecture
DSPARK: Final = ("Qwen3DSparkModel", "DSparkDraftModel")  # DeepSpec's, with a Markov head or without, and SpecForge's
ARCHITECTURES: Final = (DFLASH, DFLASH2, DOMINO, *DSPARK)
UNSUPPORTED: Final = {
    "DFlashLinearDraftModel": "SpecForge's drafter with linear attention",
    "Lfm2DSparkDraftModel": "a DSpark drafter for targets of the LFM2 family",
    "Qwen35DSparkModel": "a DSpark drafter with Qwen3.5's layers",
    "Qwen3OmniDSparkModel": "a DSpark drafter for Qwen3-Omni",
    "Gemma4DSparkModel": "a DSpark drafter with Gemma 4's layers",
    "MuseGlimmerAssistantModel": "a drafter with Muse Glimmer's layers",
}
# Of one setting, all names; a value for one of them takes the place of all.
NAMES: Final = (("shift_label", "sample_from_anchor", "dspark_bonus_anchor"), TARGET_LAYER_IDS)
# Fields of other drafters on the same backbone, and the values with which they change nothing.
NEUTRAL_IN_A_DRAFTER: Final[dict[str, tuple[Any, ...]]] = {
    "attention_sink": (None, False),
    "attention_sink_bias": (None, False),
    "add_swa_attention_sink_bias": (None, False),
    "swa_attention_sink_enabled": (None, False),
    "attention_value_scale": (None, 1),
    "use_aux_hidden_state": (None, True),
    "draft_shift": (None, False),
    "draft_adapter_rank": (None, 0),
    "dspark_bonus_anchor": (None, False, True),  # shift_label, the other way round
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
    *("num_anchors", "max_anchors", "lambda_base_start", "lambda_base_decay_ratio", "confidence_head_alpha"),
    *("attention_mode", "target_model_type"),
}
# What to do where a file does not say whether the anchor's own row proposes.
OVERRIDE: Final = (
    'add "shift_label": true or false to the file, or make a copy that has it: python -m convert SRC DST '
    "--hf-overrides '{\"shift_label\": true}'"
)
TEMPERATURES: Final = listed(number(above=0), "a list of numbers above 0")
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
    reduced = is_speculators(raw)
    if reduced:
        raw, warnings = from_speculators(raw, where)
    _refuse_other_drafters(where, raw)
    nested = Fields(where, ("", raw), null_is_absent=True).get(NESTED, OBJECT, {})
    refuse_others(where, raw, NEUTRAL | NEUTRAL_IN_A_DRAFTER)
    fields = Fields(where, (f"{NESTED}.", nested), ("", raw), null_is_absent=True)
    with said_of(where):
        config, guesses = _read_draft(fields, num_target_layers, reduced)
    known = INERT | NEUTRAL.keys() | NEUTRAL_IN_A_DRAFTER.keys() | {NESTED}
    return DrafterFile(config, warnings + guesses + _unread(fields, known))


def with_overrides(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A drafter's config.json with other values: each takes the place of the field, by whatever names and levels."""
    changed: dict[str, Any] = dict(raw)
    levels = [changed]
    if isinstance(raw.get(NESTED), Mapping):
        changed[NESTED] = dict(raw[NESTED])
        levels.append(changed[NESTED])
    for name, value in overrides.items():
        for level in levels:
            for other in next((names for names in NAMES if name in names), (name,)):
                level.pop(other, None)
        changed[name] = value
    return changed


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
    known = num_target_layers is not None or states_depth(raw)
    return warnings + (last_layer_warning(config.target_layer_ids, config.num_target_layers) if known else [])


def states_depth(raw: Mapping[str, Any]) -> bool:
    """Whether a drafter's config.json says how many layers its target has."""
    return any(level.get("num_target_layers") for level in _levels(raw))


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


def _read_draft(fields: Fields, num_target_layers: int | None, reduced: bool) -> DrafterFile:
    """See `read_draft_config`; `reduced`: files of this form may have a vocabulary of their own."""
    where = fields.where
    warnings: list[str] = []
    decoder = decoder_fields(fields)
    draft_vocab_size = fields.get("draft_vocab_size", SIZE, decoder["vocab_size"])
    for name, own in (("target_hidden_size", "hidden_size"), ("draft_vocab_size", "vocab_size")):
        stated = fields.get(name, SIZE, decoder[own])
        if stated != decoder[own] and not (reduced and name == "draft_vocab_size"):
            raise DominoError(f"{where} has {name} {stated} and {own} {decoder[own]}; here they must be the same.")
    layers, depth = decoder["num_hidden_layers"], fields.get("num_target_layers", LAYERS, num_target_layers)
    fields.get(
        TARGET_LAYER_IDS[0], INTEGERS, None, also=TARGET_LAYER_IDS[1:]
    )  # before the depth, which may be taken from them
    if depth is None:
        raise DominoError(f"{where} has no num_target_layers and no target was given to take it from.")
    target_layer_ids = _target_layer_ids(fields, depth, layers, warnings)
    convolution, windows = Convolution.read(fields), _windows(fields, layers)
    head = _head(fields, warnings, convolution)
    causal, sliding_window_non_causal = _causal(fields, windows)
    return DrafterFile(
        DraftConfig(
            **decoder,
            block_size=fields.get("block_size", SIZE),
            mask_token_id=fields.get("mask_token_id", integer()),
            target_layer_ids=target_layer_ids,
            num_target_layers=depth,
            head=head,
            shift_label=_shift_label(fields, head, warnings),
            windows=windows,
            confidence_temperatures=fields.get("confidence_temperatures", TEMPERATURES, ()),
            tree_candidates=fields.get("tree_candidates", SIZE, None),
            causal=causal,
            sliding_window_non_causal=sliding_window_non_causal,
            convolution=convolution,
            draft_vocab_size=draft_vocab_size,
        ),
        warnings,
    )


def _head(fields: Fields, warnings: list[str], convolution: Convolution | None) -> Head | None:
    """The head, None for a plain DFlash drafter."""
    where, architectures = fields.where, fields.get("architectures", TEXTS, ())
    stated = fields.get("projector_type", one_of(*HEADS), None)
    rank = fields.get("markov_rank", integer(), None)
    kind = HEADS[stated or NoHead.projector_type]
    is_dspark = bool(set(DSPARK) & set(architectures))
    if stated is None and (rank or is_dspark):
        kind = MarkovHead
    selector = next((name for name in FIELDS if fields.get(name, integer(), 0)), None)
    if stated is None and selector and not rank:
        kind = SelectorHead
    ours = selector or ("conv_kernel_size" if convolution else None)
    if DFLASH2 in architectures or ours:
        other = None if kind in (NoHead, SelectorHead) and not rank else kind.projector_type
        if other or (selector and kind is NoHead):
            raise DominoError(
                f'{where} has {ours or DFLASH2}, which is DFlash 2\'s, and the head "{other or NoHead.projector_type}" '
                "(projector_type, markov_rank): it can't be told which one the drafter has; leave one of them out."
            )
        if not ours:
            raise DominoError(
                f'{where} has architectures ["{DFLASH2}"] and neither convolutions (conv_kernel_size, conv_group_size) '
                "nor a selector (selector_rank, selector_top_k): it can't be told what the drafter has."
            )
    if kind is MarkovHead and rank == 0:  # as DeepSpec writes its plain DFlash drafters
        kind = NoHead
    if kind is not MarkovHead and (rank or (is_dspark and kind is not NoHead)):
        other = f"markov_rank {rank}" if rank else ", ".join(architectures)
        raise DominoError(
            f"{where} has projector_type {as_json(stated)} and {other}: "
            "it can't be told which head the drafter has; leave one of them out."
        )
    if kind is not NoHead:
        return kind.read(fields, warnings)
    if DOMINO in architectures:
        raise DominoError(
            f'{where} has architectures ["{DOMINO}"] and no projector_type "domino": it can\'t be '
            "told whether the drafter has a causal head."
        )
    fields.given("markov_head_type", "confidence_head_with_markov")
    if fields.get("enable_confidence_head", BOOLEAN, False, also=["use_confidence_head"]):
        warnings.append(f"{where} has a confidence head and no Markov head: the confidence head is not read.")
    return None


def _shift_label(fields: Fields, head: Head | None, warnings: list[str]) -> bool:
    """Whether the anchor's own row proposes: as the file says, else as files of its kind do.

    Without a head a file need not say that it does not: none but DeepSpec's do. Nor does one with DFlash 2's.
    """
    where, architectures = fields.where, fields.get("architectures", TEXTS, ())
    given, bonus = fields.get(NAMES[0][0], BOOLEAN, None, also=NAMES[0][1:2]), fields.get(NAMES[0][2], BOOLEAN, None)
    if given is not None and bonus is not None and given == bonus:
        name = fields.given(*NAMES[0][:2])[0][0]
        raise DominoError(
            f"{where} has {name} {as_json(given)} and {NAMES[0][2]} {as_json(bonus)}: one says that the anchor's own "
            f"row proposes, the other that it does not; {OVERRIDE}."
        )
    if given is not None or bonus is not None:
        return not bonus if given is None else given
    if set(DSPARK) & set(architectures):
        return True
    if isinstance(head, MarkovHead):
        if fields.get("projector_type", TEXT, None) is None:
            raise DominoError(
                f"{where} has a Markov head and neither shift_label nor projector_type: it can't be told whether the "
                f"anchor's own row proposes; {OVERRIDE}."
            )
        return True
    if head is not None and not isinstance(head, SelectorHead):
        warnings.append(
            f"{where} has no shift_label: taken as false, the format's default. Where acceptance lengths are "
            'near 1, the drafter was trained with "shift_label": true.'
        )
    return False


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
    if "sliding_attention" not in kinds:
        if not fields.get("use_swa", BOOLEAN, False):
            return (None,) * len(kinds)
        kinds = ("sliding_attention",) * len(kinds)
    window = fields.get("sliding_window", SIZE, also=["swa_window_size"])
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _causal(fields: Fields, windows: tuple[int | None, ...]) -> tuple[bool, bool]:
    """Whether layers with full attention hide a block's later rows, and whether those with a window show them.

    Where nothing is said, full attention shows them and a window hides them; the windows of `use_swa` show them.
    """
    full, sliding = (None in windows), any(windows)
    both = fields.get("sliding_window_non_causal", BOOLEAN, None)
    causal = fields.get("is_causal", BOOLEAN, None, also=["causal"])
    if sliding and both is not None and both == causal:
        name = fields.given("is_causal", "causal")[0][0]
        raise DominoError(
            f"{fields.where} has {name} {as_json(causal)} and sliding_window_non_causal {as_json(both)}: one says that "
            "a window hides a block's later rows, the other that it does not; give one of them."
        )
    ours = fields.get("causal_head", BOOLEAN, None)
    if full and causal is not None and ours is not None and causal != ours:
        name = fields.given("is_causal", "causal")[0][0]
        raise DominoError(
            f"{fields.where} has {name} {as_json(causal)} and causal_head {as_json(ours)}: they are one setting, so "
            "give one of them, or the same value."
        )
    everywhere = fields.get("use_swa", BOOLEAN, False) and "sliding_attention" not in fields.get(
        "layer_types", LAYER_TYPES, ()
    )
    stated = both if both is not None else None if causal is None else not causal
    return full and bool(causal or ours), sliding and (everywhere if stated is None else stated)


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
        what = next((UNSUPPORTED[name] for name in names if name in UNSUPPORTED), "another kind of drafter")
        raise DominoError(
            f"{where} has architectures {as_json(list(names))}: {what}, which is not supported; "
            f"{', '.join(ARCHITECTURES)} are."
        )
    if raw.get("model_type") == "qwen3_moe" or raw.get("num_experts") or raw.get("num_local_experts"):
        raise DominoError(f"{where} asks for experts (num_experts); a drafter's layers are dense.")
    if raw.get("model_type") not in (None, "qwen3", *(["dspark"] if set(DSPARK) & set(names) else [])):
        raise DominoError(f'{where} has model_type {as_json(raw["model_type"])}; a drafter\'s layers are "qwen3".')
