"""Block drafters as others' programs want them: config.json, names of tensors, copies of the target's."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from convert.draft_configs import DFLASH2, DSPARK, NESTED
from convert.speculators import HEAD, MARKOV, is_speculators
from convert.tensors import EMBED, LM_HEAD, open_tensors, vocabulary_tensor
from domino_jax.config import DraftConfig
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.drafters.heads.markov import MarkovHead
from domino_jax.drafters.heads.selector import SelectorHead
from domino_jax.errors import DominoError

Packaging = Literal["specforge", "deepspec", "speculators"]
SPECFORGE, DEEPSPEC, SPECULATORS_FORM = "specforge", "deepspec", "speculators"
# Of config.json, what stands in speculators' transformer_layer_config.
OF_LAYERS: Final = (
    *("model_type", "hidden_act", "attention_bias", "attention_dropout", "vocab_size", "hidden_size"),
    *("intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "rms_norm_eps", "rope_theta", "layer_types", "use_sliding_window", "sliding_window"),
)


def packaging_of(raw: Mapping[str, Any]) -> str:
    """Whose form a drafter's config.json has, for people."""
    nested = raw.get(NESTED)
    nested = nested if isinstance(nested, Mapping) else {}
    architectures, projector = raw.get("architectures") or (), nested.get("projector_type", raw.get("projector_type"))
    if is_speculators(raw):
        return "speculators'"
    if set(DSPARK) & set(architectures):
        return "SpecForge's" if nested else "DeepSpec's"
    if projector == MarkovHead.projector_type:
        return "Model-Optimizer's"
    if projector == DominoHead.projector_type:
        return "SpecForge's"
    return "JetSpec's" if nested.get("causal_head") is not None else "z-lab's"


def packaged(config: DraftConfig, form: Packaging) -> dict[str, Any]:
    """The config.json of a drafter in one of the forms.

    Raises:
        DominoError: the form has no such drafters.
    """
    if form == SPECFORGE:
        _refuse_reduced(config, "SpecForge's")
        return config.to_hf()
    return _deepspec(config) if form == DEEPSPEC else _speculators(config)


def renamed(config: DraftConfig, form: Packaging) -> Callable[[str], str]:
    """What the form calls a tensor, by its name in `convert.names`."""

    def name(ours: str) -> str:
        nested = form == SPECULATORS_FORM and isinstance(config.head, DominoHead)
        return f"logits_correction.{ours}" if nested and ours.startswith(("prefix_gru.", "embed_proj.")) else ours

    return name


def copies(config: DraftConfig, form: Packaging, target: Path | None) -> dict[str, Callable[[], np.ndarray]]:
    """The copies of the target's embeddings and LM head that the form has beside a drafter, where a target is given.

    Args:
        target: its folder.

    Raises:
        DominoError: its files have no embeddings, or can't be read.
    """
    if target is None or form == SPECFORGE:
        return {}
    files, made = open_tensors(target), {}
    for name in (EMBED, LM_HEAD) if config.draft_vocab_size is None else (EMBED,):
        tensor = vocabulary_tensor(files, name)
        if tensor is None:
            raise DominoError(f"{target} has no {EMBED}: no copies can be made of it.")
        made[name] = partial(files.read, tensor)
    return made


def _refuse_reduced(config: DraftConfig, whose: str) -> None:
    if config.draft_vocab_size is not None:
        raise DominoError(f"{whose} form has no reduced vocabularies (d2t): give --format speculators.")


def _deepspec(config: DraftConfig) -> dict[str, Any]:
    head = config.head
    _refuse_reduced(config, "DeepSpec's")
    if config.convolution or (head is not None and not isinstance(head, MarkovHead)):
        kind = SelectorHead.name if config.convolution or head is None else head.name
        raise DominoError(f"DeepSpec's form has no {kind} drafters: give --format specforge or speculators.")
    raw = config.to_hf()
    nested = raw.pop(NESTED)
    raw |= {"architectures": [MarkovHead.architecture]}
    raw |= {name: nested[name] for name in ("mask_token_id", "target_layer_ids", "causal") if name in nested}
    if head is None:
        raw |= {"markov_rank": 0, "enable_confidence_head": False}
    if not config.shift_label:  # theirs all have it
        raw["sample_from_anchor"] = False
    return raw


def _speculators(config: DraftConfig) -> dict[str, Any]:
    if config.causal:
        raise DominoError("speculators' form has no causal blocks (JetSpec): give --format specforge or deepspec.")
    ours, head = config.to_hf(), config.head
    selects = isinstance(head, SelectorHead)
    if selects and config.draft_vocab_size is not None:
        raise DominoError("speculators' form has DFlash 2 drafters with the whole vocabulary alone.")
    if selects != bool(config.convolution) or (selects and config.shift_label):
        raise DominoError(
            "speculators' form has DFlash 2 drafters with both convolutions and selector, whose anchor's own row "
            "proposes nothing: give --format specforge."
        )
    layers = {name: ours[name] for name in OF_LAYERS if name in ours}
    scaling = config.rope_scaling.to_hf() if config.rope_scaling else {"rope_type": "default"}
    layers["rope_parameters"] = {**scaling, "rope_theta": config.rope_theta}
    kind = "dflash" if head is None else head.projector_type
    method = {"proposal_type": "greedy", "speculative_tokens": config.num_proposals}
    method |= {"verifier_accept_k": 1, "accept_tolerance": 0.0}
    architecture = {
        "dflash": "DFlashDraftModel",
        "dflash2": DFLASH2,
        "domino": "DominoDraftModel",
        "dspark": "DSparkDraftModel",
    }[kind]
    raw: dict[str, Any] = {
        "architectures": [architecture],
        "speculators_model_type": kind,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {"name_or_path": None, "architectures": []},
        },
        "transformer_layer_config": layers,
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "sample_from_anchor": config.shift_label,
        "sliding_window_non_causal": config.sliding_window_non_causal,
        "num_target_layers": config.num_target_layers,
        "tie_word_embeddings": False,
    }
    if isinstance(head, DominoHead):
        raw |= {theirs: getattr(head, ours) for ours, (theirs, _) in HEAD.items()}
    if isinstance(head, MarkovHead):
        raw |= {name: getattr(head, name) for name in MARKOV}
    raw |= config.calibration
    if isinstance(head, SelectorHead) and config.convolution:
        raw |= config.convolution.to_hf() | head.to_hf()[0]
    return raw
