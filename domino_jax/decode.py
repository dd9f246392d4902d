"""Decoding: prefill, the fused cycle of drafting and verification, and plain steps (docs/algorithm.md, section 5).

`prefill`, `first_token`, `insert`, `speculate` and `autoregress` are the jit boundaries. The two loops run
several cycles a dispatch; the host then fetches one `Emitted`, a few integers a row. They stop
early when every row is done or the length bucket is full, in which case the caller calls `grow_caches`.
Rows come and go meanwhile: `insert` puts prefilled ones in the place of others (`runtime.slots`).

Of what drafts, this file knows the interface alone (`domino_jax.drafters.base`).
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from domino_jax import cache as kv
from domino_jax import target, verify
from domino_jax import tree as trees
from domino_jax.attention import Backend
from domino_jax.config import TargetConfig
from domino_jax.drafters.base import Branching, Drafter, DraftTokens, Recalling, View
from domino_jax.errors import DominoError
from domino_jax.paged import AnyKVCache, in_pages, is_paged, with_pages
from domino_jax.processors import Processors, count_tokens, process_logits
from domino_jax.ragged import Ragged, ragged
from domino_jax.sampling import Sampling, finite_logits, pick, probabilities, sample
from domino_jax.sharding import shard_copy, zeros
from domino_jax.tree import Tree
from domino_jax.weights import Params

LARGEST_CHUNK = 512  # prompt tokens a prefill program runs at once; bounds its memory
SMALLEST_CHUNK = 16
# What follows a conversation's earlier turns has any length, and each chunk size is a program to compile: two are used.
CONTINUED_CHUNK = 64


@dataclass(frozen=True)
class DecodeConfig:
    """What is being run, static to every program: the target, and the drafter or None.

    `drafts` verifies only the first so many of what the drafter can propose: a cycle becomes cheaper, and greedy
    output, and the distribution of samples, stay as they are.

    `attention` is its backend on this device (`attention.available_backends`).

    `logprobs` asks for those of so many likeliest tokens at each position, and of the chosen one; of none when 0.

    `confidence` asks for how sure a drafter of chains is of its drafts, as `DraftTokens` has it.

    `verified` is Q, tokens that the target runs in a cycle for all rows together, where rows have lengths of their own.

    `by_confidence` has the program choose those lengths in each cycle: Q goes to the drafts that the drafter thinks
    likeliest to stand (DSpark's algorithm 1, arXiv 2607.05147, whose budget the caller decides).

    Raises:
        DominoError: `drafts` is not from 1 to the drafter's proposals.
    """

    target: TargetConfig
    drafter: Drafter | None = None
    drafts: int | None = None
    attention: Backend = "xla"
    logprobs: int = 0
    verified: int | None = None
    confidence: bool = False
    by_confidence: bool = False

    def __post_init__(self) -> None:
        if self.drafts is not None and not 1 <= self.drafts <= (self.drafter.most if self.drafter else 0):
            most = f"a cycle of this drafter has {self.drafter.most} at most" if self.drafter else "there is no drafter"
            raise DominoError(f"{self.drafts} drafts a cycle can't be had: {most}, and the least is 1.")

    @property
    def draft(self) -> Any:
        """The config of the drafter's weights; None without a drafter, or for one without weights."""
        return self.drafter.config if self.drafter else None

    @property
    def without_drafter(self) -> "DecodeConfig":
        """The same without the drafter."""
        return DecodeConfig(self.target, attention=self.attention)

    @property
    def proposals(self) -> int:
        """J, drafts of a cycle; 0 without a drafter."""
        return self.drafts or (self.drafter.most if self.drafter else 0)

    @property
    def branching(self) -> bool:
        """Whether the drafts of a cycle are a tree."""
        return isinstance(self.drafter, Branching) and self.drafter.branches(self.proposals)

    @property
    def depth(self) -> int:
        """P, drafts that a cycle can accept at most: all, or of a tree a path."""
        return min(self.proposals, self.drafter.depth) if isinstance(self.drafter, Branching) else self.proposals

    @property
    def lookahead(self) -> int:
        """Positions from a row's last token on that one cycle may write; 2 at least."""
        return max(self.drafter.scratch(self.proposals) if self.drafter else 0, self.proposals + 1, 2)


class Rows(NamedTuple):
    """What is asked for each row. All of it is data: no mix of requests is a program of its own."""

    keys: Array  # [B] random keys, one a row: an answer does not depend on its batch neighbours
    limit: Array  # [B] int32, tokens to generate at most
    stop: Array  # [B, E] int32, ids that end the row; -1 is none
    sampling: Sampling  # [B] each
    coupled: Array  # [B] bool: a draw depends on the key and the position alone (`verify.accept_coupled`)


class DecodeState(NamedTuple):
    """Everything that lives between cycles. Row b has committed tokens t_0 ... t_a with a = length[b]."""

    token: Array  # [B] int32, t_a: the last committed token, which the target has not run yet
    length: Array  # [B] int32, a: both caches are valid for positions 0 ... a - 1
    emitted: Array  # [B] int32, tokens generated so far
    done: Array  # [B] bool, a stop token was emitted, the limit reached, or a logit was not finite
    finite: Array  # [B] bool, every token was chosen by finite logits; where not, what precedes the choice was emitted
    rows: Rows  # what is asked
    processors: Processors | None  # what changes the logits; None in programs that know of none
    cache: AnyKVCache  # the target's keys and values
    drafter: Any  # the drafter's state of the same positions; None without a drafter


class Caches(NamedTuple):
    """What an earlier state holds of its positions, for a new one to begin with."""

    target: AnyKVCache
    drafter: Any  # None without a drafter


class Logprobs(NamedTuple):
    """Log-probabilities of the target itself, before temperature, filters and penalties."""

    chosen: Array  # [..., T] float32, of the tokens that were taken
    ids: Array  # [..., T, K] int32, the likeliest tokens, the likeliest first
    values: Array  # [..., T, K] float32


class Emitted(NamedTuple):
    """What some cycles gave; C is the number a dispatch may run, J = P = 0 for autoregressive steps."""

    cycles: Array  # [] int32, how many of the C entries count
    tokens: Array  # [C, B, P + 1] int32, of which the first `counts` are new output
    counts: Array  # [C, B] int32, 0 for a row that was already done
    accepted: Array  # [C, B] int32, drafts accepted, counted whole even where a stop cut the output
    drafts: Array  # [C, B, J] int32, what was proposed, those accepted first; -1 is a tree's place without a node
    verified: Array  # [C, B] int32, how many of the drafts the target was asked about
    logprobs: Logprobs | None  # [C, B, P + 1], where asked for
    confidence: Array | None = None  # [C, B, J] float32, logits of how likely each draft was, where asked for


def new_rows(
    keys: Array,
    limits: Sequence[int],
    stop: Any,
    sampling: Sampling,
    coupled: Sequence[bool] | None = None,
) -> Rows:
    """What is asked for B rows, from the host.

    Args:
        keys: [B] random keys.
        limits: B, tokens to generate at most, at least 1 each.
        stop: ids that end a row: [E], or [B, E] filled up with -1.
        sampling: [B] each.
        coupled: B; none of them when None.
    """
    batch = len(limits)
    stop = np.asarray(stop, np.int32)
    return Rows(
        keys=shard_copy(keys, "B"),  # copies: states are donated, and what the caller gave stays the caller's
        limit=shard_copy(np.array(limits, np.int32), "B"),
        stop=shard_copy(np.broadcast_to(stop, (batch, stop.shape[-1])), "B -"),
        sampling=jax.tree.map(lambda x: shard_copy(x, "B"), sampling),
        coupled=shard_copy(np.zeros(batch, bool) if coupled is None else np.array(coupled, bool), "B"),
    )


def init_caches(configs: DecodeConfig, batch: int, capacity: int, dtype: jnp.dtype) -> Caches:
    """The caches of rows that hold nothing yet."""
    drafter = configs.drafter.init(batch, capacity, dtype) if configs.drafter else None
    return Caches(kv.init_cache(configs.target, batch, capacity, dtype), drafter)


def position_bytes(configs: DecodeConfig, dtype: Any) -> int:
    """Bytes of the keys and values of one position of a row, the target's and the drafter's, over all devices."""
    size = kv.SMALLEST_BUCKET
    caches = jax.eval_shape(lambda: init_caches(configs, 1, size, dtype))
    nodes = jax.tree.leaves(caches, is_leaf=lambda node: isinstance(node, kv.KVCache))
    held = [leaf for node in nodes if isinstance(node, kv.KVCache) for leaf in jax.tree.leaves(node)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in held) // size


def init_paged_caches(configs: DecodeConfig, batch: int, capacity: int, dtype: Any, count: int, size: int) -> Caches:
    """The same in pages.

    Args:
        count: pages of the pool, the first of which is never used; 0 for tables alone.
        size: positions of a page.
    """
    tables = _paged_tables(configs, batch, capacity, dtype, size)
    if not count:
        return tables
    shapes = jax.eval_shape(lambda: init_caches(configs, batch, capacity, dtype))
    return with_pages(tables, in_pages(shapes, count, size, dtype))


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _paged_tables(configs: DecodeConfig, batch: int, capacity: int, dtype: Any, size: int) -> Caches:
    """`init_paged_caches` without pages: what is not a cache of keys and values has values of its own."""
    return in_pages(init_caches(configs, batch, capacity, dtype), 0, size, dtype)


def shares_prefixes(configs: DecodeConfig) -> bool:
    """Whether rows can go on from pages that another row has filled: the drafter's state must be known from them."""
    drafter = configs.drafter
    if drafter is None or isinstance(drafter, Recalling):
        return True
    state = jax.eval_shape(lambda: in_pages(drafter.init(1, 128, jnp.float32), 0, 128, jnp.float32))
    return all(is_paged(node) for node in jax.tree.leaves(state, is_leaf=is_paged))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def recall(configs: DecodeConfig, state: DecodeState, tokens: Array) -> DecodeState:
    """The state of rows that begin with tokens [B, S], of which the caches hold keys and values already."""
    if not isinstance(configs.drafter, Recalling):
        return state
    return state._replace(drafter=configs.drafter.recall(state.drafter, tokens))


def begin(rows: Rows, lengths: Sequence[int], caches: Caches, processors: Processors | None = None) -> DecodeState:
    """The state of rows that have prompts of these lengths; `prefill` runs them. A row of length 0 is done."""
    batch, empty = len(lengths), np.array(lengths) == 0
    return DecodeState(
        token=zeros((batch,), jnp.int32, "B"),
        length=shard_copy(np.array(lengths, np.int32), "B"),
        emitted=zeros((batch,), jnp.int32, "B"),
        done=shard_copy(empty, "B"),
        finite=shard_copy(np.ones(batch, bool), "B"),
        rows=rows,
        processors=processors,
        cache=caches.target,
        drafter=caches.drafter,
    )


def prefill_batch(
    params: Params,
    configs: DecodeConfig,
    prompts: Sequence[Sequence[int]],
    rows: Rows,
    dtype: jnp.dtype,
    caches: Caches | None = None,
    held: int = 0,
) -> DecodeState:
    """Run the prompts to their ends; see `prefill_steps`."""
    return run_to_end(prefill_steps(params, configs, prompts, rows, dtype, caches, held))[0]


Returned = TypeVar("Returned")
PrefillSteps = Generator[None, None, tuple[DecodeState, Logprobs | None]]


def run_to_end(steps: Generator[None, None, Returned]) -> Returned:
    """Run the rest of what goes in steps, a prefill say, at once; what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def prefill_steps(
    params: Params,
    configs: DecodeConfig,
    prompts: Sequence[Sequence[int]],
    rows: Rows,
    dtype: jnp.dtype,
    caches: Caches | None = None,
    held: int = 0,
    processors: Processors | None = None,
) -> PrefillSteps:
    """Run the prompts, in chunks, and commit each row's first token, which counts as generated.

    Where an earlier state's caches already hold how every prompt begins, only what follows is run. At least the last
    id always is, for its hidden state.

    Args:
        prompts: B lists of at least one id, of any lengths.
        rows: what is asked, donated.
        dtype: of the caches.
        caches: those of an earlier state of as many rows, donated; new ones when None.
        held: positions of which `caches` hold keys and values of the prompts' own first ids, the drafter's context
            too if there is one. A row whose prompt is not longer gets a first token without meaning.
        processors: donated; None where no row's logits are changed.

    Yields:
        Between chunks, so that something else can run there.

    Returns:
        The state, and the first tokens' log-probabilities [B, 1], where asked for.
    """
    batch, longest = len(prompts), max(map(len, prompts))
    capacity = kv.length_bucket(longest + configs.lookahead)
    offsets = prefill_chunks(longest, held, capacity)
    tokens = np.zeros((batch, len(offsets) * offsets.step), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        rest = prompt[offsets.start :]
        row[: len(rest)] = rest
    caches = caches or init_caches(configs, batch, capacity, dtype)
    state = begin(rows, [len(p) for p in prompts], caches, processors)
    del caches  # they are the state's now
    if state.cache.capacity != capacity:
        state = grow_caches(configs, state, capacity)
    last = zeros((batch, configs.target.hidden_size), params.target.norm.dtype, "B D")
    for piece, offset in zip(np.split(tokens, len(offsets), axis=1), offsets, strict=True):
        if offset > offsets.start:
            yield
        state, last = prefill(params, configs, state, shard_copy(piece, "B T"), np.int32(offset), last)
    jax.block_until_ready(last)  # what compiles next would hide its time
    return first_token(params, configs, state, last)


def prefill_chunks(longest: int, held: int, capacity: int) -> range:
    """The chunks of a prefill, by their first positions; `start`, `step` and `stop` are what they cover together.

    Args:
        longest: ids of the longest prompt.
        held: positions that need not be run again, 0 for none; where going on from them would run no fewer positions,
            padding included, the prompt is run from its first id.
        capacity: positions of the caches, which the last chunk's padding must not exceed: it would rather begin sooner
            and run some of the held positions again.
    """
    step = min(LARGEST_CHUNK, max(SMALLEST_CHUNK, 1 << (longest - 1).bit_length()))
    afresh = range(0, -(-longest // step) * step, step)
    held = min(held, longest - 1)
    if held > 0:
        step = min(CONTINUED_CHUNK, LARGEST_CHUNK) if longest - held <= LARGEST_CHUNK else LARGEST_CHUNK
        width = -(-(longest - held) // step) * step
        if width < afresh.stop:  # a short prompt is run as quickly from its first id
            start = min(held, capacity - width)
            return range(start, start + width, step)
    return afresh


@partial(jax.jit, static_argnums=1, donate_argnums=(2, 5))
def prefill(
    params: Params, configs: DecodeConfig, state: DecodeState, tokens: Array, offset: Array, last: Array
) -> tuple[DecodeState, Array]:
    """Run one chunk of the prompts, the same positions in every row.

    Args:
        tokens: [B, T] int32, right-padded with anything.
        offset: [] int32, the chunk's first position.
        last: [B, D] hidden state of each prompt's last token, where an earlier chunk held it.

    Returns:
        The state with both caches filled, and `last` updated.
    """
    start = jnp.broadcast_to(offset, state.length.shape)
    with jax.named_scope("target"):
        hidden, features, cache = _forward(params, configs, state.cache, tokens, start)
    state = _observe(params, configs, state._replace(cache=cache), tokens, features, start)
    index = state.length - 1 - offset
    here = (index >= 0) & (index < tokens.shape[1])
    picked = jnp.take_along_axis(hidden, jnp.clip(index, 0, tokens.shape[1] - 1)[:, None, None], axis=1)[:, 0]
    return state, jnp.where(here[:, None], picked, last)


@partial(jax.jit, static_argnums=1, donate_argnums=2)
def first_token(
    params: Params, configs: DecodeConfig, state: DecodeState, last: Array
) -> tuple[DecodeState, Logprobs | None]:
    """Commit the target's next token after the prompt: the first generated one, and the first anchor.

    A row whose logits are not finite is done, and its token means nothing.
    """
    sampling = state.rows.sampling
    plain = target.logits(params.target, configs.target, last[:, None])
    logits = _processed(state, plain, jnp.zeros((plain.shape[0], 0), jnp.int32))
    keys = _draw_keys(state.rows.keys, state.length[:, None])
    token = sample(keys[..., 0], probabilities(logits, sampling))[:, 0]
    token = jnp.where(sampling.temperature > 0, token, jnp.argmax(logits, axis=-1)[:, 0]).astype(jnp.int32)
    emitted = state.emitted + 1
    finite = finite_logits(logits, sampling.temperature)[:, 0]
    stopped = _stops(token[:, None], state.rows.stop)[:, 0]
    done = stopped | (emitted >= state.rows.limit) | ~finite
    processors = state.processors and count_tokens(state.processors, token[:, None], finite.astype(jnp.int32))
    state = state._replace(token=token, emitted=emitted, done=done, finite=finite, processors=processors)
    return state, _logprobs(configs, plain, token[:, None])


def _processed(state: DecodeState, logits: Array, drafts: Array, tree: Tree | None = None) -> Array:
    """The logits that tokens are chosen by; see `processors.process_logits`."""
    if state.processors is None:
        return logits
    return process_logits(logits, drafts, state.emitted, state.rows.stop, state.processors, tree)


def _logprobs(configs: DecodeConfig, logits: Array, tokens: Array) -> Logprobs | None:
    """Of logits [B, T, V], those of tokens [B, T] and of the likeliest."""
    if not configs.logprobs:
        return None
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    values, ids = jax.lax.top_k(logprobs, min(configs.logprobs, configs.target.vocab_size))
    return Logprobs(pick(logprobs, tokens), ids.astype(jnp.int32), values)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def insert(configs: DecodeConfig, state: DecodeState, new: DecodeState, slots: Array) -> DecodeState:
    """The state with the rows of another one, which `prefill_steps` has given, in the place of some of its own.

    Args:
        new: P rows, of as many positions or fewer, and as many stop ids. Where caches are in pages both states come
            without the pages, and the table is the caller's.
        slots: [P] int32, the row that each becomes; B or above for one that is left out.
    """

    def put(held: Array, row: Array, axis: int) -> Array:
        if axis > 0 and row.shape[axis] < held.shape[axis]:
            window = (slots, *[slice(None)] * (axis - 1), slice(0, row.shape[axis]))
            return held.at[window].set(row, mode="drop")
        return held.at[slots].set(row, mode="drop")

    axes = jax.tree.map(lambda _: -1, state)
    cache, drafter = position_axes(configs, state)
    return jax.tree.map(put, state, new, axes._replace(cache=cache, drafter=drafter))


def position_keys(state: DecodeState, proposals: int) -> Array:
    """The random keys of the positions of a cycle, its bonus's too: [B, J + 1, 2], one to draw with, one to verify.

    A position's keys are the row's and the position's alone. Drafts that were rejected are drawn anew with the same
    keys: nothing of the output depended on them.
    """
    return _draw_keys(state.rows.keys, state.length[:, None] + 1 + jnp.arange(proposals + 1, dtype=jnp.int32))


def _draw_keys(keys: Array, positions: Array) -> Array:
    """Keys [B] at positions [B, T]: [B, T, 2]."""
    folded = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, positions)
    return jax.vmap(jax.vmap(jax.random.split))(folded)


def _stops(tokens: Array, stop: Array) -> Array:
    """Whether tokens [B, T] are among their row's stop ids [B, E]: [B, T] bool."""
    return (tokens[..., None] == stop[:, None, :]).any(axis=-1)


Accept = Callable[[Array | None, DraftTokens, Array, DecodeState], tuple[Array, Array]]


def accept(keys: Array | None, draft: DraftTokens, logits: Array, state: DecodeState) -> tuple[Array, Array]:
    """How many drafts stand, and the target's own token after them.

    Args:
        keys: [B, J + 1, 2], see `position_keys`; None where every row is greedy.
        logits: [B, J + 1, V] of the target over [last token, drafts].

    Returns:
        accepted count m [B] and the next token [B], int32.
    """
    none = draft.tokens.shape[1] == 0
    if keys is None:
        if none:
            return jnp.zeros_like(state.token), jnp.argmax(logits, axis=-1)[:, 0].astype(jnp.int32)
        return verify.accept_greedy(draft.tokens, logits, draft.lengths)
    p = probabilities(logits, state.rows.sampling)
    if none:  # both samplers draw alike
        return jnp.zeros_like(state.token), sample(keys[..., 0], p)[:, 0]
    assert draft.probs is not None, "drawn drafts come with their distributions"
    coupled = state.rows.coupled
    by_rejection = verify.accept_sampled(keys[..., 1], draft.tokens, draft.probs, p, draft.lengths)
    alike = jax.lax.cond(
        coupled.any(),
        lambda: verify.accept_coupled(keys[..., 0], draft.tokens, p, draft.lengths),
        lambda: by_rejection,
    )
    count, token = jax.tree.map(lambda a, b: jnp.where(coupled, a, b), alike, by_rejection)
    return count, token


def choices_at_nodes(keys: Array | None, tree: Tree, logits: Array, sampling: Sampling) -> Array:
    """The target's own token after each node of a tree, drawn with the key of its position: [B, T] int32.

    Whatever the nodes are, the output is distributed as the target's, and it is the sample of `verify.accept_coupled`.

    Args:
        keys: [B, P + 1, 2], see `position_keys`; None where every row is greedy.
        logits: [B, T, V] of the target.
    """
    if keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return sample(jnp.take_along_axis(keys[..., 0], tree.depth, axis=1), probabilities(logits, sampling))


@partial(jax.jit, static_argnums=(1, 3, 4, 6), donate_argnums=2)
def speculate(
    params: Params,
    configs: DecodeConfig,
    state: DecodeState,
    cycles: int,
    greedy: bool,
    most: Array | np.integer | None = None,
    accept: Accept = accept,
    lengths: Array | None = None,
) -> tuple[DecodeState, Emitted]:
    """Up to `cycles` cycles of drafting and verification in one program.

    Args:
        cycles: C; the loop ends before that when all rows are done or one has no room left.
        greedy: every row has temperature 0, so no distribution needs to be formed.
        most: [] int32, ends it sooner without another program; C when None.
        accept: decides which drafts of a chain stand. Another one is for measuring speed: its output is worthless.
        lengths: [B] int32, how many of each row's drafts are verified, decided before they are drawn: with the last
            tokens `configs.verified` together at most. All of all rows when None. With `configs.by_confidence` the most
            that a row may have, all together any number.
    """
    assert configs.drafter is not None, "speculate needs a drafter; autoregress does without"

    def cycle(state: DecodeState) -> tuple[DecodeState, _Cycle]:
        keys = None if greedy else position_keys(state, configs.depth)
        draft, state = propose(params, configs, state, None if keys is None else keys[:, :-1, 0])
        if lengths is not None:
            draft = draft._replace(lengths=_shortened(configs, draft, state, lengths))
        return _verify(params, configs, state, draft, keys, accept)

    return _loop(cycle, state, cycles, most, configs, configs.proposals, configs.depth)


def _shortened(configs: DecodeConfig, draft: DraftTokens, state: DecodeState, lengths: Array) -> Array:
    """Drafts of each row that are verified [B], where they are given lengths; see `speculate`."""
    if draft.lengths is not None:
        lengths = jnp.minimum(lengths, draft.lengths)
    if not configs.by_confidence:
        return lengths
    assert draft.confidence is not None and configs.verified is not None, "shares need confidences and a budget"
    most = jnp.where(state.done, 0, lengths)
    return verify.likeliest_prefixes(draft.confidence, most, configs.verified - lengths.shape[0])


@partial(jax.jit, static_argnums=(1, 3, 4), donate_argnums=2)
def autoregress(
    params: Params,
    configs: DecodeConfig,
    state: DecodeState,
    cycles: int,
    greedy: bool,
    most: Array | np.integer | None = None,
) -> tuple[DecodeState, Emitted]:
    """Up to `cycles` plain one-token steps: how a target runs without a drafter.

    A drafter that is there observes each step, so that the state can go on with drafts at any time. Without one this is
    the autoregressive baseline.
    """

    def step(state: DecodeState) -> tuple[DecodeState, _Cycle]:
        none = DraftTokens(jnp.zeros((state.token.shape[0], 0), jnp.int32), None)
        return _verify(params, configs, state, none, None if greedy else position_keys(state, 0), accept)

    return _loop(step, state, cycles, most, configs, 0, 0)


def propose(
    params: Params, configs: DecodeConfig, state: DecodeState, keys: Array | None
) -> tuple[DraftTokens, DecodeState]:
    """What the drafter proposes for one cycle, and the state with what it wrote.

    Args:
        keys: [B, J], of a tree [B, P]; None where every row is greedy.
    """
    assert configs.drafter is not None
    draft, drafter, cache = configs.drafter.propose(
        params.draft, state.drafter, view(params, configs, state), configs.proposals, keys
    )
    return draft, state._replace(drafter=drafter, cache=cache)


def view(params: Params, configs: DecodeConfig, state: DecodeState) -> View:
    """What the drafter may look at."""
    return View(
        params.target,
        configs.target,
        params.output,
        configs.attention,
        state.cache,
        state.token,
        state.length,
        state.rows.sampling,
    )


class _Cycle(NamedTuple):
    """What one cycle gave; the fields are those of Emitted, without C."""

    tokens: Array
    counts: Array
    accepted: Array
    drafts: Array
    verified: Array
    logprobs: Logprobs | None
    confidence: Array | None = None


def _verify(
    params: Params,
    configs: DecodeConfig,
    state: DecodeState,
    draft: DraftTokens,
    keys: Array | None,
    accept: Accept,
) -> tuple[DecodeState, _Cycle]:
    """Run the target over the drafts, accept, tell the drafter, and commit: the rest of a cycle after the proposal."""
    if draft.parents is not None:
        return _verify_tree(params, configs, state, draft, keys)
    if draft.lengths is not None and configs.verified is None:
        plain, features, cache = _run_target_to_the_longest(params, configs, state, draft.tokens, draft.lengths)
    else:
        plain, features, cache = run_target(params, configs, state, draft.tokens, lengths=draft.lengths)
    with jax.named_scope("verify"):
        logits = _processed(state, plain, draft.tokens)
        accepted, bonus = accept(keys, draft, logits, state)
        finite = finite_logits(logits, state.rows.sampling.temperature)
    tokens = jnp.concatenate([state.token[:, None], draft.tokens], axis=1)
    # Rejected positions are written too; they lie beyond the new length and are never seen.
    state = _observe(
        params, configs, state._replace(cache=cache), tokens, features, state.length, draft.tokens.shape[1] > 0
    )
    sequence = jnp.pad(draft.tokens, ((0, 0), (0, 1)))
    sequence = jnp.where(jnp.arange(sequence.shape[1]) == accepted[:, None], bonus[:, None], sequence)
    state, ended = _end_cycle(configs, state, sequence, accepted, finite, draft.tokens, plain)
    if draft.lengths is not None:
        ended = ended._replace(verified=draft.lengths)
    return state, ended._replace(confidence=draft.confidence if configs.confidence else None)


def _verify_tree(
    params: Params, configs: DecodeConfig, state: DecodeState, draft: DraftTokens, keys: Array | None
) -> tuple[DecodeState, _Cycle]:
    """`_verify` for a tree. What its path has left in the cache, and of hidden states, is put in the path's order."""
    assert draft.parents is not None
    tree = trees.tree_of(draft.parents, configs.depth)
    drafts = jnp.maximum(draft.tokens, 0)  # what runs where there is no node
    plain, features, cache = run_target(params, configs, state, drafts, tree)
    with jax.named_scope("verify"):
        logits = _processed(state, plain, drafts, tree)
        choices = choices_at_nodes(keys, tree, logits, state.rows.sampling)
        tokens = jnp.concatenate([state.token[:, None], draft.tokens], axis=1)
        path = trees.walk(tree, tokens, choices, configs.depth)
        sequence = trees.along(choices, path.nodes)  # a node's choice is the next one's token; the last is the bonus
        finite = trees.along(finite_logits(logits, state.rows.sampling.temperature), path.nodes)
        standing_first = jnp.argsort(~path.stands[:, 1:], axis=1, stable=True)
        drafts = jnp.take_along_axis(draft.tokens, standing_first, axis=1)
    with jax.named_scope("context"):
        cache = cache.compact(state.length, path.nodes, configs.proposals + 1)
        tokens, features = trees.along(tokens, path.nodes), trees.along(features, path.nodes)
    state = _observe(params, configs, state._replace(cache=cache), tokens, features, state.length)
    if configs.logprobs:
        plain = trees.along(plain, path.nodes)
    return _end_cycle(configs, state, sequence, path.accepted, finite, drafts, plain)


def _end_cycle(
    configs: DecodeConfig,
    state: DecodeState,
    sequence: Array,
    accepted: Array,
    finite: Array,
    drafts: Array,
    plain: Array,
) -> tuple[DecodeState, _Cycle]:
    """Commit what a cycle gave.

    Args:
        sequence: [B, P + 1], of which `accepted` [B] drafts and the token after them are new output.
        finite: [B, P + 1], whether each was chosen by finite logits.
        drafts: [B, J], as in `Emitted`.
        plain: [B, P + 1, V], the target's logits before each; not read where no log-probabilities are asked for.
    """
    chosen = verify.prefix_length(finite)
    state, counts = commit(state, sequence, jnp.minimum(accepted + 1, chosen))
    broken = ~state.done & (chosen <= accepted)
    processors = state.processors and count_tokens(state.processors, sequence, counts)
    state = state._replace(done=state.done | broken, finite=state.finite & ~broken, processors=processors)
    verified = jnp.full_like(counts, drafts.shape[1])
    return state, _Cycle(sequence, counts, accepted, drafts, verified, _logprobs(configs, plain, sequence))


def _observe(
    params: Params,
    configs: DecodeConfig,
    state: DecodeState,
    tokens: Array,
    features: Array,
    start: Array,
    proposed: bool = False,
) -> DecodeState:
    """Tell the drafter, if there is one, what the target has run."""
    if configs.drafter is None:
        return state
    observed = configs.drafter.observe(params.draft, state.drafter, tokens, features, start, proposed)
    return state._replace(drafter=observed)


def run_target(
    params: Params,
    configs: DecodeConfig,
    state: DecodeState,
    drafts: Array,
    tree: Tree | None = None,
    lengths: Array | None = None,
) -> tuple[Array, Array, AnyKVCache]:
    """The target over [last token, drafts]: logits [B, J + 1, V], features [B, J + 1, LD], its cache.

    Args:
        tree: of the last token and the drafts; they follow each other when None.
        lengths: [B], drafts of each row that are run; what stands behind them means nothing. All when None.
    """
    tokens = jnp.concatenate([state.token[:, None], drafts], axis=1)
    with jax.named_scope("target"):
        packed = None
        if lengths is not None:
            assert configs.verified is not None, "rows with lengths need the number of tokens in all"
            packed = ragged(lengths + 1, tokens.shape[1], configs.verified)
        hidden, features, cache = _forward(params, configs, state.cache, tokens, state.length, tree, packed)
        logits = target.logits(params.target, configs.target, hidden)
        if packed is not None:
            logits, features = packed.rows(logits), packed.rows(features)
        return logits, features, cache


def _run_target_to_the_longest(
    params: Params, configs: DecodeConfig, state: DecodeState, drafts: Array, lengths: Array
) -> tuple[Array, Array, AnyKVCache]:
    """`run_target` where each row verifies its first `lengths` [B] drafts: no more tokens than the longest row needs.

    Shapes are static, so the program has a few numbers of tokens, and runs the next one above.
    """
    most = drafts.shape[1]
    sizes = sorted({0, most // 2, most})

    def run(count: int, state: DecodeState) -> tuple[Array, Array, AnyKVCache]:
        logits, features, cache = run_target(params, configs, state, drafts[:, :count])
        logits, features = (jnp.pad(x, ((0, 0), (0, most - count), (0, 0))) for x in (logits, features))
        return logits, features, cache

    size = jnp.sum(jnp.max(lengths) > jnp.array(sizes[:-1]))
    return jax.lax.switch(size, [partial(run, count) for count in sizes], state)


def _forward(
    params: Params,
    configs: DecodeConfig,
    cache: AnyKVCache,
    tokens: Array,
    start: Array,
    tree: Tree | None = None,
    lengths: Ragged | None = None,
) -> tuple[Array, Array, AnyKVCache]:
    target_layer_ids = configs.drafter.target_layer_ids if configs.drafter else ()
    hidden, features, written = target.forward(
        params.target,
        configs.target,
        tokens,
        start,
        cache,
        target_layer_ids,
        configs.attention,
        tree=tree,
        lengths=lengths,
    )
    assert written is not None
    return hidden, features, written


def commit(state: DecodeState, sequence: Array, count: Array) -> tuple[DecodeState, Array]:
    """Append the first `count` of sequence [B, T] to each row that is not done, up to its stop or limit.

    Returns:
        The state, and how many tokens each row took [B] (0 for a row that was done).
    """
    place = jnp.arange(sequence.shape[1])
    stopping = _stops(sequence, state.rows.stop) & (place < count[:, None])
    until_stop = jnp.where(stopping.any(axis=1), jnp.argmax(stopping, axis=1) + 1, sequence.shape[1])
    taken = jnp.minimum(jnp.minimum(count, until_stop), state.rows.limit - state.emitted)
    taken = jnp.where(state.done, 0, taken).astype(jnp.int32)
    newest = jnp.take_along_axis(sequence, jnp.maximum(taken - 1, 0)[:, None], axis=1)[:, 0]
    emitted = state.emitted + taken
    stopped = (stopping & (place < taken[:, None])).any(axis=1)
    return (
        state._replace(
            token=jnp.where(taken > 0, newest, state.token),
            length=state.length + taken,
            emitted=emitted,
            done=state.done | stopped | (emitted >= state.rows.limit),
        ),
        taken,
    )


def grow_caches(configs: DecodeConfig, state: DecodeState, capacity: int) -> DecodeState:
    """The state in a length bucket of another size; the buffers of the old state are deleted.

    One buffer is resized at a time, so that no second cache exists beside the new one.
    """
    held, axes = (state.cache, state.drafter), position_axes(configs, state)

    def resized(buffer: Array, axis: int) -> Array:
        if axis < 0:
            return buffer
        new = _resized(buffer, capacity, axis)
        if not isinstance(buffer, Tracer):  # whoever traces `prefill_batch` has no memory to free
            buffer.delete()
        return new

    cache, drafter = jax.tree.map(resized, held, axes)
    return state._replace(cache=cache, drafter=drafter)


def take_rows(state: DecodeState, rows: np.ndarray, live: int) -> DecodeState:
    """The state of other rows of the same state, in this order; the buffers of the old state are deleted.

    One buffer is taken at a time, so that no second cache exists beside the new one.

    Args:
        rows: as many as the new state has.
        live: how many of the first ones go on; the others are done, and only fill the batch.
    """
    index = shard_copy(rows.astype(np.int32), "-")

    def taken(buffer: Array) -> Array:
        new = _taker(buffer.sharding)(buffer, index)
        buffer.delete()
        return new

    state = jax.tree.map(taken, state)
    return state._replace(done=shard_copy(np.arange(len(rows)) >= live, "B") | state.done)


@lru_cache
def _taker(sharding: jax.sharding.Sharding) -> Callable[[Array, Array], Array]:
    return jax.jit(lambda buffer, rows: buffer[rows], out_shardings=sharding)


def position_axes(configs: DecodeConfig, state: DecodeState) -> tuple[Any, Any]:
    """For each array of a state's caches the axis that has as many entries as a row has positions; -1 for none.

    The arrays of a cache in pages have none: the table is the caller's.
    """

    def same(node: Any, axes: Any) -> Any:
        return jax.tree.map(lambda _: -1, node) if is_paged(node) else axes

    axes = jax.tree.map(lambda _: kv.POSITIONS, state.cache)
    drafter = _position_axes(configs.drafter, state.token.shape[0])
    drafter = jax.tree.map(same, state.drafter, drafter, is_leaf=is_paged)
    return same(state.cache, axes), drafter


@lru_cache
def _position_axes(drafter: Drafter | None, batch: int) -> Any:
    """`position_axes` of a drafter's state whose caches are contiguous."""
    if drafter is None:
        return None
    small, large = (jax.eval_shape(partial(drafter.init, batch, size, jnp.float32)) for size in (128, 256))

    def differing(a: jax.ShapeDtypeStruct, b: jax.ShapeDtypeStruct) -> int:
        return next((i for i, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if x != y), -1)

    return jax.tree.map(differing, small, large)


_resized = jax.jit(kv.resize, static_argnums=(1, 2))


def _loop(
    cycle: Callable[[DecodeState], tuple[DecodeState, _Cycle]],
    state: DecodeState,
    cycles: int,
    most: Array | np.integer | None,
    configs: DecodeConfig,
    proposals: int,
    depth: int,
) -> tuple[DecodeState, Emitted]:
    """Run `cycle`, of so many proposals of that depth, while there is work and room, collecting what it emits."""
    bound, lookahead = cycles if most is None else jnp.minimum(most, cycles), configs.lookahead
    size = cycles, state.token.shape[0]
    likeliest = min(configs.logprobs, configs.target.vocab_size)
    nothing = _Cycle(
        tokens=jnp.zeros((*size, depth + 1), jnp.int32),
        counts=jnp.zeros(size, jnp.int32),
        accepted=jnp.zeros(size, jnp.int32),
        drafts=jnp.zeros((*size, proposals), jnp.int32),
        verified=jnp.zeros(size, jnp.int32),
        logprobs=Logprobs(
            jnp.zeros((*size, depth + 1), jnp.float32),
            jnp.zeros((*size, depth + 1, likeliest), jnp.int32),
            jnp.zeros((*size, depth + 1, likeliest), jnp.float32),
        )
        if likeliest
        else None,
        confidence=jnp.zeros((*size, proposals), jnp.float32) if configs.confidence and proposals else None,
    )

    def more(carry: tuple[DecodeState, Array, _Cycle]) -> Array:
        state, ran, _ = carry
        room = state.done | (state.length + lookahead <= state.cache.room)
        return (ran < bound) & ~state.done.all() & room.all()

    def body(carry: tuple[DecodeState, Array, _Cycle]) -> tuple[DecodeState, Array, _Cycle]:
        state, ran, emitted = carry
        state, new = cycle(state)
        return state, ran + 1, jax.tree.map(lambda held, x: held.at[ran].set(x), emitted, new)

    state, ran, emitted = jax.lax.while_loop(more, body, (state, jnp.zeros((), jnp.int32), nothing))
    return state, Emitted(ran, *emitted)
