"""Messages of a conversation, in the forms that data has them, as a chat template takes them.

    {"messages": [{"role": "user", "content": "..."}, ...]}            OpenAI's form; a content may be a list of texts
    {"conversations": [{"from": "human", "value": "..."}, ...]}        ShareGPT's

Both may come with "tools". Roles may have other common names. One parser for training, regenerating, validating and
generating, so that all of them take the same line for the same conversation.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from domino_jax.errors import first_line

Message = dict[str, Any]  # {"role": "user", "content": "..."}, perhaps with reasoning_content, tool_calls, weight, ...

SYNONYMS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
CALL = "function_call"  # OpenAI's older key for a call, and ShareGPT's role of one


class LeftOut(ValueError):
    """A conversation that is well formed and can't be used; str() goes on "3 left out that ..."."""

    def __init__(self, reason: str, sentence: str | None = None):
        super().__init__(reason)
        self.sentence = sentence or f"conversations that {reason} can't be used"  # where it stands alone


def conversation_of(row: Mapping[str, Any]) -> tuple[list[Message], list[Any] | None] | None:
    """The messages and tools of a row of data; None for a row of another form.

    Raises:
        ValueError: as `parse_messages`, or its tools are no list.
        LeftOut: as `parse_messages`.
    """
    given = row.get("messages")
    given = row.get("conversations") if given is None else given
    if given is None:
        return None
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"tools are a list, found {type(tools).__name__}")
    return parse_messages(given), tools or None


def parse_messages(given: Any) -> list[Message]:
    """Messages with a role and a text each, and whatever else they say that is not null.

    Raises:
        ValueError: they are no list, a message has no role or no text, or a text is not valid Unicode.
        LeftOut: a tool answers where no message called one.
    """
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(m, Mapping) for m in given):
        raise ValueError("a conversation is a list of messages, each with role and content")
    messages = [_message(message) for message in given]
    called = False
    for message in messages:
        called |= "tool_calls" in message
        if message["role"] == "tool" and not called:
            raise LeftOut("have messages of a 'tool' that no message called")
    return messages


def left_out_words(reasons: Counter[str]) -> str:
    """What was left out and why, in words that follow a sentence's beginning; nothing if nothing was."""
    return "".join(f"; {count:,} left out that {reason}" for reason, count in reasons.most_common(5))


def _message(given: Mapping[str, Any]) -> Message:
    role = given.get("role") if given.get("role") is not None else given.get("from")
    content = given.get("content") if given.get("content") is not None else given.get("value")
    if not isinstance(role, str):
        raise ValueError('a message has no role: each message is an object with "role" and "content"')
    known = {"role", "from", "content", "value", CALL}
    more = {key: value for key, value in given.items() if key not in known and value is not None}
    if not more.get("tool_calls"):
        more.pop("tool_calls", None)
    call = given.get(CALL)
    if role == CALL:
        role, call, content = "assistant", _parsed_call(content), None
    if call is not None:
        more.setdefault("tool_calls", [{"type": "function", "function": call}])
    if content is None and "tool_calls" in more:
        content = ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"the content of a message is text or a list of texts, found {type(content).__name__}")
    return {"role": SYNONYMS.get(role, role), "content": valid_unicode(content), **more}


def _parsed_call(content: Any) -> Any:
    try:
        return json.loads(content) if isinstance(content, str) else content
    except ValueError as error:
        raise ValueError(f"the {CALL} of a message is not JSON: {first_line(error)}") from None


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else None
    raise ValueError(f"the parts of a content are texts, found {kind or type(part).__name__}")


def valid_unicode(text: str) -> str:
    """The same text.

    Raises:
        ValueError: it has a lone half of a UTF-16 pair (from JSON, or from a badly encoded command line).
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"its text is not valid Unicode: {error}") from None
    return text
