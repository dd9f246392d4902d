"""OpenAI's Responses API, without what it would have to remember between requests."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from convert.values import shown
from infer.serve import replies
from infer.serve.fields import BadRequest
from infer.serve.manners import ContentPiece, ReasoningPiece
from infer.serve.worker import Job

TEXT_PARTS = ("input_text", "output_text", "text")


def response_messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages that a body's input and instructions are.

    Raises:
        BadRequest: an item of the input is no message of text.
    """
    given = body["input"]
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    messages = [{"role": "system", "content": body["instructions"]}] if "instructions" in body else []
    for item in items:
        if not isinstance(item, dict) or item.get("type", "message") != "message" or "role" not in item:
            raise BadRequest(f"input may have messages alone, found {shown(item)}.", "input")
        content = item.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and part.get("type") in TEXT_PARTS for part in content):
                raise BadRequest("the parts of a message may be input_text and output_text alone.", "input")
            content = "".join(str(part.get("text", "")) for part in content)
        messages.append({"role": item["role"], "content": content})
    return messages


def response_body(
    identity: str, model: str, body: Mapping[str, Any], job: Job | None, pieces: Sequence[Any], status: str = ""
) -> dict[str, Any]:
    """A whole response."""
    output: list[dict[str, Any]] = []
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, ReasoningPiece))
    content = "".join(piece.text for piece in pieces if isinstance(piece, ContentPiece))
    if job is not None:
        if reasoning:
            part = {"type": "reasoning_text", "text": reasoning}
            output.append({"id": f"rs_{identity}", "type": "reasoning", "summary": [], "content": [part]})
        output.append(message_item(identity, content, "completed"))
    cut = job is not None and job.finish_reason != "stop"
    usage = None
    if job is not None:
        found = replies.usage([job])
        usage = {
            "input_tokens": found["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": job.reused},
            "output_tokens": found["completion_tokens"],
            "output_tokens_details": found.get("completion_tokens_details", {"reasoning_tokens": 0}),
            "total_tokens": found["total_tokens"],
        }
    return {
        "id": f"resp_{identity}",
        "object": "response",
        "created_at": int(time.time()),
        "status": status or ("incomplete" if cut else "completed"),
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "model": model,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": False,
        "temperature": body.get("temperature"),
        "text": {"format": {"type": "text"}},
        "tool_choice": "none",
        "tools": [],
        "top_p": body.get("top_p"),
        "metadata": body.get("metadata") or {},
        "usage": usage,
    }


def message_item(identity: str, text: str, status: str) -> dict[str, Any]:
    """The message of a response's output."""
    content = [{"type": "output_text", "text": text, "annotations": []}] if status == "completed" else []
    return {"id": f"msg_{identity}", "type": "message", "role": "assistant", "status": status, "content": content}


class ResponseStream:
    """The events of one response, in their order."""

    def __init__(self, identity: str, model: str, body: Mapping[str, Any]):
        self._identity, self._model, self._body = identity, model, body
        self._number = 0
        self._pieces: list[Any] = []

    def begin(self) -> Iterator[str]:
        """Before anything has come."""
        started = response_body(self._identity, self._model, self._body, None, [], "in_progress")
        yield self._event("response.created", response=started)
        yield self._event("response.in_progress", response=started)
        item = message_item(self._identity, "", "in_progress")
        yield self._event("response.output_item.added", output_index=0, item=item)
        part = {"type": "output_text", "text": "", "annotations": []}
        yield self._event("response.content_part.added", **self._place(), part=part)

    def add(self, pieces: Sequence[Any]) -> Iterator[str]:
        """What has come."""
        self._pieces += pieces
        for piece in pieces:
            if isinstance(piece, ContentPiece):
                yield self._event("response.output_text.delta", **self._place(), delta=piece.text, logprobs=[])
            elif isinstance(piece, ReasoningPiece):
                yield self._event("response.reasoning_text.delta", **self._place(), delta=piece.text)

    def end(self, job: Job) -> Iterator[str]:
        """After the last of it."""
        whole = response_body(self._identity, self._model, self._body, job, self._pieces)
        text = "".join(piece.text for piece in self._pieces if isinstance(piece, ContentPiece))
        yield self._event("response.output_text.done", **self._place(), text=text, logprobs=[])
        part = {"type": "output_text", "text": text, "annotations": []}
        yield self._event("response.content_part.done", **self._place(), part=part)
        item = message_item(self._identity, text, "completed")
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{whole['status']}", response=whole)

    def failed(self, error: Exception) -> Iterator[str]:
        """Instead of the end."""
        whole = response_body(self._identity, self._model, self._body, None, [], "failed")
        whole["error"] = {"code": "server_error", "message": str(error)}
        yield self._event("response.failed", response=whole)

    def _place(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self._identity}", "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **data: Any) -> str:
        found = {"type": kind, "sequence_number": self._number, **data}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(found)}\n\n"
