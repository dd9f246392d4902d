"""A drafter's config.json in the form of vLLM's speculators library, as one with a dflash_config.

It counts the target's layers from 1, has the decoder's fields in `transformer_layer_config` (those that are missing
have the defaults of transformers' Qwen3Config), and leaves out what has its own defaults.
"""

from collections.abc import Mapping
from typing import Any, Final

from domino_jax.errors import DominoError
from domino_jax.fields import BOOLEAN, INTEGERS, OBJECT, TEXT, Fields, Kind, as_json, integer

SPECULATORS: Final = ("speculators_model_type", "speculators_config", "transformer_layer_config")  # its marks
SIZE: Final = integer(1)
OBJECTS: Final = Kind("a list of objects", lambda x: type(x) is list and all(map(OBJECT.holds, x)), list)
QWEN3: Final[dict[str, Any]] = {  # defaults of transformers' Qwen3Config
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
BLOCK_SIZE: Final = 8  # the library's defaults
DRAFT_VOCAB_SIZE: Final = 32000
MARKOV: Final[dict[str, tuple[Kind[Any], Any]]] = {
    "markov_rank": (integer(), 256),
    "markov_head_type": (TEXT, "vanilla"),
    "enable_confidence_head": (BOOLEAN, True),
    "confidence_head_with_markov": (BOOLEAN, True),
}
OF_DFLASH2: Final = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 256, "selector_top_k": 16}
HEAD: Final = {
    "gru_hidden_dim": ("gru_hidden_dim", 1024),
    "emb_dim": ("logits_correction_emb_dim", 256),
    "pure_draft_prefix_len": ("pure_draft_prefix_len", 1),
}
NOTES: Final = {*SPECULATORS, "speculators_version", "model_type", "architectures", "tie_word_embeddings"}


def is_speculators(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json has this form."""
    return any(name in raw for name in SPECULATORS)


def from_speculators(raw: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """The same drafter's config.json with a dflash_config, and warnings about what had to be guessed.

    Args:
        where: the file, for errors.

    Raises:
        DominoError: it is not of a supported kind, a field is missing or of another kind, or fields contradict.
    """
    kind = raw.get("speculators_model_type")
    if kind not in ("dflash", "dflash2", "domino", "dspark"):
        raise DominoError(
            f'{where} is of the speculators library and has speculators_model_type {as_json(kind)}; "dflash", '
            '"dflash2", "domino" and "dspark" are supported.'
        )
    if "dflash_config" in raw:
        raise DominoError(f"{where} has dflash_config beside {SPECULATORS[0]}: it is of two forms; leave out one.")
    fields = Fields(where, ("", raw), null_is_absent=True)
    fields.given(*NOTES)
    layer = {name: value for name, value in fields.get(SPECULATORS[2], OBJECT).items() if value is not None}
    layer = QWEN3 | layer
    above = fields.get("aux_hidden_state_layer_ids", INTEGERS)
    if 0 in above:
        raise DominoError(
            f"{where} has aux_hidden_state_layer_ids {list(above)}: 0 is the output of the embedding, which no drafter "
            "reads here."
        )
    draft_vocab_size = fields.get("draft_vocab_size", SIZE, DRAFT_VOCAB_SIZE)
    if kind == "dflash2" and draft_vocab_size != layer["vocab_size"]:
        raise DominoError(
            f"{where} has a draft_vocab_size of {draft_vocab_size} and a vocab_size of {as_json(layer['vocab_size'])}; "
            'the library\'s "dflash2" drafters have the whole vocabulary.'
        )
    block_size = fields.get("block_size", SIZE, BLOCK_SIZE)
    anchored, warnings = _anchored(fields, block_size, kind in ("domino", "dspark"))
    if kind == "dflash2":
        if anchored:
            raise DominoError(
                f"{where} says that the anchor's own row proposes (sample_from_anchor, speculative_tokens); the "
                'library\'s "dflash2" drafters have it unused.'
            )
        warnings = []
    draft: dict[str, Any] = {
        "block_size": block_size,
        "mask_token_id": fields.get("mask_token_id", integer()),
        "target_layer_ids": [i - 1 for i in above],
        "shift_label": anchored,
        "projector_type": kind,
        "draft_vocab_size": draft_vocab_size,
    }
    if kind == "domino":
        draft |= {ours: fields.get(theirs, integer(), default) for ours, (theirs, default) in HEAD.items()}
    if kind == "dflash2":
        draft |= {name: fields.get(name, SIZE, default) for name, default in OF_DFLASH2.items()}
    if kind == "dspark":
        draft |= {name: fields.get(name, of, default) for name, (of, default) in MARKOV.items()}
    rest = {name: raw[name] for _, name in fields.unread()}  # scales, windows, what is not known here
    return {**layer, **rest, "architectures": ["DFlashDraftModel"], "dflash_config": draft}, warnings


def _anchored(fields: Fields, block_size: int, default: bool) -> tuple[bool, list[str]]:
    """Whether the anchor's own row proposes: as the file says, else by how many tokens it proposes."""
    where, stated = fields.where, fields.get("sample_from_anchor", BOOLEAN, None)
    library = Fields(where, ("", fields.get(SPECULATORS[1], OBJECT, {})), null_is_absent=True)
    methods = library.get("proposal_methods", OBJECTS, [])
    counts = [
        Fields(where, ("proposal_methods.", one), null_is_absent=True).get("speculative_tokens", SIZE, None)
        for one in methods
    ]
    told = {block_size: True, block_size - 1: False}.get(counts[0] or 0) if counts else None
    if stated is False and told:
        raise DominoError(
            f"{where} has sample_from_anchor false and speculative_tokens {counts[0]}, which are more than the "
            f"{block_size - 1} that a block of {block_size} then proposes."
        )
    if stated is not None or told is not None:
        return bool(told if stated is None else stated), []
    return default, [
        f"{where} has no sample_from_anchor: taken as {as_json(default)}, the library's default. Where acceptance "
        "lengths are near 1, it is the other."
    ]
