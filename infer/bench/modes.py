"""The ways of decoding that are compared, as views of one loaded model."""

import dataclasses
from typing import Literal

from convert.loading import LoadedModel, without_head
from infer.bench.rows import DFLASH, DOMINO

Drafts = int | Literal["auto"]  # proposals that a cycle verifies


def with_drafts(loaded: LoadedModel, drafts: Drafts) -> LoadedModel:
    """The same model with `drafts` proposals a cycle; all where the engine chooses."""
    fixed = None if drafts == "auto" else drafts
    return dataclasses.replace(loaded, configs=dataclasses.replace(loaded.configs, drafts=fixed))


def head_off(loaded: LoadedModel) -> LoadedModel:
    """The same drafter as plain DFlash: its causal head is left out, its proposals are the base logits'."""
    configs, params = without_head(loaded.configs, loaded.params)
    return dataclasses.replace(loaded, configs=configs, params=params)


def drafting(
    loaded: LoadedModel, counts: tuple[Drafts, ...] = (), headless: bool = True
) -> dict[tuple[str, Drafts], LoadedModel]:
    """The model for each way of drafting, without the head and with it, by the proposals of a cycle; {} if none.

    Args:
        counts: proposals; all that the drafter makes when empty. "auto" is for the drafter as it is.
        headless: also without its head.
    """
    config = loaded.configs.draft
    if config is None:
        return {}
    views = {DOMINO: loaded} if config.head else {DFLASH: loaded}
    if config.head and headless:
        views = {DFLASH: head_off(loaded), **views}
    return {
        (mode, drafts): with_drafts(view, drafts)
        for drafts in counts or (loaded.configs.proposals,)
        for mode, view in views.items()
        if drafts != "auto" or view is loaded
    }


def simulated(loaded: LoadedModel, tau: float | None) -> LoadedModel:
    """The same model with a stated mean acceptance length instead of its own; None leaves it its own.

    Raises:
        DominoError: its cycles can't have that acceptance length.
    """
    return dataclasses.replace(loaded, configs=dataclasses.replace(loaded.configs, simulated_tau=tau))
