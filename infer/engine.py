"""The loop around decode: prompts in, tokens out, one small transfer a dispatch."""

import dataclasses
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convert.loading import LoadedModel
from convert.not_finite import NOT_FINITE_DRAFTS, not_finite_error
from domino_jax import cache, decode
from domino_jax.config import DecoderConfig
from domino_jax.decode import Accept, DecodeConfig
from domino_jax.errors import DominoError
from domino_jax.finite import drafter_is_finite, drafts_look_broken
from domino_jax.runtime.memory import explain_out_of_memory
from domino_jax.runtime.processes import broadcast_from_first
from domino_jax.sampling import SamplingParams, settings
from domino_jax.sharding import DATA, fetch, shard_copy
from domino_jax.weights import Params
from infer.auto import AcceptanceEstimate, Chooser, Time, calibrate
from infer.conversation import Conversation
from infer.text import TextStream

# A plain step gives one token where a cycle gives several: more steps a dispatch, so that the baseline
# pays no more for dispatching.
STEPS_PER_CYCLE = 4

PHASES: tuple[str, ...] = ("compile", "prefill", "calibrate", "decode")


class Cycle(NamedTuple):
    """One draft-and-verify cycle of one sequence."""

    tokens: list[int]  # what it added to the output
    accepted: int  # drafts accepted, counted whole even where a stop or the limit cut the output
    drafts: list[int]


@dataclass(frozen=True)
class Decoding:
    """How a batch is decoded."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0  # of the random keys; each row folds its number in
    speculative: bool = True  # draft and verify if there is a drafter; False for the autoregressive baseline
    rows: int = 0  # at least so many are run, so that a smaller batch needs no programs of its own


@dataclass
class Sequence:
    """One prompt and what is generated for it."""

    row: int  # gives the random key, so that an answer does not depend on its batch neighbours
    prompt: list[int]
    limit: int  # tokens to generate at most
    stream: TextStream | None = None  # None without a tokenizer
    tokens: list[int] = field(default_factory=list)
    cycles: list[Cycle] = field(default_factory=list)  # of drafts; τ is over these
    reused: int = 0  # of the prompt's tokens, those that an earlier turn of the conversation had run
    steps: int = 0  # plain ones, without drafts; where "auto" took some, they are none of τ's
    finish_reason: str | None = None  # "stop", "length", or "cancelled"; None while it runs
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))  # until it finished
    wall_seconds: float = 0.0  # likewise; with what is in no phase, such as making and printing text

    @property
    def text(self) -> str | None:
        """The text so far, in whole characters and without a stop string."""
        return self.stream.text if self.stream else None

    @property
    def ids(self) -> list[int]:
        """The prompt and the answer to it so far."""
        return self.prompt + self.tokens

    @property
    def accepted(self) -> list[int]:
        """Drafts accepted in each cycle."""
        return [cycle.accepted for cycle in self.cycles]

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding alone: the first token is the prefill's. None where nothing was decoded."""
        return tokens_per_second([self])

    def take(self, tokens: list[int], stop_ids: tuple[int, ...]) -> list[int]:
        """Append what a dispatch gave, up to a stop string; return what counts, and note the end."""
        used = self.stream.feed(tokens) if self.stream else len(tokens)
        tokens = tokens[:used]
        self.tokens += tokens
        if (self.stream and self.stream.stopped) or self.tokens[-1] in stop_ids:
            self.finish("stop")
        elif len(self.tokens) >= self.limit:
            self.finish("length")
        return tokens

    def finish(self, reason: str) -> None:
        """End the sequence, releasing the text that was held back."""
        self.finish_reason = reason
        if self.stream:
            self.stream.finish()
            if self.stream.stopped:
                self.finish_reason = "stop"


class Chunk(NamedTuple):
    """What a dispatch added to one sequence."""

    sequence: Sequence
    text: str  # whole characters, without what may still become a stop string; empty without a tokenizer
    tokens: list[int]


def tau(accepted: list[int]) -> float | None:
    """τ, the mean acceptance length (drafts and bonus) over cycles; None without any."""
    return sum(accepted) / len(accepted) + 1 if accepted else None


