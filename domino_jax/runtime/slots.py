"""The host loop: requests come and go while others decode (continuous batching).

A batch has a fixed number of rows, the slots. A request waits, is prefilled beside the batch in chunks, is put into a
free slot, and leaves it at its end. Between two dispatches of decoding at most one chunk's worth of prompt tokens is
run, so that a long prompt does not hold up the others. Nothing is compiled anew, whatever the mix of requests.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.stages import Lowered

from domino_jax import cache, decode
from domino_jax.decode import Accept, Caches, DecodeConfig, DecodeState, Rows
from domino_jax.errors import DominoError
from domino_jax.finite import drafter_is_finite, drafts_look_broken
from domino_jax.processors import MOST_BIASES, allowed_tokens, new_processors
from domino_jax.runtime.background import BackgroundCompiler
from domino_jax.runtime.memory import explain_out_of_memory
from domino_jax.runtime.processes import broadcast_from_first
from domino_jax.runtime.timing import compile_seconds, no_seconds, timed
from domino_jax.sampling import LEAST_PENALTY, Sampling, SamplingParams
from domino_jax.sharding import fetch, model_devices, row_shards, shard_copy
from domino_jax.weights import Params

CYCLES = 8  # of drafts that a dispatch may have
# A plain step gives one token where a cycle gives several: more steps a dispatch, so that it pays no more for it.
STEPS_PER_CYCLE = 4
MOST_LOGPROBS = 20  # likeliest tokens of a position, as OpenAI has it
STOP_IDS = 8  # of a row that the device knows, which then ends a dispatch early; the host looks for all of them
RESPONSE = (
    0.25  # seconds that a dispatch takes at most, about: its tokens arrive together, and who left is run to its end
)
CALM = 2  # dispatches that a smaller batch would have been enough for, before the batch becomes one
PARTS = 4  # numbers of tokens of a cycle, of the whole, that rows with lengths of their own are run in
FULL = 0.5  # of a batch's prompt positions that must be tokens, for its prompts to be run as one


@dataclass(frozen=True, eq=False)
class Request:
    """What to generate for a prompt.

    Args:
        prompt: ids, at least one.
        params: how tokens are chosen, and what ends them.
        numbers: name the request, each from 0 and below 2^32. With the seed they give its random keys.
    """

    prompt: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    numbers: tuple[int, ...] = (0,)


class Cycle(NamedTuple):
    """One draft-and-verify cycle of one request."""

    start: int  # the place of its first token in the output
    tokens: list[int]  # what it added
    accepted: int  # drafts accepted, counted whole even where a stop or the limit cut the output
    drafts: list[int]
    confidence: Sequence[float] = ()  # logits of how likely each draft was, where `DecodeConfig` asks for them


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position of the output: the target's own."""

    chosen: float
    likeliest: list[tuple[int, float]]  # as many as were asked for, the likeliest first


class Guide(Protocol):
    """Says which tokens may come next, such as those that a grammar allows. Its state is that of one output."""

    def allowed(self) -> np.ndarray:
        """A bit for each token, [V / 32] int32."""
        ...

    def accept(self, tokens: Sequence[int]) -> None:
        """Note what has come."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether nothing more may come."""
        ...


@dataclass(eq=False)
class Completion:
    """A request, and what has been generated for it."""

    request: Request
    guide: Guide | None = None  # such a request takes one plain step a dispatch
    speculative: bool = True  # False for plain steps, whatever the others take
    tokens: list[int] = field(default_factory=list)  # a stop token is kept, at the end
    cycles: list[Cycle] = field(default_factory=list)  # of drafts; τ is over these
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of each token, where asked for
    steps: int = 0  # plain ones, without drafts; they are none of τ's
    reused: int = 0  # of the prompt's tokens, those that an earlier request had run
    preemptions: int = 0  # how often it was set aside for want of memory
    finish_reason: str | None = None  # "stop", "length", or "cancelled"; None while it waits or runs
    finite: bool = True  # not where the target's logits after these tokens are not; then it ends without a reason
    seconds: dict[str, float] = field(default_factory=no_seconds)  # its own prefill, and decoding of it with others
    wall_seconds: float = 0.0  # since it was admitted, until it ended

    @property
    def ids(self) -> list[int]:
        """The prompt and the answer to it so far."""
        return [*self.request.prompt, *self.tokens]

    @property
    def accepted(self) -> list[int]:
        """Drafts accepted in each cycle."""
        return [cycle.accepted for cycle in self.cycles]

    def take(self, tokens: list[int]) -> list[int]:
        """Append what a cycle gave; return what of it counts, and note the end."""
        params = self.request.params
        ends = next((i + 1 for i, token in enumerate(tokens) if token in params.stop_token_ids), len(tokens))
        tokens = tokens[: self.count(tokens[:ends])]
        self.tokens += tokens
        if self.guide:
            self.guide.accept(tokens)
        ended = self.guide is not None and self.guide.is_done
        if self.is_cut or ended or self.tokens[-1] in params.stop_token_ids:
            self.finish("stop")
        elif len(self.tokens) >= params.max_tokens:
            self.finish("length")
        return tokens

    def take_logprobs(self, found: decode.Logprobs, count: int) -> None:
        """Note those of the first `count` positions of a cycle, if they are asked for."""
        most = self.request.params.logprobs
        if most is None:
            return
        for chosen, ids, values in zip(*(x[:count].tolist() for x in found), strict=True):
            self.logprobs.append(TokenLogprobs(chosen, list(zip(ids, values, strict=True))[:most]))

    def count(self, tokens: list[int]) -> int:
        """How many of these new tokens count; who looks for ends that the device does not know overrides it."""
        return len(tokens)

    @property
    def is_cut(self) -> bool:
        """Whether the output has ended without a stop token or the limit."""
        return False

    def finish(self, reason: str) -> None:
        """Note the end."""
        self.finish_reason = reason


