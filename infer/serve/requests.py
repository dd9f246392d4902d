"""From a request's body to what is decoded: prompts, sampling, limits."""

import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from convert.loading import LoadedModel
from convert.tokenizer import decode, encode, encode_chat, has_template
from convert.values import is_whole, shown
from domino_jax.errors import DominoError
from domino_jax.runtime.extras import is_installed, require
from domino_jax.runtime.paged_slots import Pages
from domino_jax.runtime.slots import Request, check_request, room_after
from domino_jax.sampling import SamplingParams
from infer.serve.fields import BadRequest
from infer.serve.manners import (
    AnswerParser,
    ContentPiece,
    has_thinking,
    has_tools,
    messages_for_template,
    opens_reasoning,
)
from infer.serve.worker import Job, Update
from infer.text import TextStream

ENDING = 16  # tokens of a prompt, which tell whether it has opened the thoughts
DEFAULT_TOKENS = 16  # of a completion, as OpenAI has it; a chat may go on to the end of its room


class PlainText:
    """The text of a completion, as one kind of piece."""

    def __init__(self, tokenizer: Any, stops: tuple[str, ...]):
        self._stream = TextStream(tokenizer, stops)
        self._given = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended it."""
        return self._stream.stopped

    def feed(self, tokens: list[int]) -> int:
        """Take tokens, and return how many count."""
        return self._stream.feed(tokens)

    def finish(self) -> None:
        """Release what was held back."""
        self._stream.finish()

    def take(self) -> list[ContentPiece]:
        """What is new and certain."""
        new, self._given = self._stream.text[self._given :], len(self._stream.text)
        return [ContentPiece(new)] if new else []


@dataclass(frozen=True)
class Service:
    """What requests are made for: a model, its manners, and its limits.

    Attributes:
        name: of the model, for clients.
        defaults: sampling where a request is silent.
        positions: of a prompt and its answer together, at most.
        timeout: seconds that a request has.
        thinking: whether a chat thinks where a request is silent.
        pages: of the KV cache; None for a contiguous one.
    """

    loaded: LoadedModel
    name: str
    defaults: Mapping[str, Any]
    positions: int
    timeout: float
    thinking: bool = False
    pages: Pages | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        """Whether the model has a chat template."""
        return has_template(self.loaded.tokenizer)

    @property
    def template(self) -> Any:
        """The chat template."""
        return getattr(self.loaded.tokenizer, "chat_template", None)

    def check_model(self, body: Mapping[str, Any]) -> None:
        """Refuse a request for another model.

        Raises:
            BadRequest: it is for one.
        """
        if body.get("model", self.name) != self.name:
            raise BadRequest(f"this server has the model {self.name}, not {shown(body['model'])}.", "model")

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            BadRequest: there is none.
        """
        if self.loaded.tokenizer is None:
            raise BadRequest("this model has no tokenizer: give token ids as the prompt of a completion.", "prompt")
        return self.loaded.tokenizer

    def chat_ids(self, body: Mapping[str, Any]) -> tuple[list[int], bool]:
        """The ids of a chat's messages, and whether the template has opened the thoughts.

        Raises:
            BadRequest: the messages can't be read, or the template refuses them.
        """
        if not self.is_chat:
            raise BadRequest("this model has no chat template: use /v1/completions.", "messages")
        tools = body.get("tools") if body.get("tool_choice") != "none" else None
        if tools and not has_tools(self.template):
            raise BadRequest("this model's chat template knows no tools.", "tools")
        try:
            messages = messages_for_template(body["messages"])
            ids = encode_chat(self.loaded.tokenizer, messages, self.thinks(body), tools or None)
            ending = self.loaded.tokenizer.decode(ids[-ENDING:], skip_special_tokens=False)
        except DominoError as error:
            raise BadRequest(str(error), "messages") from None
        return ids, opens_reasoning(ending)

    def thinks(self, body: Mapping[str, Any]) -> bool:
        """Whether a chat is to think before it answers."""
        return body.get("chat_template_kwargs", {}).get("enable_thinking", self.thinking)

    def forced(self, body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The functions of which a chat's answer must be calls; none where it need not call any.

        Raises:
            BadRequest: tool_choice is none of the tools, or parallel_tool_calls can't be honoured.
        """
        choice, functions = body.get("tool_choice", "auto"), [tool["function"] for tool in body.get("tools", ())]
        if choice == "required" and not functions:
            raise BadRequest("tool_choice 'required' needs tools.", "tool_choice")
        if choice == "auto" and functions and not body.get("parallel_tool_calls", True):
            raise BadRequest(
                "parallel_tool_calls must be true where the model decides: false goes with tool_choice 'required'.",
                "parallel_tool_calls",
            )
        if isinstance(choice, dict):
            name = choice["function"]["name"]
            functions = [function for function in functions if function["name"] == name]
            if not functions:
                raise BadRequest(f"tool_choice names {shown(name)}, which is none of the tools.", "tool_choice")
        if choice in ("auto", "none"):
            return []
        names = [function["name"] for function in functions]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise BadRequest(f"tools has the function {shown(twice)} twice.", "tools")
        return functions

    def has_strict(self, body: Mapping[str, Any]) -> bool:
        """Whether a chat may call a function, and need not, whose arguments have to follow its schema."""
        tools = body.get("tools", ()) if body.get("tool_choice", "auto") == "auto" else ()
        return any(tool["function"].get("strict") for tool in tools)

    def prompts(self, prompt: Any) -> list[list[int]]:
        """The ids of a completion's prompt or prompts.

        Raises:
            BadRequest: they are neither texts nor ids.
        """
        several = prompt if isinstance(prompt, list) and all(isinstance(p, str | list) for p in prompt) else [prompt]
        if len(several) > 64:
            raise BadRequest(f"64 prompts can be had at once, found {len(several)}.", "prompt")
        found = []
        for one in several:
            if isinstance(one, list):
                if not one or not all(is_whole(i) and 0 <= i < 2**31 for i in one):
                    raise BadRequest("prompt must be texts or token ids, and none of them empty.", "prompt")
                found.append([int(i) for i in one])
                continue
            try:
                found.append(encode(self.tokenizer(), one))
            except DominoError as error:
                raise BadRequest(str(error), "prompt") from None
        return found

    def sampling(self, body: Mapping[str, Any], prompt: list[int], limit: int | None) -> SamplingParams:
        """How the tokens after a prompt are chosen.

        Args:
            limit: tokens to generate at most; all that fit when None.

        Raises:
            BadRequest: the prompt and its answer can never fit, or a value can't be honoured.
        """
        room = room_after(prompt, self.positions)
        if room < 1 or (limit is not None and limit > room):
            asked = f" and {limit} new ones" if limit is not None else ""
            raise BadRequest(
                f"the prompt has {len(prompt)} tokens{asked}, and this server has room for {self.positions} together.",
                "max_tokens" if room >= 1 else "prompt",
            )
        given = {**self.defaults, **body}
        seed = given.get("seed")
        biases = {int(token): float(bias) for token, bias in given.get("logit_bias", {}).items()}
        params = SamplingParams(
            temperature=float(given.get("temperature", 0.0)),
            top_k=max(0, given.get("top_k", 0)),
            top_p=float(given.get("top_p", 1.0)),
            min_p=float(given.get("min_p", 0.0)),
            max_tokens=room if limit is None else limit,
            stop_token_ids=(*self.loaded.stop_ids, *given.get("stop_token_ids", ())),
            seed=secrets.randbits(32) if seed is None else seed % 2**32,
            sampler="rejection" if seed is None else "coupled",
            repetition_penalty=float(given.get("repetition_penalty", 1.0)),
            presence_penalty=float(given.get("presence_penalty", 0.0)),
            frequency_penalty=float(given.get("frequency_penalty", 0.0)),
            logit_bias=tuple(biases.items()),
            min_tokens=given.get("min_tokens", 0),
            logprobs=logprobs_of(body),
        )
        try:
            check_request(self.loaded.configs, Request(prompt, params))
        except DominoError as error:
            raise BadRequest(str(error)) from None
        return params

    def job(self, prompt: list[int], params: SamplingParams, number: int, text: Any, body: Mapping[str, Any]) -> Job:
        """One answer to be decoded.

        Args:
            number: of the request's answers, from 0 on.
            text: makes text of its tokens; None for a model without a tokenizer.
        """
        job = Job(Request(prompt, params, (number,)), guide=self.guide(body, text), text=text)
        job.speculative = body.get("speculative", True)
        job.scores = params.logprobs is not None and body.get("echo", False)
        job.answers = body.get("max_tokens") != 0
        job.deadline = time.monotonic() + self.timeout
        return job

    def prepare_grammars(self) -> None:
        """Do what takes seconds, and would hold up others, before the first request asks for a grammar."""
        if self.loaded.tokenizer is not None and is_installed("llguidance"):
            from infer.serve.guides import wrapped_tokenizer

            with suppress(Exception):  # it is told to whoever asks for a grammar
                wrapped_tokenizer(self.loaded.tokenizer, self.loaded.configs.target.vocab_size, self.loaded.stop_ids)

    def guide(self, body: Mapping[str, Any], text: Any) -> Any:
        """What an answer's tokens are held to; None for nothing.

        Args:
            text: makes text of the answer's tokens.

        Raises:
            BadRequest: the grammar can't be used, several are asked for, or llguidance is not installed.
        """
        functions = self.forced(body)
        asked = {
            "response_format": body.get("response_format", {}).get("type", "text") != "text",
            "structured_outputs": "structured_outputs" in body,
            "tool_choice": bool(functions),
            "tools": self.has_strict(body),
        }
        found = [field for field, is_asked in asked.items() if is_asked]
        if not found:
            return None
        if len(found) > 1:
            raise BadRequest(f"one grammar can be had, and {' and '.join(found)} ask for one each.", found[-1])
        (field,) = found
        try:
            require("llguidance")
        except DominoError as error:
            raise BadRequest(f"{field} can't be honoured: {error}", field) from None
        from infer.serve.guides import AfterThoughts, calls_grammar, grammar_of, make_guide

        tokens = text.tokens_of_markers if isinstance(text, AnswerParser) else {}
        if functions:
            several = body["tool_choice"] == "required" and body.get("parallel_tool_calls", True)
            grammar = calls_grammar(functions, several, tokens)
        elif field == "tools":
            grammar = calls_grammar([tool["function"] for tool in body["tools"]], True, tokens, text=True)
        else:
            grammar = grammar_of(field, body)
        vocab_size = self.loaded.configs.target.vocab_size
        guide = make_guide(self.tokenizer(), vocab_size, self.loaded.stop_ids, grammar, field)
        if not isinstance(text, AnswerParser) or not text.splits:
            return guide
        return AfterThoughts(guide, text, self.thinks(body), self.loaded.stop_ids)

    def text(self, body: Mapping[str, Any], chat: bool, in_reasoning: bool = False) -> Any:
        """What makes text of one answer's tokens."""
        stops = (body["stop"],) if isinstance(body.get("stop"), str) else tuple(body.get("stop", ()))
        if self.loaded.tokenizer is None:
            if stops:
                raise BadRequest("stop needs a tokenizer, and this model has none.", "stop")
            return None
        if not chat:
            return PlainText(self.loaded.tokenizer, stops)
        reasoning, tools = has_thinking(self.template), bool(body.get("tools")) and body.get("tool_choice") != "none"
        forced = [function["name"] for function in self.forced(body)]
        return AnswerParser(
            self.loaded.tokenizer,
            stops,
            reasoning=reasoning,
            tools=tools,
            in_reasoning=in_reasoning and reasoning,
            forced=forced,
        )


def logprobs_of(body: Mapping[str, Any]) -> int | None:
    """How many likeliest tokens a body asks for, in either API's form.

    Raises:
        BadRequest: top_logprobs without logprobs.
    """
    asked = body.get("logprobs")
    if isinstance(asked, bool) or "top_logprobs" in body:
        if body.get("top_logprobs") and not asked:
            raise BadRequest("top_logprobs needs logprobs: true.", "top_logprobs")
        return body.get("top_logprobs", 0) if asked else None
    return asked


def token_text(tokenizer: Any, token: int) -> str:
    """One token as text; its id where there is no tokenizer."""
    return decode(tokenizer, [token]) if tokenizer is not None else str(token)


@dataclass
class Total:
    """What all updates of a job gave together."""

    update: Update = field(default_factory=lambda: Update([], 0, [], [], [], 0))

    def add(self, new: Update) -> None:
        """Add an update."""
        old = self.update
        self.update = replace(
            new,
            start=0,
            pieces=old.pieces + new.pieces,
            tokens=old.tokens + new.tokens,
            logprobs=old.logprobs + new.logprobs,
            cycles=old.cycles + new.cycles,
            steps=old.steps + new.steps,
        )
