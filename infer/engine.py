"""Text around the host loop: prompts in, tokens and text out."""

import dataclasses
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import NamedTuple

from convert.loading import LoadedModel
from convert.not_finite import NOT_FINITE_DRAFTS, check_finite
from domino_jax import decode
from domino_jax.decode import Accept
from domino_jax.errors import DominoError
from domino_jax.runtime.auto_trees import auto_policy
from domino_jax.runtime.slots import Completion, Request, Slots, check_request, room_after
from domino_jax.runtime.timing import no_seconds
from domino_jax.sampling import SamplingParams
from infer.text import TextStream


@dataclass(frozen=True)
class Decoding:
    """How sequences are decoded."""

    sampling: SamplingParams = field(default_factory=SamplingParams)  # of all; a sequence's own limit and ends stay
    speculative: bool = True  # draft and verify if there is a drafter; False for the autoregressive baseline
    rows: int = 0  # that run together; all sequences when 0


@dataclass(eq=False)
class Sequence(Completion):
    """One prompt and what is generated for it, as tokens and text."""

    stream: TextStream | None = None  # None without a tokenizer

    @property
    def row(self) -> int:
        """Its number, which gives the random key, so that an answer does not depend on its batch neighbours."""
        return self.request.numbers[0]

    @property
    def prompt(self) -> list[int]:
        return list(self.request.prompt)

    @property
    def limit(self) -> int:
        """Tokens to generate at most."""
        return self.request.params.max_tokens

    @property
    def text(self) -> str | None:
        """The text so far, in whole characters and without a stop string."""
        return self.stream.text if self.stream else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding alone: the first token is the prefill's. None where nothing was decoded."""
        return tokens_per_second([self], self.seconds["decode"])

    @property
    def is_cut(self) -> bool:
        return self.stream is not None and self.stream.stopped

    def count(self, tokens: list[int]) -> int:
        return self.stream.feed(tokens) if self.stream else len(tokens)

    def finish(self, reason: str) -> None:
        """End the sequence, releasing the text that was held back."""
        if self.stream:
            self.stream.finish()
        super().finish("stop" if self.is_cut else reason)


class Chunk(NamedTuple):
    """What a dispatch added to one sequence."""

    sequence: Sequence
    text: str  # whole characters, without what may still become a stop string; empty without a tokenizer
    tokens: list[int]


def tau(accepted: list[int]) -> float | None:
    """τ, the mean acceptance length (drafts and bonus) over cycles; None without any."""
    return sum(accepted) / len(accepted) + 1 if accepted else None


def tokens_per_second(sequences: list[Sequence], seconds: float) -> float | None:
    """The rate at which sequences were decoded in so many seconds, all together."""
    return sum(len(s.tokens) - 1 for s in sequences if s.tokens) / seconds if seconds else None


