"""The thread that decodes: requests of many clients in one `Slots`, and what each is told of its answer."""

import math
import threading
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from convert.loading import LoadedModel
from convert.not_finite import NOT_FINITE_DRAFTS, not_finite_error
from domino_jax import cache
from domino_jax.drafters.base import Branching
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.auto_trees import auto_policy
from domino_jax.runtime.background import BackgroundCompiler
from domino_jax.runtime.paged_slots import PagedSlots, Pages
from domino_jax.runtime.prompt_logprobs import prompt_logprobs
from domino_jax.runtime.slots import (
    Completion,
    Cycle,
    DraftPolicy,
    FixedDrafts,
    Request,
    Slots,
    TokenLogprobs,
)
from domino_jax.sampling import SamplingParams
from infer.serve.fields import BadRequest

# Rows that a batch may have. On a CPU a row that nobody uses costs as much as one in use; elsewhere eight rows cost
# hardly more than one, and each size is programs to compile.
SIZES_ON_CPU, SIZES = (1, 4, 16, 64, 256), (8, 32, 128)
COMPILING_ON_CPU = 0.1  # share of the time in which programs are compiled beside decoding, on the same cores


class Text(Protocol):
    """What makes text of an answer's tokens: `text.TextStream`, or a parser of its parts."""

    stopped: bool

    def feed(self, tokens: list[int]) -> int: ...

    def finish(self) -> None: ...

    def take(self) -> list[Any]: ...


@dataclass
class Update:
    """What a step gave one request."""

    pieces: list[Any]  # of text; see `Text.take`
    start: int  # tokens that came before
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    cycles: list[Cycle]
    steps: int  # plain ones
    finish_reason: str | None = None
    error: DominoError | None = None  # the request failed; it is the last update


@dataclass(eq=False)
class Job(Completion):
    """A request of a client."""

    text: Text | None = None
    tell: Callable[[Update], None] = lambda _: None  # called in the worker's thread
    deadline: float = float("inf")
    admitted: float = field(default_factory=time.monotonic)
    first: float | None = None  # seconds until the first token
    told: tuple[int, int, int] = (0, 0, 0)  # tokens, cycles and steps
    inbox: Any = None  # where `tell` leaves updates for whoever waits for them
    asked: Any = None  # a `followers.Asked`, of which the other processes make the same
    place: int = -1  # by which they know it
    failed: DominoError | None = None
    scores: bool = False  # the log-probabilities of the prompt are wanted
    answers: bool = True  # else they, and the prompt, are all that is
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    @property
    def is_cut(self) -> bool:
        return self.failed is not None or (self.text is not None and self.text.stopped)

    def count(self, tokens: list[int]) -> int:
        if self.text is None or self.failed:
            return len(tokens)
        try:
            return self.text.feed(tokens)
        except Exception as error:  # one request's text must not end the others
            traceback.print_exc()
            self.failed = DominoError(f"the answer's text can't be made: {error}.")
            return len(tokens)

    def take(self, tokens: list[int]) -> list[int]:
        taken, error = super().take(tokens), getattr(self.guide, "error", "")
        if error and not self.failed:
            self.failed = BadRequest(f"the grammar can be followed no further: {error}.")
        return taken

    def finish(self, reason: str) -> None:
        if self.text is not None and not self.failed:
            self.text.finish()
        super().finish("stop" if self.is_cut and not self.failed else reason)

    def update(self) -> Update:
        """What is new since the last one."""
        tokens, cycles, steps = self.told
        self.told = len(self.tokens), len(self.cycles), self.steps
        return Update(
            self.text.take() if self.text is not None and not self.failed else [],
            tokens,
            self.tokens[tokens:],
            self.logprobs[tokens:],
            self.cycles[cycles:],
            self.steps - steps,
            self.finish_reason,
            self.failed,
        )


Command = tuple[str, Job | None]  # admit, evict or expire a job; or stop


class Link(Protocol):
    """What several processes that decode together do alike."""

    leads: bool  # it is the first one's, which has the clients

    def exchange(self, commands: list[Command]) -> list[Command]:
        """The first process's commands, in every process; it waits for them in the others."""
        ...


