"""Answers in OpenAI's forms: whole, and as the chunks of a stream."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from convert.tokenizer import decode
from domino_jax.errors import DominoError
from domino_jax.runtime.slots import TokenLogprobs
from infer.serve.manners import AnswerParser, ContentPiece, ReasoningPiece, ToolCallArguments, ToolCallStart
from infer.serve.requests import token_text
from infer.serve.worker import Job, Update
from infer.text import Detokenizer, knows_thinking


def usage(jobs: Sequence[Job]) -> dict[str, Any]:
    """Tokens of a request's answers, with how they were decoded."""
    prompt = len(jobs[0].request.prompt) if jobs else 0
    written = sum(len(job.tokens) for job in jobs)
    accepted = [m for job in jobs for m in job.accepted]
    seconds = max((job.seconds["decode"] for job in jobs), default=0.0)
    thoughts = [text.reasoning_tokens for job in jobs if isinstance(text := job.text, AnswerParser) and text.splits]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": jobs[0].reused if jobs else 0},
        **({"completion_tokens_details": {"reasoning_tokens": sum(thoughts)}} if thoughts else {}),
        "domino": {
            "tau": sum(accepted) / len(accepted) + 1 if accepted else None,
            "tokens_per_second": (written - len(jobs)) / seconds if seconds else None,
            "cycles": len(accepted),
            "plain_steps": sum(job.steps for job in jobs),
        },
    }


def finish_reason(job: Job, called: bool) -> str | None:
    """Why an answer ended, as OpenAI has it."""
    if job.finish_reason == "stop":
        return "tool_calls" if called else "stop"
    return "length" if job.finish_reason in ("length", "cancelled") else None


def message_parts(pieces: Sequence[Any]) -> dict[str, Any]:
    """The parts of a chat's answer: content, reasoning and calls, as a delta or as a whole message."""
    found: dict[str, Any] = {}
    content = "".join(p.text for p in pieces if isinstance(p, ContentPiece))
    reasoning = "".join(p.text for p in pieces if isinstance(p, ReasoningPiece))
    if content:
        found["content"] = content
    if reasoning:  # clients read one or the other
        found["reasoning"] = found["reasoning_content"] = reasoning
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        if isinstance(piece, ToolCallStart):
            start = {"name": piece.name, "arguments": ""}
            calls[piece.index] = {"index": piece.index, "id": piece.id, "type": "function", "function": start}
        elif isinstance(piece, ToolCallArguments):
            call = calls.setdefault(piece.index, {"index": piece.index, "function": {"arguments": ""}})
            call["function"]["arguments"] += piece.text
    if calls:
        found["tool_calls"] = list(calls.values())
    return found


def whole_message(pieces: Sequence[Any]) -> dict[str, Any]:
    """A chat's answer."""
    parts = message_parts(pieces)
    for call in parts.get("tool_calls", ()):
        del call["index"]
    return {"role": "assistant", "content": parts.pop("content", None if parts.get("tool_calls") else ""), **parts}


def chat_logprobs(tokenizer: Any, tokens: Sequence[int], found: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
    """Log-probabilities of a chat's tokens."""
    if not found:
        return None

    def one(token: int, value: float) -> dict[str, Any]:
        text = token_text(tokenizer, token)
        return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8", "replace"))}

    rows = zip(tokens, found, strict=False)
    return {
        "content": [
            {**one(token, told.chosen), "top_logprobs": [one(i, value) for i, value in told.likeliest]}
            for token, told in rows
        ]
    }


def completion_logprobs(
    tokenizer: Any, tokens: Sequence[int], found: Sequence[TokenLogprobs | None], start: int = 0
) -> dict[str, Any] | None:
    """Log-probabilities of a completion's tokens; none of a prompt's first, which nothing precedes.

    Args:
        start: characters of the text before them.
    """
    if not found:
        return None
    texts, offsets = [token_text(tokenizer, token) for token in tokens], []
    for text in texts:
        offsets.append(start)
        start += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [told and told.chosen for told in found],
        "top_logprobs": [told and {token_text(tokenizer, i): value for i, value in told.likeliest} for told in found],
        "text_offset": offsets,
    }


class DraftPieces:
    """Where the tokens of one answer came from: for the page, and whoever asks with return_drafts.

    Text appears with the token that completes its characters.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._stream = Detokenizer(tokenizer) if tokenizer is not None else None

    def add(self, update: Update) -> list[dict[str, Any]]:
        """The cycles of an update, and what came between them."""
        found: list[dict[str, Any]] = []
        place = 0
        for cycle in update.cycles:
            at = cycle.start - update.start
            self._own(update.tokens[place:at], found)
            pieces = self._kept(cycle.tokens[: cycle.accepted], "accepted")
            rejected = cycle.drafts[cycle.accepted :]
            if len(cycle.tokens) > cycle.accepted and rejected and self._stream:
                pieces.append({"text": decode(self._tokenizer, rejected), "origin": "rejected"})
            pieces += self._kept(cycle.tokens[cycle.accepted :], "target")
            counts = {"accepted": cycle.accepted, "proposed": len(cycle.drafts), "tokens": len(cycle.tokens)}
            found.append({"pieces": pieces, **counts})
            place = at + len(cycle.tokens)
        self._own(update.tokens[place:], found)
        if update.finish_reason is not None and self._stream and (rest := self._stream.finish()):
            found.append({"pieces": [{"text": rest, "origin": "target"}], "accepted": 0, "proposed": 0, "tokens": 0})
        return found

    def _own(self, tokens: Sequence[int], found: list[dict[str, Any]]) -> None:
        """The prefill's token, or plain steps."""
        if tokens:
            pieces = self._kept(tokens, "target")
            found.append({"pieces": pieces, "accepted": 0, "proposed": 0, "tokens": len(tokens)})

    def _kept(self, tokens: Sequence[int], origin: str) -> list[dict[str, str]]:
        text = self._stream.feed(tokens) if tokens and self._stream else ""
        return [{"text": text, "origin": origin}] if text else []


def head(kind: str, identity: str, model: str) -> dict[str, Any]:
    """What every object of an answer begins with."""
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model}


def error(sentence: str, kind: str, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": sentence, "type": kind, "param": field, "code": code}}


def has_switch(tokenizer: Any) -> bool:
    """Whether a request can switch thinking on and off."""
    try:
        return knows_thinking(tokenizer)
    except DominoError:
        return False


def tokens_before(body: Mapping[str, Any], tokenizer: Any, prompt: Sequence[int]) -> str:
    """The text that `echo` puts before an answer."""
    return decode(tokenizer, list(prompt)) if body.get("echo") and tokenizer is not None else ""
