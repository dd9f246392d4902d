"""What the caches hold of one conversation, so that each turn runs only what the turns before did not."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax

from domino_jax.cache import KVCache
from domino_jax.decode import Caches, DecodeState


@dataclass
class Conversation:
    """Keeps the caches between the turns of one conversation on one engine; `Engine.generate` takes them and gives
    them back.

    Which of their positions count is found by comparing ids, never assumed: a chat template may render an earlier turn
    in another way than it was generated. Programs donate the buffers, so whoever takes them has them alone.
    """

    ids: list[int] = field(default_factory=list)  # whose keys and values `cache` holds, one a position
    cache: KVCache | None = None
    # The drafter's. Plain steps leave it behind, so it covers only the first `drafted` of the ids.
    context: KVCache | None = None
    drafted: int = 0

    def take(self, prompt: Sequence[int], drafting: bool) -> tuple[Caches | None, int]:
        """The caches, and how many of the prompt's first ids they hold; None and 0 where nothing can be used.

        Args:
            drafting: the drafter's context is needed too, and what it does not cover has to be run again.
        """
        common = shared(self.ids, prompt)
        held = min(common, self.drafted) if drafting else common
        cache, context = self.cache, self.context
        self.ids, self.cache = [], None
        self.drafted = 0 if drafting else min(self.drafted, held)
        if not self.drafted:
            self.context = None
        if not held or cache is None:
            return None, 0
        return Caches(cache, context if drafting else None), held

    def set_aside(self, context: KVCache | None, drafted: int) -> None:
        """Keep the drafter's context while an answer goes on with plain steps."""
        self.context, self.drafted = context, drafted

    def keep(self, ids: list[int], state: DecodeState) -> None:
        """Keep a state's caches, which hold `ids`; of a state that a program has taken there is nothing to keep."""
        if any(buffer.is_deleted() for buffer in jax.tree.leaves((state.cache, state.context))):
            self.context, self.drafted = None, 0
            return
        self.ids, self.cache = ids, state.cache
        if state.context is not None:
            self.set_aside(state.context, len(ids))


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
