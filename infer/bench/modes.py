"""The ways of decoding that are compared, as views of one loaded model."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax import Array

from convert.loading import LoadedModel, without_head
from domino_jax import decode
from domino_jax.decode import DecodeState
from domino_jax.drafters.assistant import AssistantDrafter
from domino_jax.drafters.base import Drafter, DraftTokens
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.combined import CombinedDrafter
from domino_jax.drafters.dual_view import DualViewDrafter
from domino_jax.drafters.heads import head_of
from domino_jax.drafters.ngram import NgramDrafter
from domino_jax.drafters.tree import TreeDrafter, Trees
from domino_jax.errors import DominoError
from infer.bench.rows import ASSISTANT, DFLASH, NGRAM, ORTHRUS, TREE

Drafts = int | Literal["auto"]  # proposals that a cycle verifies


def with_drafts(loaded: LoadedModel, drafts: Drafts) -> LoadedModel:
    """The same model with `drafts` proposals a cycle; all where the engine chooses."""
    fixed = None if drafts == "auto" else drafts
    return dataclasses.replace(loaded, configs=dataclasses.replace(loaded.configs, drafts=fixed))


def head_off(loaded: LoadedModel) -> LoadedModel:
    """The same drafter as plain DFlash: its head is left out, its proposals are the base logits'."""
    configs, params = without_head(loaded.configs, loaded.params)
    return dataclasses.replace(loaded, configs=configs, params=params)


def drafting(
    loaded: LoadedModel, counts: tuple[Drafts, ...] = (), headless: bool = True
) -> dict[tuple[str, Drafts], LoadedModel]:
    """The model for each way of drafting, without the head and with it, by the proposals of a cycle; {} if none.

    Where the model drafts trees, those are the last, after the chains of the same drafter.

    Args:
        counts: proposals of a chain; all that the drafter makes when empty. "auto" is for the drafter as it is.
        headless: also without its head.
    """
    drafter = loaded.configs.drafter
    if drafter is None:
        return {}
    if isinstance(drafter, TreeDrafter):
        chain = dataclasses.replace(loaded.configs, drafter=BlockDrafter(drafter.config), drafts=None)
        found = drafting(dataclasses.replace(loaded, configs=chain), counts, headless)
        found[mode_of(drafter), drafter.nodes] = loaded
        if "auto" in counts:
            found[mode_of(drafter), "auto"] = loaded
        return found
    views = {mode_of(drafter): loaded}
    if headless and isinstance(drafter, BlockDrafter) and drafter.config.head:
        views = {DFLASH: head_off(loaded), **views}
    return {
        (mode, drafts): with_drafts(view, drafts)
        for drafts in counts or (loaded.configs.proposals,)
        for mode, view in views.items()
        if drafts != "auto" or view is loaded
    }


def mode_of(drafter: Drafter) -> str:
    """What a way of drafting is called in the rows."""
    if isinstance(drafter, CombinedDrafter):
        return f"{mode_of(drafter.model)}+{NGRAM}"
    known = {NgramDrafter: NGRAM, AssistantDrafter: ASSISTANT}
    kind = known.get(type(drafter), type(drafter).__name__)
    if isinstance(drafter, BlockDrafter):
        kind = head_of(drafter.config).projector_type
    if isinstance(drafter, DualViewDrafter):
        kind = f"{ORTHRUS}-{drafter.config.head.projector_type}" if drafter.config.head else ORTHRUS
    return f"{kind}-{TREE}" if isinstance(drafter, Trees) else kind


@dataclass(frozen=True)
class SimulatedAcceptance:
    """A `decode.Accept` for measuring speed: as many drafts stand as give a stated mean, whatever the target says.

    A cycle does all its work, and the output is worthless.

    Args:
        tau: mean acceptance length, the bonus token included.
        proposals: J.

    Raises:
        DominoError: `tau` is not from 1 to J + 1.
    """

    tau: float
    proposals: int

    def __post_init__(self) -> None:
        if not 1 <= self.tau <= self.proposals + 1:
            raise DominoError(
                f"an acceptance length of {self.tau:g} can't be simulated: {self.proposals} drafts a cycle "
                f"allow 1 to {self.proposals + 1}."
            )

    def __call__(
        self, keys: Array | None, draft: DraftTokens, logits: Array, state: DecodeState
    ) -> tuple[Array, Array]:
        accepted, bonus = decode.accept(keys, draft, logits, state)
        # The real count is never negative, but the compiler does not know: none of the work is left out.
        return jnp.where(accepted < 0, accepted, simulated_counts(self.tau, state.emitted)), bonus


def simulated_counts(tau: float, emitted: Array) -> Array:
    """Counts of accepted drafts with a stated mean: nothing is verified.

    After n cycles a row has added floor(n·τ + φ) tokens: each cycle floor(τ) or ceil(τ) of them, the two evenly mixed.
    φ is (row + ½) / rows, so that they do not step together.

    Args:
        tau: mean acceptance length, at least 1: a cycle's drafts that are accepted, and its bonus.
        emitted: [B] tokens so far, the prefill's included.

    Returns:
        [B] int32, from floor(τ) - 1 to ceil(τ) - 1.
    """
    rows = emitted.shape[0]
    phase = (jnp.arange(rows, dtype=jnp.float32) + 0.5) / rows
    added = (emitted - 1).astype(jnp.float32)
    cycles = jnp.ceil((added - phase) / tau - 1e-3)  # n, from floor(n·τ + φ) = added; the margin is for rounding
    count = jnp.floor((cycles + 1) * tau + phase) - added
    return jnp.clip(count, math.floor(tau), math.ceil(tau)).astype(jnp.int32) - 1
