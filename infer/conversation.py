"""What the caches hold of one conversation, so that each turn runs only what the turns before did not."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax

from domino_jax.decode import Caches, DecodeState


@dataclass
class Conversation:
    """Keeps the caches between the turns of one conversation on one engine; `Engine.generate` takes them and gives
    them back.

    Which of their positions count is found by comparing ids, never assumed: a chat template may render an earlier turn
    in another way than it was generated. Programs donate the buffers, so whoever takes them has them alone.
    """

    ids: list[int] = field(default_factory=list)  # of which `caches` holds what is known, one a position
    caches: Caches | None = None

    def take(self, prompt: Sequence[int], drafting: bool) -> tuple[Caches | None, int]:
        """The caches, and how many of the prompt's first ids they hold; None and 0 where nothing can be used.

        Args:
            drafting: the drafter's state is needed too; an answer that had no drafter left none.
        """
        held, caches = shared(self.ids, prompt), self.caches
        self.ids, self.caches = [], None
        if not held or caches is None or (drafting and caches.drafter is None):
            return None, 0
        return (caches if drafting else caches._replace(drafter=None)), held

    def keep(self, ids: list[int], state: DecodeState) -> None:
        """Keep a state's caches, which hold `ids`; of a state that a program has taken there is nothing to keep."""
        if not any(buffer.is_deleted() for buffer in jax.tree.leaves((state.cache, state.drafter))):
            self.ids, self.caches = ids, Caches(state.cache, state.drafter)


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
