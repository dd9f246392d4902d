"""Which drafter runs: by the config of its weights, and by the name of one that has none."""

from convert.registry import NGRAM
from domino_jax.config import DecoderConfig, DraftConfig, TargetConfig
from domino_jax.drafters.assistant import AssistantDrafter
from domino_jax.drafters.base import Drafter
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.combined import LONG_MATCHES, CombinedDrafter
from domino_jax.drafters.ngram import NgramDrafter
from domino_jax.errors import DominoError


def make_drafter(
    config: DecoderConfig | None,
    *,
    ngram: bool = False,
    num_draft_tokens: int | None = None,
    candidates: int | None = None,
    prompt_lookup_max: int | None = None,
    prompt_lookup_min: int | None = None,
) -> Drafter | None:
    """The drafter, None where there is neither a config nor n-gram drafting.

    Args:
        config: of its weights: a DraftConfig of a block drafter, a TargetConfig of an assistant; None for none.
        ngram: n-gram drafting, alone or for long matches beside the other.
        num_draft_tokens: J; a block's when None, and 5 or 7 for an assistant and n-grams.
        candidates: tokens that a causal head scores.
        prompt_lookup_max, prompt_lookup_min: tokens of the longest and shortest match of n-grams.

    Raises:
        DominoError: a setting does not fit the drafter.
    """
    made: Drafter | None = None
    if isinstance(config, DraftConfig):
        made = BlockDrafter(config, candidates)
    elif candidates is not None:
        raise DominoError("head candidates need a drafter with a causal head: give one with --draft DIR.")
    if isinstance(config, TargetConfig):
        made = AssistantDrafter(config, num_draft_tokens or AssistantDrafter.most)
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