BatchCase = tuple[int, bool, int]  # slots, whether all rows are greedy, capacity of the caches


def every_program(drafts: int) -> bool:
    """Every program may be called, and is compiled where it has to be."""
    return True


class DraftPolicy(Protocol):
    """Decides how many draft tokens the cycles of each dispatch have. It never changes greedy output."""

    @property
    def by_confidence(self) -> bool:
        """Whether `next` says how many are verified of the mean row, and each cycle goes by the drafter's confidences.

        Then `lengths` is not asked.
        """
        ...

    def next(
        self, case: BatchCase, rows: Sequence[Hashable], longest: int, ready: Callable[[int], bool] = every_program
    ) -> tuple[int, int]:
        """Draft tokens a cycle of the next dispatch, 0 for plain steps, and its cycles.

        Args:
            case: what the time of a cycle depends on besides: slots, whether all rows are greedy, capacity.
            rows: the requests that are running.
            longest: cycles of drafts that a dispatch may have; STEPS_PER_CYCLE times as many plain steps.
            ready: whether the program of so many drafts, more than none and less than all, can be called without a
                wait; where it can't, it soon will.
        """
        ...

    def lengths(self, rows: Sequence[Hashable], drafts: int) -> Sequence[int] | None:
        """How many drafts of each row are verified, where `next` has said so many; None for as many of every row.

        Where rows differ the whole block is drafted, and the target runs only what is verified.
        """
        ...

    def observe(
        self,
        case: BatchCase,
        drafts: int,
        cycles: int,
        seconds: float | None,
        told: Mapping[Any, Sequence[Cycle]],
    ) -> None:
        """Note what a dispatch did.

        Args:
            cycles: that it ran; of plain steps, how many steps.
            seconds: that it took; None where a program was compiled in it.
            told: by request, its cycles of drafts.
        """
        ...

    def forget(self, row: Hashable) -> None:
        """Note that a request is at its end, after its last dispatch was observed."""
        ...


@dataclass(frozen=True)
class FixedDrafts:
    """Always so many; 0 for plain steps."""

    drafts: int
    by_confidence: bool = field(default=False, kw_only=True)

    def next(
        self, case: BatchCase, rows: Sequence[Hashable], longest: int, ready: Callable[[int], bool] = every_program
    ) -> tuple[int, int]:
        return self.drafts, longest

    def lengths(self, rows: Sequence[Hashable], drafts: int) -> Sequence[int] | None:
        return None

    def observe(self, case: BatchCase, drafts: int, cycles: int, seconds: float | None, told: Any) -> None:
        pass

    def forget(self, row: Hashable) -> None:
        pass


@dataclass(frozen=True)
class Shares:
    """What is verified of each row, where rows differ."""

    drafts: np.ndarray  # [B] int32, of each row; by confidence, the most of each
    tokens: int  # that the target runs in a cycle, of all rows
    by_confidence: bool = False


@dataclass
class Prefill:
    """Requests whose prompts are being run beside the batch."""

    completions: list[Completion]
    steps: decode.PrefillSteps
    width: int  # prompt positions of a step, of each row


