"""Models from Python: `load`, and what a loaded model does.

Example:
    >>> from infer import load
    >>> model = load()  # the shipped pair of small models; or load("qwen3-4b")
    >>> for text in model.stream("import torch\\n", raw=True, max_new_tokens=8):
    ...     print(text, end="")
    from torch import nn
    <BLANKLINE>
    from ...
    >>> answer, = model.generate(["def main():"], raw=True, max_new_tokens=16)
    >>> answer.finish_reason, len(answer.tokens), answer.tau > 1
    ('length', 16, True)
"""

import dataclasses
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, Unpack

from rich.console import Console

from convert import options
from convert.loading import LoadedModel
from convert.messages import Message
from convert.options import (
    Attention,
    DeviceOptions,
    DraftingOptions,
    Dtype,
    Matrices,
    ModelOptions,
    Sampler,
    SamplingOptions,
    TreeCorrection,
    Weights,
    check_count,
)
from convert.values import json_kind, shown, token_ids
from domino_jax.config import TargetConfig
from domino_jax.runtime.command import UsageError
from domino_jax.weights import Params
from infer import engine
from infer.chat import Chat
from infer.engine import Decoding, Engine, tau
from infer.prompts import Encoder, Prompt
from infer.rows import conversation_in_row
from infer.text import unmatched_stops

Input = str | Sequence[Message] | Sequence[int]  # text, messages or token ids


class GenerateOptions(TypedDict, total=False):
    """How to generate: the keywords are the flags of `python -m infer`."""

    max_new_tokens: int  # most tokens to generate; 256
    temperature: float  # 0 is greedy; 0
    top_k: int  # sample from the k likeliest tokens; 0 is off
    top_p: float  # sample from the likeliest tokens that together have this probability; 1 is off
    min_p: float  # drop tokens below this share of the likeliest token's probability; 0 is off
    seed: int  # of the random keys; 0. With a seed the sampler is the coupled one
    sampler: Sampler  # a coupled sample depends on the seed alone; rejection accepts more drafts
    stop: str | Sequence[str]  # end before this text, or one of these
    raw: bool  # do not apply the chat template: continue the prompt
    thinking: bool  # let the model think before it answers, if its template can
    system: str  # system message


@dataclass(frozen=True)
class CompletionOutput:
    """What was generated for one prompt."""

    text: str | None  # without a stop string; None where the model's folder has no tokenizer
    tokens: list[int]
    finish_reason: Literal["stop", "length"]
    accepted: list[int] = field(repr=False)  # draft tokens accepted in each cycle
    prompt_tokens: list[int] = field(repr=False)

    @property
    def tau(self) -> float | None:
        """τ, the mean acceptance length: tokens a cycle, with the bonus token. None without a cycle."""
        return tau(self.accepted)


class Model:
    """A loaded target with its drafter.

    Attributes:
        params: the weights, `params.target` and `params.draft`.
        config: the target's config; `draft_config` the drafter's, None without one.
        tokenizer: a transformers tokenizer, None where the folder has none.
    """

    def __init__(self, loaded: LoadedModel, auto: bool = True):
        """Args: auto: choose the number of draft tokens by measured time and acceptance."""
        self.loaded = loaded
        self.engine = Engine(loaded, auto=auto)

    @property
    def params(self) -> Params:
        return self.loaded.params

    @property
    def config(self) -> TargetConfig:
        return self.loaded.configs.target

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    def stream(self, prompt: Input, **how: Unpack[GenerateOptions]) -> Generator[str]:
        """The text of one completion, as it grows.

        Args:
            prompt: text (an answer's question where the model has a chat template), messages, or token ids.

        Raises:
            DominoError: the prompt is empty, too long, or needs a tokenizer or chat template that is not there.
            UsageError: a value is out of range.
        """
        request = _Request(self, how)
        return self._texts(request.sequence(prompt, 0), request.decoding)

    def _texts(self, sequence: engine.Sequence, decoding: Decoding) -> Generator[str]:
        with closing(self.engine.stream([sequence], decoding)) as chunks:
            for chunk in chunks:
                if chunk.text:
                    yield chunk.text

    def generate(
        self, prompts: Sequence[Input], *, batch_size: int = 8, **how: Unpack[GenerateOptions]
    ) -> list[CompletionOutput]:
        """A completion of each prompt, in their order; see `stream`.

        Args:
            batch_size: prompts that run together.
        """
        check_count("batch_size", batch_size)
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise UsageError(f"prompts must be a list of prompts, found {json_kind(prompts)}: put one into a list.")
        request = _Request(self, how)
        sequences = [request.sequence(prompt, row) for row, prompt in enumerate(prompts)]
        if sequences:
            decoding = dataclasses.replace(request.decoding, rows=min(batch_size, len(sequences)))
            self.engine.generate(sequences, decoding)
        return [
            CompletionOutput(s.text, s.tokens, "stop" if s.finish_reason == "stop" else "length", s.accepted, s.prompt)
            for s in sequences
        ]

    def chat(self, **how: Unpack[GenerateOptions]) -> Chat:
        """A conversation. Each turn runs only what the turns before did not.

        Example:
            >>> chat = load().chat(max_new_tokens=8)
            >>> answer = chat.send("import numpy")
            >>> [message["role"] for message in chat.messages]
            ['user', 'assistant']
        """
        request = _Request(self, how)
        return Chat(self.engine, request.encoder, request.decoding, request.max_new_tokens, request.stop)


