"""Heads: what makes proposals of a block's logits, left to right. Another one is a file here and a line of `HEADS`."""

from domino_jax.config import DraftConfig, Headed
from domino_jax.drafters.heads.base import Head
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.drafters.heads.markov import MarkovHead
from domino_jax.drafters.heads.none import NoHead
from domino_jax.drafters.heads.selector import SelectorHead

NO_HEAD = NoHead()
HEADS: dict[str, type[Head]] = {head.projector_type: head for head in (DominoHead, MarkovHead, SelectorHead, NoHead)}


def head_of(config: Headed) -> Head:
    """The head of a drafter of blocks; `NO_HEAD` where the config has none."""
    return config.head or NO_HEAD


def has_confidence(config: DraftConfig) -> bool:
    """Whether the head of a block drafter says how likely each proposal is to be accepted."""
    return isinstance(config.head, MarkovHead) and config.head.enable_confidence_head
