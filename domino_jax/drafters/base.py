"""The interface of drafters: what decoding knows of whatever proposes tokens (docs/algorithm.md, section 5).

A drafter is a frozen dataclass: it is static to every program, so it is hashable and holds settings and configs, never
arrays. Its weights and its state are pytrees that decoding passes through.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jax import Array

from domino_jax.attention import Backend
from domino_jax.config import DecoderConfig, TargetConfig
from domino_jax.matrix import AnyMatrix
from domino_jax.paged import AnyKVCache
from domino_jax.sampling import Sampling
from domino_jax.weights import Target


class View(NamedTuple):
    """What a drafter may look at when it proposes: the target, and where each row stands."""

    target: Target
    config: TargetConfig  # the target's
    output: AnyMatrix | None  # a matrix for drafting in the LM head's place, None for the LM head itself
    attention: Backend  # static
    cache: AnyKVCache  # the target's keys and values of positions 0 ... length - 1
    token: Array  # [B] int32, t_a: the last committed token, at position length
    length: Array  # [B] int32, a
    sampling: Sampling  # [B] each
    names: Array | None = None  # [DV] int32, the tokens that drafts' logits are of; the vocabulary in order when None


class DraftTokens(NamedTuple):
    """What a drafter proposes for the J positions after each row's last token, or J nodes of a tree of them."""

    tokens: Array  # [B, J] int32, each in the target's vocabulary; in a tree -1 is a place without a node
    probs: Array | None  # [B, J, V] float32, the distributions that they were drawn from; None where all is greedy
    # A tree alone, whose nodes are chosen and not drawn (`probs` is None): [B, J] int32, the node that each follows, 0
    # for the row's last token and i + 1 for tokens[:, i]. Parents stand before children, and siblings differ.
    parents: Array | None = None
    # [B] int32, how many of a chain decoding verifies; all when None. A drafter that ends one early decides of each
    # token by those before it alone: otherwise the output would be distributed as another's.
    lengths: Array | None = None
    # Of a chain whose drafter has an opinion: [B, J] float32, the logits of how likely each is to be accepted, if those
    # before it are. Each is known before its token is drawn, as `lengths` must be.
    confidence: Array | None = None


class Product(NamedTuple):
    """Matrices of one shape of work: what a cycle reads of them, and multiplies."""

    matrices: tuple[Any, ...]  # read once for all rows
    vectors: int  # of each row, that each matrix is multiplied by in a turn
    turns: int = 1  # one after another; each reads anew
    share: float = 1.0  # of the matrices, where a turn needs a part


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens. What it proposes never changes the output, only how many tokens a cycle commits.

    Three pure functions, traced into the decoding programs. The state is a pytree of arrays whose first axis is the
    row; `observe` has told it about positions 0 ... length - 1, and what lies beyond, as rejected drafts do, must not
    be seen by `propose`: rollback is arithmetic on lengths.
    """

    @property
    def name(self) -> str:
        """What people call it: "Domino", say."""
        ...

    @property
    def config(self) -> DecoderConfig | None:
        """The config of its weights; None where it has none."""
        ...

    @property
    def most(self) -> int:
        """The most tokens that it can propose in a cycle; at least 1."""
        ...

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        """The target's layers whose hidden states `observe` is given, in this order; empty where it needs none."""
        ...

    def scratch(self, proposals: int) -> int:
        """Positions from `length` on that proposing so many tokens may write in its state."""
        ...

    def init(self, batch: int, capacity: int, dtype: Any) -> Any:
        """The state of rows that have no tokens yet.

        An array whose shape depends on `capacity` has one axis of that size. When a row needs more positions, decoding
        makes that axis longer, by zeros. Each `KVCache` in it may be replaced by one in pages, of the same interface.

        Args:
            capacity: positions of a row.
            dtype: of caches.
        """
        ...

    def propose(
        self, weights: Any, state: Any, view: View, proposals: int, keys: Array | None
    ) -> tuple[DraftTokens, Any, AnyKVCache]:
        """Propose `proposals` tokens a row.

        Args:
            proposals: J, static, from 1 to `most`.
            keys: [B, J] random keys, one for each position, with which `sampling.sample` draws its token: coupled
                sampling has the target draw with the same. None where every row is greedy.

        Returns:
            The tokens; where keys are given, with the distributions that they were drawn from, exactly: the output is
            distributed as the target's only then. A row of temperature 0 has one-hot distributions. The state, and the
            target's cache: both may hold anything from `length` on.
        """
        ...

    def observe(
        self, weights: Any, state: Any, tokens: Array, features: Array, start: Array, proposed: bool = False
    ) -> Any:
        """Take note of T positions that the target has run: a part of the prompt, drafts verified, or a plain step.

        Drafts that were then rejected are among them; they lie beyond the new length.

        Args:
            tokens: [B, T] int32, at positions from `start` [B] on.
            features: [B, T, LD], the target's hidden states there after `target_layer_ids`.
            proposed: static; all tokens but the first of each row are what `propose` has just returned with this state.
        """
        ...


@runtime_checkable
class Branching(Protocol):
    """A drafter whose tokens are the nodes of a tree."""

    @property
    def depth(self) -> int:
        """Nodes of the longest path, at most: so many of a cycle's tokens can be accepted."""
        ...

    @property
    def longest_chain(self) -> int:
        """Proposals of the longest chain that it makes where few are asked for; 0 if none."""
        ...

    def branches(self, proposals: int) -> bool:
        """Whether so many proposals are a tree, and not a chain."""
        ...


@runtime_checkable
class Calibrated(Protocol):
    """A drafter of chains that may know how likely each of its drafts is to stand."""

    @property
    def calibrated(self) -> bool:
        """Whether `DraftTokens.confidence` is meant as chances, of temperatures or a confidence head.

        Rows then share by it what is verified.
        """
        ...


@runtime_checkable
class Recalling(Protocol):
    """A drafter whose state holds more of each position than `KVCache`s, and can tell it from the tokens alone.

    One whose state holds other arrays and is not of this kind runs every prompt whole: no prefix is shared.
    """

    def recall(self, state: Any, tokens: Array) -> Any:
        """The state of rows that begin with tokens [B, S], which an earlier row had run."""
        ...


@runtime_checkable
class Counted(Protocol):
    """A drafter that says what it multiplies, for the roofline of `infer.bench`."""

    def products(self, weights: Any, proposals: int) -> Sequence[Product]:
        """What proposing so many tokens multiplies."""
        ...