class _Request:
    """Checked keywords."""

    def __init__(self, model: Model, how: GenerateOptions):
        unknown = sorted(set(how) - set(GenerateOptions.__annotations__))
        if unknown:
            raise UsageError(f"{unknown[0]} is no keyword; those are {', '.join(GenerateOptions.__annotations__)}.")
        sampling = SamplingOptions(
            how.get("temperature", 0.0),
            how.get("top_k", 0),
            how.get("top_p", 1.0),
            how.get("min_p", 0.0),
            how.get("seed"),
            how.get("sampler"),
        )
        sampling.check()
        self.engine = model.engine
        self.decoding = Decoding(sampling.params())
        self.max_new_tokens = how.get("max_new_tokens", 256)
        check_count("max_new_tokens", self.max_new_tokens)
        stop = how.get("stop", ())
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UsageError(f"stop must be texts that are not empty, found {shown(stop)}.")
        raw, thinking, system = how.get("raw", False), how.get("thinking", False), how.get("system")
        for name, value in (("raw", raw), ("thinking", thinking)):
            if not isinstance(value, bool):
                raise UsageError(f"{name} must be True or False, found {shown(value)}.")
        if system is not None and not isinstance(system, str):
            raise UsageError(f"system must be text, found {shown(system)}.")
        self.encoder = Encoder(model.tokenizer, raw, thinking, system)
        _warn(self.encoder.check(model.loaded.has_block_drafter))
        if self.stop and model.tokenizer is not None:
            _warn(unmatched_stops(model.tokenizer, self.stop, model.loaded.stop_ids))

    def sequence(self, prompt: Input, row: int) -> engine.Sequence:
        ids = self.encoder.ids(as_prompt(prompt))
        sequence, found = self.engine.sequence(ids, self.max_new_tokens, row, self.stop)
        _warn(found)
        return sequence


def _warn(found: Iterable[str]) -> None:
    for warning in found:
        warnings.warn(warning, stacklevel=4)


def as_prompt(prompt: Input) -> Prompt:
    """Text, messages or token ids as a Prompt."""
    if isinstance(prompt, str):
        return Prompt(text=prompt)
    if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], Mapping):
        conversation = conversation_in_row({"messages": prompt}, "the prompt")
        return Prompt(messages=conversation[0] if conversation else None)
    try:
        return Prompt(ids=token_ids(prompt, "the prompt"))
    except ValueError as error:
        raise UsageError(f"{error}; a prompt is text, a list of messages, or a list of token ids.") from None


def load(
    model: str = "demo",
    *,
    draft: str | None = None,
    revision: str | None = None,
    draft_revision: str | None = None,
    num_draft_tokens: int | Literal["auto"] | None = None,
    head_candidates: int | Literal["all"] = "all",
    weights: Weights = "auto",
    draft_weights: Weights = "auto",
    dtype: Dtype | None = None,
    matrices: Matrices = "auto",
    attention: Attention = "auto",
    mesh: str | None = None,
    tree: int | None = None,
    tree_lanes: int | None = None,
    tree_candidates: int | Literal["all"] | None = None,
    tree_correction: TreeCorrection = "path",
    confidence_threshold: float | None = None,
) -> Model:
    """A target and its drafter, fetched from the Hub where needed. The keywords are the flags of `python -m infer`.

    Args:
        model: a public name such as "qwen3-4b", a folder, a GGUF file, or "org/repo"; the shipped demo by default.
        draft: likewise the drafter, or "none"; by default the public one of the model.
        revision, draft_revision: branch, tag or commit of a Hub repository.
        num_draft_tokens: draft tokens verified per cycle; None and "auto" choose by measured time and acceptance.
        head_candidates: vocabulary entries that the causal head scores.
        weights: of the target's matrices: "exact" (so far "auto" too), or "int8" or "float8", which is another model.
        draft_weights: likewise of the drafter's, which changes its drafts and not the output.
        dtype: of weights and caches; float32 on CPUs, bfloat16 elsewhere when None.
        matrices: how a float32 run holds weights that are stored in bfloat16.
        attention: the backend.
        mesh: devices to spread over, such as "data=2,model=4".
        tree: verify a tree of so many drafts a cycle, or of half as many, or a chain, or none, as is faster.
        tree_lanes, tree_candidates, tree_correction: how it is made, see `domino_jax.drafters.tree.TreeDrafter`.
        confidence_threshold: end a chain before the first draft that a block drafter is less sure of.

    Raises:
        DominoError: a model is not found, not supported, or can't run here; UsageError: the values contradict.
    """
    asked = ModelOptions(
        model,
        revision,
        DraftingOptions(
            draft,
            draft_revision,
            head_candidates,
            draft_weights,
            tree=tree,
            tree_lanes=tree_lanes,
            tree_candidates=tree_candidates,
            tree_correction=tree_correction,
            confidence_threshold=confidence_threshold,
        ),
        DeviceOptions(dtype, weights, matrices, attention, mesh),
    )
    asked.check()
    auto = num_draft_tokens in (None, "auto")
    if not auto:
        check_count("num_draft_tokens", num_draft_tokens)
    fixed = num_draft_tokens if isinstance(num_draft_tokens, int) else None
    loaded = options.load_pair(asked, Console(stderr=True), num_draft_tokens=fixed)
    _warn(loaded.warnings)
    return Model(loaded, auto)