class Slots:
    """A batch of rows that requests come to and leave. Everything runs in the mesh that is in context.

    With one request after another in it, a batch of one row keeps what it knows: a prompt that begins with what the
    last request's prompt and answer were runs only what follows.
    """

    def __init__(
        self,
        params: Params,
        configs: DecodeConfig,
        size: int,
        dtype: Any,
        *,
        sizes: Sequence[int] = (),
        policy: DraftPolicy | None = None,
        cycles: int = CYCLES,
        processors: bool = False,
        accept: Accept = decode.accept,
        warn: Callable[[], None] | None = None,
        compiler: BackgroundCompiler | None = None,
    ):
        """Args:
        size: rows that run together; made a multiple of what the mesh divides them into.
        dtype: of the caches.
        sizes: smaller numbers of rows that the batch has while fewer run; each is programs of its own.
        policy: all drafts of a block, always, when None.
        cycles: of drafts that a dispatch may have; output arrives after each.
        processors: requests may ask for penalties, biases and a minimum of tokens.
        accept: decides which drafts stand; another one than the default is for measuring speed alone.
        warn: called when the drafter's numbers turn out not to be finite.
        compiler: compiles the programs of other numbers of drafts than all and none beside decoding, which goes on
            without them until they are ready. Not with several processes, which would have to agree.
        """
        self._compiler, self._policy = compiler, policy or FixedDrafts(configs.proposals)
        self._params, self._configs, self._dtype = params, configs, dtype
        self._group = row_shards()
        self.size = -(-size // self._group) * self._group
        self.sizes = sorted({self.size, *(-(-n // self._group) * self._group for n in sizes if n < size)})
        self._quiet = 0  # dispatches in a row that a smaller size would have been enough for
        self._cycles, self._accept, self._processors = cycles, accept, processors
        self._warn = warn if configs.drafter else None
        self._waiting: deque[Completion] = deque()
        self._prefill: Prefill | None = None
        self._running: dict[int, Completion] = {}  # by slot
        self._state: DecodeState | None = None
        self._pace: dict[tuple[int, int], float] = {}  # seconds of a cycle by rows and drafts, as it was last
        self._guided = False  # a row's tokens are restricted on the device
        self._vocab = configs.target.vocab_size + -configs.target.vocab_size % model_devices()
        self._over = False  # the host has ended rows that the device goes on with
        self._held: Completion | None = None  # alone in the batch, first row: whose ids the caches hold
        self._began: dict[Completion, float] = {}
        self.seconds = no_seconds()  # of all that ran here
        self.most_reserved = 0  # positions that the rows of a dispatch had memory for, at the most

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self._waiting or self._prefill or self._running)

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting) + (len(self._prefill.completions) if self._prefill else 0)

    @property
    def running(self) -> int:
        """Requests in a slot."""
        return len(self._running)

    @property
    def rows(self) -> int:
        """Rows that the batch has now; 0 before the first request."""
        return self._state.token.shape[0] if self._state else 0

    @property
    def capacity(self) -> int:
        """Positions of a slot; 0 before the first request."""
        return self._state.cache.capacity if self._state else 0

    def holds(self, completion: Completion) -> bool:
        """Whether a request is waiting or running here."""
        return completion in self._began

    @property
    def usage(self) -> float:
        """Share of the memory for keys and values that requests use."""
        return sum(len(c.ids) for c in self._running.values()) / (self.size * max(self.capacity, 1))

    @property
    def reserved(self) -> int:
        """Positions that the batch has memory for."""
        return self.rows * self.capacity

    @property
    def held(self) -> list[int]:
        """The ids that the first row's caches hold, for a prompt that begins like them; none in a larger batch."""
        return self._held.ids[:-1] if self._held else []

    def admit(self, completion: Completion) -> None:
        """Let a request wait for a free slot.

        Raises:
            DominoError: its prompt is empty or too long, or has ids outside the vocabulary; or its limit is below 1.
        """
        check_request(self._configs, completion.request)
        if (completion.request.params.processed or completion.guide) and not self._processors:
            raise DominoError("penalties, biases, a minimum of tokens and guides need Slots(processors=True).")
        self._began[completion] = time.perf_counter()
        self._waiting.append(completion)

    def evict(self, completion: Completion, reason: str | None = "cancelled") -> None:
        """End a request, wherever it is; of one that is at its end already nothing changes.

        Args:
            reason: its finish_reason; None for a request that failed.
        """
        if completion not in self._began:
            return
        if completion in self._waiting:
            self._waiting.remove(completion)
        if reason is not None:
            completion.finish(reason)
        self._ended(completion)

    def run(
        self,
        completions: Iterable[Completion],
        update: Callable[[list[Completion]], None] | None = None,
        stopping: Callable[[], bool] | None = None,
    ) -> Iterator[Completion]:
        """Admit requests, and give each at its end.

        Args:
            update: called after each step with the requests that it gave tokens to.
            stopping: asked before each step; when true nothing more is run.
        """
        for completion in completions:
            self.admit(completion)
        while self.busy and not (stopping and stopping()):
            changed = self.step()
            if update:
                update(changed)
            yield from (c for c in changed if c.finish_reason is not None or not c.finite)

    def step(self, begun: Callable[[list[Completion]], None] | None = None) -> list[Completion]:
        """Run what is due of the prompts, and one dispatch of decoding; return the requests that got tokens or ended.

        Args:
            begun: called with those that have their first token, before the dispatch.

        Raises:
            DominoError: the device's memory is exhausted.
        """
        memory = (
            f"the device has too little memory for {self.size} sequences of this length; "
            "run fewer at a time or shorter ones."
        )
        try:
            with explain_out_of_memory(memory):
                changed = self._begin()
                if begun and changed:
                    begun(list(changed))
                if self._running:
                    changed += self._decode()
        except Exception:  # the device's: what its caches hold is not known
            lost = [*self._running.values(), *(self._prefill.completions if self._prefill else ())]
            for c in lost:
                self.evict(c, None)
            self._prefill = None
            self._forget()
            raise
        finally:
            if self._state and any(x.is_deleted() for x in jax.tree.leaves(self._state)):
                self._forget()
        return list(dict.fromkeys(changed))

    def _forget(self) -> None:
        """Let go of the batch's state."""
        self._state = self._held = None

    def _begin(self) -> list[Completion]:
        """Run prompts: of an idle batch all that fit as one, else one chunk's worth."""
        if not self._running and not self._prefill:
            found = list(self._waiting)[: self.size]
            lengths, rows = [len(c.request.prompt) for c in found], self._size_for(len(found))
            full = rows == self.size and sum(lengths) >= FULL * rows * max(lengths, default=0)
            if found and (rows == self._group or full):
                return self._fill(found, rows)
        return self._run_prompts()

    def _run_prompts(self) -> list[Completion]:
        """Run one chunk's worth of prompts beside the batch."""
        changed, budget = [], decode.LARGEST_CHUNK
        while budget > 0 and (self._prefill or self._start()):
            assert self._prefill is not None
            budget -= self._prefill.width
            try:
                with timed("prefill", [self.seconds, *(c.seconds for c in self._prefill.completions)]):
                    next(self._prefill.steps)
            except StopIteration as end:
                done, self._prefill = self._prefill, None
                changed += self._insert(done.completions, *end.value)
        return changed

    def _size_for(self, count: int) -> int:
        """The rows of a batch in which so many run."""
        return next(size for size in self.sizes if size >= count)

    def _fill(self, found: list[Completion], rows: int) -> list[Completion]:
        """Run the prompts of an idle batch as one, of so many rows."""
        self._waiting = deque(list(self._waiting)[len(found) :])
        self._running = dict(enumerate(found))
        requests = [c.request for c in found]
        requests += [_spare(requests[0])] * (rows - len(found))
        held, caches = 0, None
        if self._state is not None and self.rows == rows:
            caches = Caches(self._state.cache, self._state.drafter)
            if len(found) == 1:
                held = shared(self.held, requests[0].prompt)
        self._state = self._held = None  # programs donate the buffers
        with timed("prefill", [self.seconds, *(c.seconds for c in found)]):
            steps = self._prefilling(requests, found, caches, held)
            del caches
            state, logprobs = decode.run_to_end(steps)
            tokens, finite, logprobs = fetch((state.token, state.finite, logprobs))
        self._state = state
        if len(found) == 1:
            self._held = found[0]
            found[0].reused = decode.prefill_chunks(len(requests[0].prompt), held, state.cache.capacity).start
        self._first(found, tokens, finite, logprobs)
        return found

    def _prefilling(
        self, requests: list[Request], found: list[Completion], caches: Caches | None = None, held: int = 0
    ) -> decode.PrefillSteps:
        """Begin with the prompts of as many rows, the first of which are those found; see `decode.prefill_steps`."""
        processors, configs = None, self._with_logprobs(requests)
        if self._processors:
            masks = [c.guide.allowed() if c.guide else None for c in found]
            processors = new_processors([r.params for r in requests], [r.prompt for r in requests], self._vocab, masks)
        prompts = [r.prompt for r in requests]
        return decode.prefill_steps(
            self._params, configs, prompts, rows_of(requests), self._dtype, caches, held, processors
        )

    def _with_logprobs(self, requests: Iterable[Request]) -> DecodeConfig:
        """The configs of a dispatch, which has log-probabilities if one of these asks for them."""
        asked = any(r.params.logprobs is not None for r in requests)
        return dataclasses.replace(self._configs, logprobs=MOST_LOGPROBS) if asked else self._configs

    def _start(self) -> bool:
        """Begin with the prompts of as many waiting requests as a small batch beside the other has rows, if any."""
        count = min(self._group, self.size - len(self._running), len(self._waiting))
        if not count:
            return False
        found = [self._waiting.popleft() for _ in range(count)]
        requests = [c.request for c in found]
        requests += [_spare(requests[0])] * (self._group - count)
        longest = max(len(r.prompt) for r in requests)
        width = decode.prefill_chunks(longest, 0, longest).step
        self._prefill = Prefill(found, self._prefilling(requests, found), width)
        return True

    def _insert(self, found: list[Completion], new: DecodeState, logprobs: decode.Logprobs | None) -> list[Completion]:
        """Put prefilled requests into free slots."""
        with timed("prefill", [self.seconds, *(c.seconds for c in found)]):
            tokens, finite, logprobs = fetch((new.token, new.finite, logprobs))
        self._first(found, tokens, finite, logprobs)
        coming = [row for row, c in enumerate(found) if c in self._began]
        if not coming:
            return found
        with timed("prefill", [self.seconds, *(c.seconds for c in found)]):
            self._held, rows = None, self._size_for(len(self._running) + len(coming))
            if self._state is None:
                caches = decode.init_caches(self._configs, rows, new.cache.capacity, self._dtype)
                self._state = self._free_rows(rows, caches)
            elif rows > self.rows:
                self._state = self._with_rows(self._state, rows)
            slots = np.full(self._group, self.rows, np.int32)
            slots[coming] = sorted(set(range(self.rows)) - set(self._running))[: len(coming)]
            self._running |= {int(slots[row]): found[row] for row in coming}
            state = self._host_ends(self._resized(self._state, new))
            self._state = None
            self._state = decode.insert(self._configs, state, new, shard_copy(slots, "-"))
        return found

    def _free_rows(self, rows: int, caches: Caches) -> DecodeState:
        """A batch of free slots."""
        requests, processors = [Request([0])] * rows, None
        if self._processors:
            processors = new_processors([r.params for r in requests], [r.prompt for r in requests], self._vocab)
        return decode.begin(rows_of(requests), [0] * rows, caches, processors)

    def _with_rows(self, state: DecodeState, rows: int) -> DecodeState:
        """The state with another number of rows, where those that are running come first."""
        going = sorted(self._running)
        order = np.array([*going, *[going[0] if going else 0] * (rows - len(going))])
        self._running = {place: self._running[slot] for place, slot in enumerate(going)}
        self._over, self._held, self._quiet = False, None, 0
        return decode.take_rows(state, order, len(going))

    def _with_fewer_rows(self, state: DecodeState) -> DecodeState:
        """The state in a smaller size, where one has been enough for some time."""
        rows = self._size_for(len(self._running))
        self._quiet = self._quiet + 1 if rows < self.rows and not self._waiting and not self._prefill else 0
        return self._with_rows(state, rows) if self._quiet > CALM else state

    def _resized(self, state: DecodeState, new: DecodeState | None = None) -> DecodeState:
        """The state with the positions that the requests need now, the new ones among them."""
        lookahead = self._configs.lookahead
        capacity = cache.length_bucket(max(len(c.ids) - 1 for c in self._running.values()) + lookahead)
        if new is not None:
            capacity = max(capacity, new.cache.capacity)
        # A smaller bucket only where requests change: what grows goes on growing.
        if capacity > state.cache.capacity or (new is not None and capacity < state.cache.capacity):
            state = decode.grow_caches(self._configs, state, capacity)
        return state

    def _host_ends(self, state: DecodeState) -> DecodeState:
        """The state, told of the rows that the host has ended."""
        if self._over:
            done = np.array([slot not in self._running for slot in range(self.rows)])
            state, self._over = state._replace(done=shard_copy(done, "B")), False
        return state

    def _make_room(self) -> None:
        """See that the running rows have memory for their next cycle."""

    def _prepare(self) -> DecodeState:
        """The state that the next dispatch begins with."""
        assert self._state is not None
        return self._host_ends(self._with_fewer_rows(self._resized(self._state)))

    def _decode(self) -> list[Completion]:
        """One dispatch of the rows that are running."""
        self._make_room()
        rows, clocks = list(self._running.values()), [c.seconds for c in self._running.values()]
        began, compiled = time.perf_counter(), compile_seconds()
        with timed("decode", [self.seconds, *clocks]):
            self._state = self._prepare()
            self.most_reserved = max(self.most_reserved, self.reserved)
            running = dict(self._running)  # by the slots that they have now
            greedy = all(c.request.params.temperature == 0 for c in rows)
            case = self.rows, greedy, self._state.cache.capacity
            guided = self._allow(running)
            configs = self._with_logprobs(c.request for c in rows)

            def ready(drafts: int) -> bool:
                return self._ready(configs, drafts, greedy, self._shares(running, drafts))

            drafts, cycles = self._policy.next(case, rows, self._cycles, ready)
            shares = self._shares(running, drafts)
            if shares and not (shares.drafts.any() and self._ready(configs, drafts, greedy, shares)):
                drafts, shares = 0, None
            if guided:  # what may come next is known for one token
                cycles = 1 if drafts else 0
            pace = self._pace.get((self.rows, drafts))
            if pace and not guided:
                cycles = max(1, min(cycles, int(RESPONSE / pace)))
            self._state, emitted = self._dispatch(configs, drafts, cycles, greedy, shares)
            # The state is whole, should the user lose patience here.
            emitted, finite = fetch((emitted, self._state.finite))
        spent = [time.perf_counter() - began, compile_seconds() - compiled]
        if jax.process_count() == 1 and emitted.cycles and not guided:  # several would have to agree
            units = int(emitted.cycles) / (1 if drafts else STEPS_PER_CYCLE)
            self._pace[case[0], drafts] = (spent[0] - spent[1]) / units
        told: dict[Hashable, list[Cycle]] = {}
        drafted = {slot for slot in running if drafts and (shares is None or shares.drafts[slot])}
        for slot, c in running.items():
            for i in range(int(emitted.cycles)):
                count = int(emitted.counts[i, slot])
                if count == 0 or c.finish_reason is not None:
                    break
                start, tokens = len(c.tokens), c.take(emitted.tokens[i, slot, :count].tolist())
                if emitted.logprobs is not None:
                    c.take_logprobs(jax.tree.map(lambda x, i=i, slot=slot: x[i, slot], emitted.logprobs), len(tokens))
                if slot in drafted:
                    stood = int(emitted.accepted[i, slot])
                    proposed = emitted.drafts[i, slot, : int(emitted.verified[i, slot])].tolist()
                    proposed = [token for token in proposed if token >= 0]
                    sure = () if emitted.confidence is None else emitted.confidence[i, slot].tolist()
                    c.cycles.append(Cycle(start, tokens, stood, proposed, sure))
                    told.setdefault(c, []).append(c.cycles[-1])
                else:
                    c.steps += 1
            c.wall_seconds = time.perf_counter() - self._began[c]
            c.finite = bool(finite[slot])
        if not guided and not isinstance(self._policy, FixedDrafts):
            seconds, compiling = broadcast_from_first(spent)
            compiling = compiling or any(not c.speculative for c in rows)  # a time of another kind of cycle
            self._policy.observe(case, drafts, int(emitted.cycles), None if compiling else seconds, told)
        self._check_drafts(drafts, emitted)
        for c in rows:
            if c.finish_reason is not None or not c.finite:
                self._ended(c)
        return rows

    def _allow(self, running: dict[int, Completion]) -> bool:
        """Tell the device what the rows' guides allow next; whether there is one, or has been."""
        guides = {slot: c.guide for slot, c in running.items() if c.guide}
        if not guides and not self._guided:
            return False
        assert self._state is not None and self._state.processors is not None
        masks = [guide.allowed() if (guide := guides.get(slot)) else None for slot in range(self.rows)]
        processors = self._state.processors._replace(allowed=allowed_tokens(masks, self.rows, self._vocab))
        self._state, self._guided = self._state._replace(processors=processors), bool(guides)
        return bool(guides)

    def _dispatch(
        self, configs: DecodeConfig, drafts: int, cycles: int, greedy: bool, shares: Shares | None
    ) -> tuple[DecodeState, decode.Emitted]:
        """Start at most `cycles` cycles of so many drafts, or as many plain steps as take about as long; one for 0.

        Args:
            shares: all drafts of every row when None.
        """
        assert self._state is not None
        if not drafts:
            longest, most = self._cycles * STEPS_PER_CYCLE, np.int32(max(1, cycles * STEPS_PER_CYCLE))
            return decode.autoregress(self._params, configs, self._state, longest, greedy, most)
        configs, each = self._drafting(configs, drafts, shares)
        most = np.int32(cycles)
        whole = drafts == self._configs.proposals and shares is None  # is compiled where it is run, as plain steps are
        if self._compiler and not whole and (call := self._compiler.get(self._key(configs, greedy))):
            return call(self._params, self._state, most, each)
        return decode.speculate(self._params, configs, self._state, self._cycles, greedy, most, self._accept, each)

    def _drafting(self, configs: DecodeConfig, drafts: int, shares: Shares | None) -> tuple[DecodeConfig, Array | None]:
        """The configs of a dispatch with drafts, and the drafts of each row [B] where rows differ."""
        if self._policy.by_confidence and self.rows > 1:
            configs = dataclasses.replace(configs, confidence=True)
        if shares is None:
            return dataclasses.replace(configs, drafts=drafts), None
        configs = dataclasses.replace(configs, verified=shares.tokens, by_confidence=shares.by_confidence)
        return configs, shard_copy(shares.drafts, "B")

    def _key(self, configs: DecodeConfig, greedy: bool) -> Hashable:
        """What tells programs of drafts apart, of Slots that differ in the numbers of their drafts alone."""
        assert self._state is not None
        meshed = not jax.sharding.get_abstract_mesh().empty  # there a program is for arrays that lie in one way
        places = tuple(x.sharding for x in jax.tree.leaves(self._state)) if meshed else ()
        return configs, greedy, self.rows, self._state.cache.capacity, places

    def _ready(self, configs: DecodeConfig, drafts: int, greedy: bool, shares: Shares | None) -> bool:
        """Whether what `_dispatch` would call with these is compiled; if not, it soon will be."""
        if self._compiler is None or (shares and not shares.drafts.any()):
            return True
        configs, each = self._drafting(configs, drafts, shares)

        def describe() -> Callable[[], Lowered]:
            # The state's own arrays will have been given away.
            params, state, lengths = jax.tree.map(_described, (self._params, self._state, each))
            most = np.int32(1)
            return lambda: decode.speculate.lower(
                params, configs, state, self._cycles, greedy, most, self._accept, lengths
            )

        return self._compiler.ready(self._key(configs, greedy), describe)

    def _shares(self, running: dict[int, Completion], drafts: int) -> Shares | None:
        """What is verified of each row; None for as many drafts of every row.

        Rows whose next token is restricted, or that ask for plain steps, have none while the others have theirs. Where
        rows can't differ, one that is restricted has all take plain steps, and so have all that ask for them.
        """
        if not drafts:
            return None
        plain = [c.guide is not None or not c.speculative for c in running.values()]
        if self._group > 1 or self._accept is not decode.accept or self._configs.branching:
            guided = any(c.guide for c in running.values())
            return Shares(np.zeros(self.rows, np.int32), self.rows) if guided or all(plain) else None
        whole = self._configs.proposals
        by_confidence = self._policy.by_confidence and len(running) > 1 and drafts < whole
        own = None if by_confidence else self._policy.lengths(list(running.values()), drafts)
        if own is None and not by_confidence and not any(plain):
            return None
        each = [0 if none else n for n, none in zip(own or [drafts] * len(running), plain, strict=True)]
        most = np.zeros(self.rows, np.int32)
        for slot, count in zip(running, each, strict=True):
            most[slot] = whole if by_confidence and count else count
        needed = 1 + -(-sum(each) // self.rows)
        tokens = self.rows * next(n for n in verified_sizes(whole) if n >= needed)
        return Shares(most, tokens, by_confidence)

    def _first(
        self, found: list[Completion], tokens: np.ndarray, finite: np.ndarray, logprobs: decode.Logprobs | None
    ) -> None:
        """Note the first tokens of prefilled requests."""
        for row, (c, token, good) in enumerate(zip(found, tokens.tolist(), finite.tolist(), strict=False)):
            if c not in self._began:  # it was evicted meanwhile
                continue
            if good:
                taken = c.take([token])
                if logprobs is not None:
                    c.take_logprobs(jax.tree.map(lambda x, row=row: x[row], logprobs), len(taken))
            c.finite = good
            c.wall_seconds = time.perf_counter() - self._began[c]
            if c.finish_reason is not None or not good:
                self._ended(c)

    def _ended(self, completion: Completion) -> None:
        """Free its slot; the device may not know yet that the row is over."""
        self._began.pop(completion, None)
        for slot, other in list(self._running.items()):
            if other is completion:
                del self._running[slot]
                self._over = True
        self._policy.forget(completion)
        if not completion.finite:
            self._held = None

    def _check_drafts(self, drafts: int, emitted: decode.Emitted) -> None:
        """Warn, once, of a drafter whose numbers are not finite."""
        if drafts and self._warn and drafts_look_broken(emitted):
            warn, self._warn = self._warn, None
            configs = dataclasses.replace(self._configs, drafts=drafts)
            if self._state is not None and not drafter_is_finite(self._params, configs, self._state):
                warn()


def verified_sizes(proposals: int) -> list[int]:
    """Tokens of a row that the target runs in a cycle, where rows share them: few sizes, each is a program."""
    return sorted({-(-(proposals + 1) * part // PARTS) for part in range(1, PARTS + 1)})


def _described(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding, weak_type=jax.typeof(x).weak_type)


def check_request(configs: DecodeConfig, request: Request) -> None:
    """Refuse a request that can't be run.

    Raises:
        DominoError: see `Slots.admit`.
    """
    config, prompt, limit = configs.target, request.prompt, request.params.max_tokens
    if not prompt:
        raise DominoError("the prompt is empty; give at least one token.")
    outside = next((i for i in prompt if not 0 <= i < config.vocab_size), None)
    if outside is not None:
        raise DominoError(f"the prompt has id {outside}, outside the vocabulary of {config.vocab_size}.")
    if len(prompt) > config.positions:
        raise DominoError(
            f"the prompt has {len(prompt)} tokens, but the model has {config.positions} positions: shorten it."
        )
    fits = room_after(prompt, config.positions)
    if not 1 <= limit <= fits:
        raise DominoError(f"1 to {fits} new tokens can be had after this prompt, and {limit} are asked for.")
    p = request.params
    for token, _ in p.logit_bias:
        if not 0 <= token < config.vocab_size:
            raise DominoError(f"logit_bias has token {token}, outside the vocabulary of {config.vocab_size}.")
    if len(p.logit_bias) > MOST_BIASES:
        raise DominoError(f"logit_bias has {len(p.logit_bias)} tokens, of which {MOST_BIASES} can be had.")
    if p.repetition_penalty < LEAST_PENALTY:
        raise DominoError(f"repetition_penalty must be at least {LEAST_PENALTY:g}, found {p.repetition_penalty:g}.")
    if p.logprobs is not None and not 0 <= p.logprobs <= MOST_LOGPROBS:
        raise DominoError(
            f"logprobs of 0 to {MOST_LOGPROBS} likeliest tokens can be had, and {p.logprobs} are asked for."
        )
    if p.min_tokens > p.max_tokens:
        raise DominoError(f"min_tokens is {p.min_tokens}, more than the {p.max_tokens} that are generated at most.")
    if p.min_tokens and len(p.stop_token_ids) > STOP_IDS:
        raise DominoError(f"min_tokens goes with {STOP_IDS} stop_token_ids at most, found {len(p.stop_token_ids)}.")


def room_after(prompt: Sequence[int], positions: int) -> int:
    """New tokens that so many positions have room for after a prompt: the last one is never run, and needs none."""
    return positions - len(prompt) + 1


def longest_first(completions: Iterable[Completion]) -> list[Completion]:
    """Requests in the order that pads least; if memory does not suffice for the longest, that is known at once."""
    return sorted(completions, key=lambda c: (-len(c.request.prompt), c.request.numbers))


def rows_of(requests: Sequence[Request]) -> Rows:
    """What is asked for each row, from the host."""
    params = [r.params for r in requests]
    stop = np.full((len(params), STOP_IDS), -1, np.int32)
    for row, p in zip(stop, params, strict=True):
        row[: len(p.stop_token_ids)] = p.stop_token_ids[:STOP_IDS]
    largest = float(np.finfo(np.float32).max)
    sampling = Sampling(
        jnp.array([min(p.temperature, largest) for p in params], jnp.float32),
        jnp.array([p.top_k for p in params], jnp.int32),
        jnp.array([p.top_p for p in params], jnp.float32),
        jnp.array([p.min_p for p in params], jnp.float32),
    )
    keys = jnp.stack([request_key(p.seed or 0, r.numbers) for p, r in zip(params, requests, strict=True)])
    return decode.new_rows(keys, [p.max_tokens for p in params], stop, sampling, [p.coupled for p in params])


def request_key(seed: int, numbers: Iterable[int]) -> jax.Array:
    """The random key of a request, from the seed and its own numbers alone."""
    return reduce(jax.random.fold_in, (np.uint32(n) for n in numbers), jax.random.key(seed))


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _spare(request: Request) -> Request:
    """What a row that only fills the batch runs: it is over after its first token."""
    return Request(request.prompt[:1], SamplingParams(max_tokens=1))