class Worker:
    """Runs `Slots` in a thread of its own. Its methods may be called from any thread."""

    def __init__(
        self,
        loaded: LoadedModel,
        size: int,
        auto: bool,
        warm_up: int,
        say: Callable[[str], None],
        seen: Callable[[Job, Update], None] = lambda *_: None,
        link: Link | None = None,
        pages: Pages | None = None,
    ):
        """Args:
        size: requests that decode together.
        auto: choose the draft tokens of a cycle.
        warm_up: positions up to which programs are compiled first.
        say: called with what takes long.
        seen: called with every update, for metrics.
        link: to the other processes that run the model with this one; None without any.
        pages: of the KV cache; None for a contiguous one.
        """
        self._link = link
        self._loaded, self._warm_up, self._say, self._seen, self._pages = loaded, warm_up, say, seen, pages
        most = loaded.configs.proposals
        with loaded.context():
            policy = auto_policy(loaded.configs) if auto and most else FixedDrafts(most)
        self._by_confidence = policy.by_confidence
        # What auto may choose besides the whole block and plain steps is compiled when it is wanted, beside decoding.
        share = COMPILING_ON_CPU if loaded.platform == "cpu" else 1.0
        self._compiler = BackgroundCompiler(loaded.context, share) if link is None else None
        with loaded.context():
            self._slots = self._make(size, policy)
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._new: dict[Job, None] = {}  # submitted, and not seen yet; each change is one call, from any thread
        self._jobs: dict[Job, None] = {}
        self._scoring: dict[Job, Generator[None, None, list[TokenLogprobs | None]]] = {}  # prompts, before their slots
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self.ready = threading.Event()
        self.failed: BaseException | None = None  # what ended the thread
        self.size = self._slots.size

    def _make(self, size: int, policy: DraftPolicy) -> Slots:
        loaded = self._loaded
        kind = Slots if self._pages is None else partial(PagedSlots, pages=self._pages)
        return kind(
            loaded.params,
            loaded.configs,
            size,
            loaded.dtype,
            sizes=SIZES_ON_CPU if loaded.platform == "cpu" else SIZES,
            policy=policy,
            processors=True,
            warn=lambda: self._say(f"warning: {NOT_FINITE_DRAFTS}"),
            compiler=self._compiler,
        )

    def start(self) -> None:
        """Begin: compile, then take requests."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what is running ends as cancelled."""
        self._commands.put(("stop", None))
        self._thread.join()
        if self._compiler:
            self._compiler.close()

    def wait(self, seconds: float) -> bool:
        """Whether the thread has ended, within so many seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Let a request wait for a slot; it is told of everything by its own `tell`."""
        self._new[job] = None
        self._commands.put(("admit", job))

    def cancel(self, job: Job) -> None:
        """End a request as cancelled; one that has ended stays as it is."""
        self._new.pop(job, None)
        self._commands.put(("evict", job))

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._new) + self._slots.waiting + len(self._scoring)

    @property
    def running(self) -> int:
        """Requests in a slot."""
        return self._slots.running

    @property
    def capacity(self) -> int:
        """Positions of a slot."""
        return self._slots.capacity

    @property
    def usage(self) -> float:
        """Share of the KV cache that requests use."""
        return self._slots.usage

    def _run(self) -> None:
        try:
            with self._loaded.context():
                self._compile()
                self.ready.set()
                while self._obey(block=not (self._slots.busy or self._scoring)):
                    if self._scoring:
                        self._score()
                    if self._slots.busy:
                        self._step()
        except BaseException as error:
            self.failed = error
            traceback.print_exc()
            for job in list(self._jobs):
                self._fail(job, DominoError("the server's decoding has ended."))

    def _obey(self, block: bool) -> bool:
        """Do what was asked meanwhile; False when it is to end."""
        for what, job in self._asked(block):
            if job is None:
                for other in list(self._jobs):
                    self._evict(other)
                return False
            self._new.pop(job, None)
            if what != "admit":
                self._evict(job, "length" if what == "expire" else "cancelled")
            elif job.scores:
                self._jobs[job] = None
                self._scoring[job] = self._scores_of(job)
            else:
                self._admit(job)
        return True

    def _asked(self, block: bool) -> list[Command]:
        """What was asked meanwhile, the same in all processes; something at least where it is to `block`."""
        found: list[Command] = []
        if self._link is None or self._link.leads:
            with suppress(Empty):
                while True:
                    found.append(self._commands.get(block and not found))
            now = time.monotonic()
            found += [("expire", job) for job in self._jobs if now > job.deadline]
        return found if self._link is None else self._link.exchange(found)

    def _admit(self, job: Job) -> None:
        """Let a request wait for a slot, or end it where it needs none."""
        self._jobs[job] = None
        if not job.answers:
            job.finish("length")
            self._tell(job)
            return
        try:
            self._slots.admit(job)
        except DominoError as error:
            self._fail(job, error)

    def _evict(self, job: Job, reason: str = "cancelled") -> None:
        if self._scoring.pop(job, None):
            job.finish(reason)
        self._slots.evict(job, reason)
        self._tell(job)

    def _scores_of(self, job: Job) -> Generator[None, None, list[TokenLogprobs | None]]:
        loaded, most = self._loaded, job.request.params.logprobs or 0
        return prompt_logprobs(loaded.params, loaded.configs, job.request.prompt, loaded.dtype, most)

    def _score(self) -> None:
        """Run a chunk of the first prompt whose log-probabilities are wanted; at its end the request waits."""
        job, steps = next(iter(self._scoring.items()))
        try:
            next(steps)
        except StopIteration as end:
            prompt, most = job.request.prompt, job.request.params.logprobs
            alike = [j for j in self._scoring if (j.request.prompt, j.request.params.logprobs) == (prompt, most)]
            for other in alike:  # as several answers to one prompt
                del self._scoring[other]
                other.prompt_logprobs = end.value
                if all(math.isfinite(told.chosen) for told in end.value if told):
                    self._admit(other)
                else:
                    self._fail(other, self._not_finite(other))
        except Exception as error:
            if self._link is not None:  # as in `_step`
                raise
            traceback.print_exc()
            del self._scoring[job]
            self._fail(job, DominoError(f"the prompt's log-probabilities can't be had: {first_line(error)}."))

    def _step(self) -> None:
        if self._compiler:
            self._compiler.decoded()
        try:
            changed: list[Any] = self._slots.step(self._tell_all)
        except Exception as error:  # of the device: what was running is lost, what waits is not
            if self._link is not None:  # what the other processes hold is not known
                raise
            lost = [job for job in self._jobs if not self._slots.holds(job) and job not in self._scoring]
            traceback.print_exc()
            for job in lost:
                said = error if isinstance(error, DominoError) else DominoError("decoding failed; try again.")
                self._fail(job, said)
            return
        self._tell_all(changed)

    def _tell_all(self, changed: list[Any]) -> None:
        """Send what is new to each."""
        for job in changed:
            if job.finite:
                self._tell(job)
            elif job in self._jobs:
                self._fail(job, self._not_finite(job))

    def _not_finite(self, job: Job) -> DominoError:
        target, config = self._loaded.params.target, self._loaded.configs.target
        return not_finite_error(target, config, job.ids, self._loaded.dtype)

    def _tell(self, job: Job) -> None:
        """Send what is new."""
        if job not in self._jobs:
            return
        if job.first is None and job.tokens:
            job.first = time.monotonic() - job.admitted
        update = job.update()
        if job.failed:
            self._slots.evict(job, None)
        if job.failed or job.finish_reason is not None:
            del self._jobs[job]
        self._seen(job, update)
        job.tell(update)

    def _fail(self, job: Job, error: DominoError) -> None:
        self._jobs.pop(job, None)
        job.failed = error
        update = Update([], len(job.tokens), [], [], [], 0, None, error)
        self._seen(job, update)
        job.tell(update)

    def _compile(self) -> None:
        """Run requests that need every program up to `warm_up` positions, by drafts and by plain steps."""
        configs, began = self._loaded.configs, time.monotonic()
        most = cache.length_bucket(min(self._warm_up, configs.target.positions)) if self._warm_up else 0
        drafter = configs.drafter
        chains = {drafter.longest_chain} if isinstance(drafter, Branching) else set()
        capacity = cache.SMALLEST_BUCKET
        while capacity <= most:
            self._say(f"compiling for {capacity} positions, up to {most}")
            room = min(capacity, configs.target.positions) - configs.lookahead - 8
            chunks = [1 << i for i in range(4, 10)]  # of prompts, decode.SMALLEST_CHUNK to decode.LARGEST_CHUNK
            lengths = sorted({min(chunk, room) for chunk in chunks if chunk < 2 * room})
            lengths = [n for n in lengths if cache.length_bucket(n + configs.lookahead) == capacity]
            for temperature in (0.0, 1.0):
                for drafts in {configs.proposals, 0, *chains}:
                    for size in self._slots.sizes:
                        for length in lengths:
                            self._rehearse(size, length, temperature, drafts)
                        lengths = lengths[-1:]  # what follows differs in its decoding alone
            capacity *= 2
        if most:
            self._say(f"compiled in {time.monotonic() - began:.0f} s")

    def _rehearse(self, size: int, length: int, temperature: float, drafts: int) -> None:
        """As many requests as make a batch of so many rows, one that joins them, and the last of them alone."""
        batch = self._make(self._slots.size, FixedDrafts(drafts, by_confidence=self._by_confidence))
        for number in range(size):
            batch.admit(Completion(Request([0] * length, SamplingParams(temperature, max_tokens=2 + 2 * (number < 1)))))
        batch.step()
        list(batch.run([Completion(Request([0] * length, SamplingParams(temperature, max_tokens=2)))]))