def tokens_per_second(sequences: list[Sequence]) -> float | None:
    """The rate at which a batch was decoded, all rows together."""
    seconds = max((s.seconds["decode"] for s in sequences), default=0.0)
    return sum(len(s.tokens) - 1 for s in sequences if s.tokens) / seconds if seconds else None


class Engine:
    """Runs batches of sequences on a loaded model."""

    def __init__(
        self,
        loaded: LoadedModel,
        cycles: int = 8,
        auto: bool = False,
        report: Callable[[str], None] | None = None,
        warn: Callable[[str], None] = warnings.warn,
        accept: Accept = decode.accept,
    ):
        """Args:
        cycles: draft-and-verify cycles a dispatch; output arrives after each dispatch.
        auto: choose the drafts of a cycle before each dispatch, from times measured at the first batch of each size and
            length bucket and from what was accepted so far. Greedy output is the same; at a temperature the drafts
            decide how the random numbers are used, so that a seed may give another sample, of the same distribution.
        report: called with what takes long.
        warn: called with what is wrong but changes no output.
        accept: decides which drafts stand; another one than the default is for measuring speed alone.
        """
        self.loaded = loaded
        self.cycles = cycles
        self.auto = auto and loaded.configs.drafter is not None
        self._accept = accept
        self.choosers: dict[tuple[int, bool, int], Chooser] = {}  # by rows, whether greedy, and the first length bucket
        self._acceptance: dict[bool, AcceptanceEstimate] = {}  # by whether greedy
        self._report = report or (lambda _: None)
        self._warn = warn
        self._drafter_checked = loaded.configs.drafter is None
        with loaded.context():
            self._stop = shard_copy(np.array(loaded.stop_ids, np.int32), "-")
        self._ready: set[Any] = set()

    def sequence(
        self, prompt: list[int], max_new_tokens: int, row: int = 0, stops: tuple[str, ...] = ()
    ) -> tuple[Sequence, list[str]]:
        """A sequence to generate, with warnings.

        Raises:
            DominoError: the prompt is empty, has ids outside the vocabulary, or exceeds the positions.
        """
        config: DecoderConfig = self.loaded.configs.target
        positions, found = config.positions, []
        if not prompt:
            raise DominoError("the prompt is empty; give at least one token.")
        outside = [i for i in prompt if not 0 <= i < config.vocab_size]
        if outside:
            raise DominoError(f"the prompt has id {outside[0]}, outside the vocabulary of {config.vocab_size}.")
        if len(prompt) > positions:
            raise DominoError(
                f"the prompt has {len(prompt)} tokens, but the model has {positions} positions: shorten it."
            )
        fits = positions - len(prompt) + 1  # the last token generated is never run, so it needs no position
        if max_new_tokens > fits:
            found.append(f"at most {fits} new tokens fit the model's {positions} positions after this prompt.")
        if stops and self.loaded.tokenizer is None:
            raise DominoError("stop strings need a tokenizer, and the model's folder has none.")
        stream = TextStream(self.loaded.tokenizer, stops) if self.loaded.tokenizer is not None else None
        return Sequence(row, list(prompt), min(max_new_tokens, fits), stream), found

    def generate(
        self, sequences: list[Sequence], how: Decoding | None = None, conversation: Conversation | None = None
    ) -> None:
        """Generate all sequences as one batch, in place; see `stream`."""
        for _ in self.stream(sequences, how, conversation):
            pass

    def stream(
        self, sequences: list[Sequence], how: Decoding | None = None, conversation: Conversation | None = None
    ) -> Generator[Chunk]:
        """Generate all sequences as one batch, in place, and yield what each dispatch adds to them.

        Closing the generator early ends the sequences as cancelled.

        Args:
            how: greedy and speculative when None.
            conversation: whose next turn the one sequence is; what its caches hold of the prompt is not run again.

        Raises:
            KeyboardInterrupt: the user cancelled; the sequences hold what was generated.
            DominoError: the device's memory is exhausted, or the target's logits are not finite.
        """
        assert conversation is None or len(sequences) == 1, "a conversation has one sequence a turn"
        how, mesh = how or Decoding(), self.loaded.mesh
        rows = max(how.rows, len(sequences))
        if mesh:  # every device of the data axis has the same number of rows
            rows = -(-rows // mesh.shape[DATA]) * mesh.shape[DATA]
        memory = (
            f"the device has too little memory for {rows} sequences of this length; "
            "run fewer at a time or shorter ones."
        )
        run = self._run(sequences, dataclasses.replace(how, rows=rows), conversation)
        told = [(0, 0)] * len(sequences)  # tokens and characters of each
        began, running = time.perf_counter(), sequences
        try:
            while True:
                with explain_out_of_memory(memory), self.loaded.context():  # not around what the caller does
                    if next(run, run) is run:  # it yields None
                        return
                for s in running:
                    s.wall_seconds = time.perf_counter() - began
                running = [s for s in running if s.finish_reason is None]
                for i, s in enumerate(sequences):
                    tokens, text = s.tokens[told[i][0] :], (s.text or "")[told[i][1] :]
                    told[i] = told[i][0] + len(tokens), told[i][1] + len(text)
                    if tokens or text:
                        yield Chunk(s, text, tokens)
        except (KeyboardInterrupt, GeneratorExit):
            for s in sequences:
                if s.finish_reason is None:
                    s.finish("cancelled")
            raise
        finally:
            with self.loaded.context():
                run.close()

    def _run(self, sequences: list[Sequence], how: Decoding, conversation: Conversation | None) -> Generator[None]:
        """The loop of `stream`; yields when tokens have arrived."""
        loaded = self.loaded
        configs, params = loaded.configs, loaded.params
        choose = how.sampling
        speculative = how.speculative and configs.drafter is not None
        if not speculative:
            configs, params = configs.without_drafter, params.without_drafter
        greedy = choose.temperature == 0
        auto = self.auto and speculative
        room = cache.length_bucket(max(len(s.prompt) for s in sequences) + configs.lookahead)
        case = how.rows, greedy, room
        chooser = self.choosers.get(case) if auto else None
        seconds = dict.fromkeys(PHASES, 0.0)
        # Rows that only fill the batch are over after their first token.
        spare = how.rows - len(sequences)
        prompts = [s.prompt for s in sequences] + [sequences[0].prompt[:1]] * spare
        limits = [s.limit for s in sequences] + [1] * spare
        rows = np.array([s.row for s in sequences] + [0] * spare, np.uint32)

        with _timed(seconds, "prefill"):
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(how.seed), rows)
            sampling = settings(len(prompts), choose.temperature, choose.top_k, choose.top_p, choose.min_p)
            caches, held = conversation.take(prompts[0], speculative) if conversation else (None, 0)
            arguments = (prompts, keys, limits, sampling, self._stop, loaded.dtype, caches, held)
            if loaded.mesh is None:
                self._compile_first_token(params, configs, arguments)
            state = decode.prefill_batch(params, configs, *arguments)
            del caches, arguments  # they are the state's now
            first, finite = fetch((state.token, state.finite))
        sequences[0].reused = decode.prefill_chunks(len(prompts[0]), held, state.cache.capacity).start
        try:
            self._note(sequences, seconds)
            for s, token, good in zip(sequences, first.tolist(), finite, strict=False):
                if good:
                    s.take([token], loaded.stop_ids)
            self._check_finite(sequences, finite)
            if auto and any(s.finish_reason is None for s in sequences):
                if chooser is None:
                    with _timed(seconds, "calibrate"):
                        chooser, state = self._calibrate(params, configs, state, greedy)
                    self.choosers[case] = chooser
                elif chooser.due:
                    with _timed(seconds, "decode"):
                        state = self._recheck(chooser, params, configs, state, greedy)
            yield

            # A stop string, which the device knows nothing of, has ended a row.
            cut = any(s.stream is not None and s.stream.stopped for s in sequences)
            while running := sum(s.finish_reason is None for s in sequences):
                drafts, cycles = configs.proposals, self._longest(configs.proposals)
                if chooser:
                    drafts, cycles = chooser.next(running, self.cycles)
                    cycles = cycles if drafts else self._longest(0)
                needed = max(len(s.prompt) + len(s.tokens) - 1 for s in sequences if s.finish_reason is None)
                with _timed(seconds, "decode"):
                    if needed + configs.lookahead > state.cache.capacity:
                        state = decode.grow_caches(configs, state, cache.length_bucket(needed + configs.lookahead))
                    if cut:
                        over = [s.finish_reason is not None for s in sequences] + [True] * spare
                        state = state._replace(done=shard_copy(np.array(over), "B"))
                    state, emitted = self._dispatch(params, configs, state, self._stop, drafts, cycles, greedy)
                    # The state is whole, should the user lose patience here.
                    emitted, finite = fetch((emitted, state.finite))
                self._note(sequences, seconds)
                cut, accepted = False, []
                for b, s in enumerate(sequences):
                    for c in range(int(emitted.cycles)):
                        count = int(emitted.counts[c, b])
                        if count == 0 or s.finish_reason is not None:
                            break
                        tokens = s.take(emitted.tokens[c, b, :count].tolist(), loaded.stop_ids)
                        if drafts:
                            accepted.append(int(emitted.accepted[c, b]))
                            s.cycles.append(Cycle(tokens, accepted[-1], emitted.drafts[c, b].tolist()))
                        else:
                            s.steps += 1
                        cut |= s.stream is not None and s.stream.stopped
                if not finite[: len(sequences)].all():
                    for s, good in zip(sequences, finite, strict=False):
                        if s.stream and not good:
                            s.stream.finish()
                    yield  # what came before
                    self._check_finite(sequences, finite)
                if drafts and not self._drafter_checked and drafts_look_broken(emitted):
                    self._drafter_checked = True
                    if not drafter_is_finite(params, dataclasses.replace(configs, drafts=drafts), state):
                        self._warn(NOT_FINITE_DRAFTS)
                if chooser:
                    chooser.observe(accepted)
                yield
            if chooser:
                drafted = [] if any(s.steps for s in sequences) else sequences  # throughout
                tokens, cycles = [len(s.tokens) - 1 for s in drafted], [len(s.cycles) for s in drafted]
                chooser.finish(tokens, cycles, *broadcast_from_first([seconds["decode"]]))
        except Exception:  # the device's: what its caches hold is not known
            conversation = None
            raise
        finally:
            if conversation:
                conversation.keep(sequences[0].ids[:-1], state)

    def _check_finite(self, sequences: list[Sequence], finite: np.ndarray) -> None:
        """Refuse to go on where a row's logits were not finite."""
        broken = [s for s, good in zip(sequences, finite, strict=False) if not good]
        if broken:
            raise not_finite_error(
                self.loaded.params.target, self.loaded.configs.target, broken[0].ids, self.loaded.dtype
            )

    def _longest(self, drafts: int) -> int:
        """Cycles of so many drafts, or plain steps, that one dispatch may run."""
        return self.cycles if drafts else self.cycles * STEPS_PER_CYCLE

    def _dispatch(
        self,
        params: Params,
        configs: DecodeConfig,
        state: decode.DecodeState,
        stop: jax.Array,
        drafts: int,
        cycles: int,
        greedy: bool,
    ) -> tuple[decode.DecodeState, decode.Emitted]:
        """Start at most `cycles` cycles of so many drafts, or plain steps."""
        longest, most = self._longest(drafts), np.int32(cycles)
        if not drafts:
            return decode.autoregress(params, configs, state, stop, longest, greedy, most)
        configs = dataclasses.replace(configs, drafts=drafts)
        return decode.speculate(params, configs, state, stop, longest, greedy, most, self._accept)

    def _calibrate(
        self, params: Params, configs: DecodeConfig, state: decode.DecodeState, greedy: bool
    ) -> tuple[Chooser, decode.DecodeState]:
        """A chooser for batches like this one, from times of plain steps and of cycles of few and many drafts."""
        rows, most = state.token.shape[0], configs.proposals
        self._report(f"calibrating --drafts auto for {rows} sequence{'s' * (rows > 1)} at a time")
        measure, finish = self._stopwatch(params, configs, state, greedy)
        times = calibrate(measure, most, self._longest, broadcast_from_first)
        return Chooser(times, self._acceptance.setdefault(greedy, AcceptanceEstimate(most))), finish()

    def _recheck(
        self, chooser: Chooser, params: Params, configs: DecodeConfig, state: decode.DecodeState, greedy: bool
    ) -> decode.DecodeState:
        """Measure again the times that decide."""
        measure, finish = self._stopwatch(params, configs, state, greedy)
        chooser.recheck(measure, self._longest, broadcast_from_first)
        return finish()

    def _stopwatch(
        self, params: Params, configs: DecodeConfig, state: decode.DecodeState, greedy: bool
    ) -> tuple[Time, Callable[[], decode.DecodeState]]:
        """What times cycles, with the programs and on the state that generation uses; see `auto.calibrate`.

        Returns:
            time; and a function that gives the state back as it was: what a timed cycle wrote lies beyond
            each row's length, like a rejected draft, and will be written again before it is seen. A copy would need
            room for a second set of caches.
        """
        rows = state.token.shape[0]
        needed = int(fetch(state.length).max()) + self.cycles * (configs.proposals + 1) + configs.lookahead
        if needed > state.cache.capacity:  # where a dispatch soon ends for want of room, its cost is all that is seen
            state = decode.grow_caches(configs, state, cache.length_bucket(needed))
        names = ("token", "length", "emitted", "limit", "done", "finite", "keys")

        def copied(values: dict[str, jax.Array]) -> dict[str, Any]:  # states are donated
            return {name: jnp.copy(value) for name, value in values.items()}

        kept = copied({name: getattr(state, name) for name in names})
        endless = shard_copy(np.full(rows, 1 << 30, np.int32), "B")
        never = shard_copy(np.full(len(self.loaded.stop_ids), -1, np.int32), "-")

        def measure(drafts: int, cycles: int) -> float:
            nonlocal state
            state = state._replace(**copied(kept | {"limit": endless}))
            jax.block_until_ready(state)
            began = time.perf_counter()
            state, emitted = self._dispatch(params, configs, state, never, drafts, cycles, greedy)
            emitted = fetch(emitted)
            return (time.perf_counter() - began) / int(emitted.cycles)

        return measure, lambda: state._replace(**kept)

    @staticmethod
    def _note(sequences: list[Sequence], seconds: dict[str, float]) -> None:
        """Give the batch's times so far to the sequences that are still running."""
        for s in sequences:
            if s.finish_reason is None:
                s.seconds = dict(seconds)

    def _compile_first_token(self, params: Params, configs: DecodeConfig, arguments: tuple) -> None:
        """Compile `first_token` before anything runs.

        `begin` would compile it while the device is busy with the prompts, and the time of the
        prefill would vanish in that of the compilation.
        """
        prompts, keys, limits, sampling, stop, dtype, caches, held = arguments

        def begin(params: Params, keys: Any, sampling: Any, stop: Any, caches: Any) -> decode.DecodeState:
            return decode.prefill_batch(params, configs, prompts, keys, limits, sampling, stop, dtype, caches, held)

        shape = (configs, len(prompts), cache.length_bucket(max(map(len, prompts)) + configs.lookahead))
        if shape in self._ready:
            return
        self._ready.add(shape)
        state = jax.eval_shape(begin, params, keys, sampling, stop, caches)
        width = (len(prompts), configs.target.hidden_size)
        last = jax.ShapeDtypeStruct(width, params.target.norm.dtype)
        decode.first_token.lower(params, configs, state, last, stop).compile()


_spans: list[tuple[float, float]] = []  # disjoint times at which JAX traced, lowered or compiled


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    if event.startswith("/jax/core/compile/"):
        end = time.perf_counter()
        begin = end - duration_secs
        while _spans and _spans[-1][1] > begin:  # tracing one function traces those it calls
            _spans.pop()
        _spans.append((begin, end))


jax.monitoring.register_event_duration_secs_listener(_listen)


def compile_seconds() -> float:
    """Time this process has spent on tracing, lowering and compiling."""
    return sum(end - begin for begin, end in _spans)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time of the block to its phase, except what of it was compilation."""
    began, compiled = time.perf_counter(), compile_seconds()
    try:
        yield
    finally:
        compiled = compile_seconds() - compiled
        seconds["compile"] += compiled
        seconds[phase] += time.perf_counter() - began - compiled
