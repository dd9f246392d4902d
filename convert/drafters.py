"""Which drafter runs: the forms of checkpoints and the drafters that they make, and the one that has no weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert.configs import read_target_config
from convert.draft_configs import export_warnings, is_drafter, read_custom_config, read_draft_config
from convert.dual_view import holds_both, holds_view
from convert.options import TreeSettings
from convert.registry import NGRAM
from domino_jax.config import CustomDraftConfig, DecoderConfig, DraftConfig, TargetConfig
from domino_jax.drafters.assistant import AssistantDrafter
from domino_jax.drafters.base import Drafter
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.combined import LONG_MATCHES, CombinedDrafter
from domino_jax.drafters.dual_view import DualViewConfig, DualViewDrafter
from domino_jax.drafters.ngram import NgramDrafter
from domino_jax.drafters.tree import TreeDrafter
from domino_jax.drafters.view_tree import DualViewTreeDrafter
from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError

Raw = Mapping[str, Any]  # a parsed config.json


@dataclass(frozen=True)
class Form:
    """A form of checkpoint, and the drafter that it makes."""

    config: type[DecoderConfig]  # of its weights
    drafter: Callable[[Any, int | None], Drafter]  # of a config, and of the tokens a cycle that were asked for
    holds: Callable[[Raw], bool]  # whether a config.json has this form
    read: Callable[[Raw, int | None, Path | None], tuple[Any, list[str]]]  # config and warnings: `read_draft_config`
    warnings: Callable[[Raw, int | None, Path | None], list[str]]  # before others are given it: `export_warnings`


def custom(config: type[CustomDraftConfig], drafter: Callable[[Any], Drafter]) -> Form:
    """The form of a drafter whose own file says all of it."""

    def holds(raw: Raw) -> bool:
        names = raw.get("architectures")
        return isinstance(names, list) and config.architecture in names

    def read(raw: Raw, num_target_layers: int | None, file: Path | None) -> tuple[CustomDraftConfig, list[str]]:
        return read_custom_config(config, raw, file)

    return Form(config, lambda config, asked: drafter(config), holds, read, lambda *given: read(*given)[1])


# What lies in its target's own folder, or alone.
DUAL_VIEW = replace(custom(DualViewConfig, DualViewDrafter), holds=holds_view)

# The first that holds a config.json is its form. A new drafter is a file of its own and, before these, the line
# custom(ItsConfig, ItsDrafter).
FORMS: tuple[Form, ...] = (
    DUAL_VIEW,
    Form(DraftConfig, lambda config, asked: BlockDrafter(config), is_drafter, read_draft_config, export_warnings),
    Form(
        TargetConfig,  # an ordinary model, as assistant
        lambda config, asked: AssistantDrafter(config, asked or AssistantDrafter.most),
        lambda raw: True,
        lambda raw, num_target_layers, file: (read_target_config(raw, file), []),
        lambda *given: [],
    ),
)


def form_of(raw: Raw, folder: Path | None = None) -> Form:
    """The form of a config.json; that of a target where it is no drafter's.

    Args:
        folder: where it lies. A drafter whose tensors stand beside its target's is then found by their names too.
    """
    return DUAL_VIEW if holds_both(raw, folder) else next(form for form in FORMS if form.holds(raw))


def make_drafter(
    config: DecoderConfig | None,
    *,
    ngram: bool = False,
    num_draft_tokens: int | None = None,
    candidates: int | None = None,
    prompt_lookup_max: int | None = None,
    prompt_lookup_min: int | None = None,
    tree: TreeSettings | None = None,
    confidence_threshold: float | None = None,
) -> Drafter | None:
    """The drafter, None where there is neither a config nor n-gram drafting.

    Args:
        config: of its weights, of one of `FORMS`; None for none.
        ngram: n-gram drafting, alone or for long matches beside the other.
        num_draft_tokens: J; all that a drafter makes when None, 5 of an assistant and 7 of n-grams.
        candidates: tokens that a head scores.
        prompt_lookup_max, prompt_lookup_min: tokens of the longest and shortest match of n-grams.
        tree: of a block drafter's proposals; a chain when None.
        confidence_threshold: where a block drafter's chain ends, see `BlockDrafter`.

    Raises:
        DominoError: a setting does not fit the drafter.
        UsageError: it makes no trees, or a tree and a number of drafts were asked for.
    """
    made: Drafter | None = None
    if config is not None:
        made = next(form for form in FORMS if isinstance(config, form.config)).drafter(config, num_draft_tokens)
    if candidates is not None:
        if not isinstance(made, BlockDrafter):
            raise DominoError("head candidates need a drafter with a causal head: give one with --draft DIR.")
        made = BlockDrafter(made.config, candidates)
    if confidence_threshold is not None:
        if ngram or tree or not isinstance(made, BlockDrafter):
            raise DominoError("a confidence threshold needs chains of a block drafter alone: give it with --draft DIR.")
        made = replace(made, confidence_threshold=confidence_threshold)
    if tree is not None:
        if ngram or not isinstance(made, BlockDrafter | DualViewDrafter):
            what = "n-grams" if ngram else "no drafter" if made is None else "another model as drafter"
            raise UsageError(f"--tree needs a block drafter alone, found {what}: give one with --draft DIR.")
        if num_draft_tokens is not None:
            raise UsageError("--tree says how many drafts a cycle verifies: leave --num-draft-tokens out.")
        few = tree.candidates
        if few is None and isinstance(made, BlockDrafter):
            few = made.config.tree_candidates
        shape: dict[str, Any] = tree._asdict() | {"candidates": None if few == "all" else few}
        if isinstance(made, DualViewDrafter):
            made = DualViewTreeDrafter(made.config, **shape)
        else:
            made = TreeDrafter(made.config, **shape)
    if not ngram:
        if prompt_lookup_max is not None or prompt_lookup_min is not None:
            raise DominoError(f"prompt_lookup_max and prompt_lookup_min are for n-grams: --draft {NGRAM}.")
        return made
    base = NgramDrafter() if made is None else LONG_MATCHES
    longest = base.prompt_lookup_max if prompt_lookup_max is None else prompt_lookup_max
    shortest = min(base.prompt_lookup_min, longest) if prompt_lookup_min is None else prompt_lookup_min
    if prompt_lookup_max is None:
        longest = max(longest, shortest)
    lookup = NgramDrafter(num_draft_tokens or NgramDrafter.most, longest, shortest)
    return lookup if made is None else CombinedDrafter(made, lookup)