class Engine:
    """Runs sequences on a loaded model."""

    def __init__(
        self,
        loaded: LoadedModel,
        cycles: int = 8,
        auto: bool = False,
        warn: Callable[[str], None] = warnings.warn,
        accept: Accept = decode.accept,
    ):
        """Args:
        cycles: draft-and-verify cycles a dispatch; output arrives after each dispatch.
        auto: choose the drafts of a cycle before each dispatch, from the times of those before and from what was
            accepted so far. Greedy output is the same, and so are coupled samples; by rejection, the drafts decide how
            the random numbers are used, so that a run may give other samples, of the same distribution.
        warn: called with what is wrong but changes no output.
        accept: decides which drafts stand; another one than the default is for measuring speed alone.
        """
        self.loaded = loaded
        self.cycles = cycles
        configs = loaded.configs
        with loaded.context():
            self.auto = auto_policy(configs) if auto and configs.drafter is not None else None
        self.seconds = no_seconds()  # of each phase of the newest call of `stream` or `generate`
        self._accept = accept
        self._warn: Callable[[str], None] | None = warn

    def slots(self, rows: int, speculative: bool = True) -> Slots:
        """A batch of rows for `stream` to use again, such as one row for the turns of a conversation."""
        loaded = self.loaded
        configs, params = loaded.configs, loaded.params
        if not speculative:
            configs, params = configs.without_drafter, params.without_drafter
        with loaded.context():
            return Slots(
                params,
                configs,
                rows,
                loaded.dtype,
                policy=self.auto if speculative else None,
                cycles=self.cycles,
                accept=self._accept,
                warn=self._warn_of_drafts,
            )

    def sequence(
        self, prompt: list[int], max_new_tokens: int, row: int = 0, stops: tuple[str, ...] = ()
    ) -> tuple[Sequence, list[str]]:
        """A sequence to generate, with warnings.

        Raises:
            DominoError: the prompt is empty, has ids outside the vocabulary, or exceeds the positions.
        """
        loaded, found = self.loaded, []
        positions = loaded.configs.target.positions
        fits = max(room_after(prompt, positions), 1)
        params = SamplingParams(max_tokens=min(max_new_tokens, fits), stop_token_ids=loaded.stop_ids)
        request = Request(list(prompt), params, (row,))
        check_request(loaded.configs, request)
        if max_new_tokens > fits:
            found.append(f"at most {fits} new tokens fit the model's {positions} positions after this prompt.")
        if stops and loaded.tokenizer is None:
            raise DominoError("stop strings need a tokenizer, and the model's folder has none.")
        stream = TextStream(loaded.tokenizer, stops) if loaded.tokenizer is not None else None
        return Sequence(request, stream=stream), found

    def generate(self, sequences: list[Sequence], how: Decoding | None = None, slots: Slots | None = None) -> None:
        """Generate all sequences, in place; see `stream`."""
        for _ in self.stream(sequences, how, slots):
            pass

    def stream(
        self, sequences: list[Sequence], how: Decoding | None = None, slots: Slots | None = None
    ) -> Generator[Chunk]:
        """Generate all sequences, in place, and yield what each step adds to them.

        Closing the generator early ends the sequences as cancelled.

        Args:
            how: greedy and speculative when None.
            slots: what to run them in, to go on with what it holds; a new batch when None.

        Raises:
            KeyboardInterrupt: the user cancelled; the sequences hold what was generated.
            DominoError: the device's memory is exhausted, or the target's logits are not finite.
        """
        how, loaded = how or Decoding(), self.loaded
        slots = slots or self.slots(how.rows or len(sequences), how.speculative)
        before, self.seconds = dict(slots.seconds), no_seconds()
        told: dict[Sequence, tuple[int, int]] = dict.fromkeys(sequences, (0, 0))  # tokens and characters of each
        try:
            for s in sequences:
                own = s.request.params
                kept = {"max_tokens": own.max_tokens, "stop_token_ids": own.stop_token_ids}
                s.request = dataclasses.replace(s.request, params=dataclasses.replace(how.sampling, **kept))
                slots.admit(s)
            while slots.busy:
                with loaded.context():  # not around what the caller does
                    changed = slots.step()
                self.seconds = {phase: spent - before[phase] for phase, spent in slots.seconds.items()}
                for s in changed:
                    assert isinstance(s, Sequence)
                    if s.stream and not s.finite:
                        s.stream.finish()
                    tokens, text = s.tokens[told[s][0] :], (s.text or "")[told[s][1] :]
                    told[s] = told[s][0] + len(tokens), told[s][1] + len(text)
                    if tokens or text:
                        yield Chunk(s, text, tokens)
                with loaded.context():
                    for s in changed:
                        check_finite(s, loaded.params.target, loaded.configs.target, loaded.dtype)
        except BaseException as error:
            for s in sequences:
                slots.evict(s, "cancelled" if isinstance(error, KeyboardInterrupt | GeneratorExit) else None)
            raise

    def _warn_of_drafts(self) -> None:
        """Say, once, that the drafter's numbers are not finite."""
        if self._warn:
            self._warn(NOT_FINITE_DRAFTS)
            self._warn = None
