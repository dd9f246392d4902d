"""Messages of a conversation, in the forms that data has them, as a chat template takes them.

    {"messages": [{"role": "user", "content": "..."}, ...]}            OpenAI's form; a content may be a list of texts
    {"conversations": [{"from": "human", "value": "..."}, ...]}        ShareGPT's
    {"prompt": [{...}, ...], "completion": [{...}, ...]}               TRL's: only the completion is learned

All may come with "tools". Roles may have other common names. What is null is not there. One parser for training,
regenerating, validating and generating, so that all of them take the same line for the same conversation.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from convert.values import is_number, json_kind, shown
from domino_jax.errors import first_line
from domino_jax.runtime.parsing import parse_json

Message = dict[str, Any]  # {"role": "user", "content": "..."}, perhaps with reasoning_content, tool_calls, weight, ...

ROLES = ("system", "user", "assistant", "tool")
SYNONYMS = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
CALL = "function_call"  # OpenAI's older key for a call, and ShareGPT's role of one
TEXTS = ("text", "input_text", "output_text")  # types of a part that is text
CALLS = (CALL, "tool_call")  # roles of a call


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
    given = _prompt_and_completion(row) if given is None else given
    if given is None:
        return None
    tools = row.get("tools")
    tools = _parsed(tools, "tools") if isinstance(tools, str) and tools.strip() else tools or None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"tools must be a list, found {json_kind(tools)}")
    return parse_messages(given), tools or None


def _prompt_and_completion(row: Mapping[str, Any]) -> list[Any] | None:
    """The messages of TRL's two lists, of which those of the prompt are not learned; None where they are no lists."""
    prompt, completion = row.get("prompt"), row.get("completion")
    given = [part for part in (prompt, completion) if part is not None]
    lists = [part for part in given if isinstance(part, list) and all(isinstance(m, Mapping) for m in part)]
    if not lists:
        return None
    if lists != given or prompt is None:
        found = f"found {json_kind(prompt)} and {json_kind(completion)}"
        raise ValueError(f"prompt and completion must both be text, or both be lists of messages; {found}")
    return [{**message, "weight": 0} for message in prompt] + (completion or [])


def parse_messages(given: Any) -> list[Message]:
    """Messages with a role and a text each, and whatever else they say that is not null.

    Raises:
        ValueError: they are no list, a message has no role or no text, a text is not valid Unicode, or a weight is
            something else than 0 and 1.
        LeftOut: a tool answers where no message called one.
    """
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise ValueError(f"a conversation is a list of messages, each with role and content; found {json_kind(given)}")
    other = next((m for m in given if not isinstance(m, Mapping)), None)
    if other is not None or None in given:
        raise ValueError(f"each message is an object with role and content; found {json_kind(other)}")
    messages = [_message(message) for message in given]
    called = False
    for message in messages:
        called |= "tool_calls" in message
        if message["role"] == "tool" and not called:
            raise LeftOut("have messages of a 'tool' that no message called")
    return messages


def asks(message: Message) -> bool:
    """Whether an assistant may answer it: a user's or a tool's message, or one of a role that only a template knows."""
    return message["role"] not in ("system", "assistant")


def unknown_roles(messages: Sequence[Message]) -> str:
    """The roles of these messages that are not known, and those that are, in words that end a sentence; or nothing."""
    unknown = sorted({message["role"] for message in messages} - set(ROLES))
    if not unknown:
        return ""
    return f" (its roles are {', '.join(map(shown, unknown[:5]))}; known are {', '.join(ROLES)})"


def left_out_words(reasons: Counter[str]) -> str:
    """What was left out and why, in words that follow a sentence's beginning; nothing if nothing was."""
    return "".join(f"; {count:,} left out that {reason}" for reason, count in reasons.most_common(5))


def _message(given: Mapping[str, Any]) -> Message:
    role = given.get("role") if given.get("role") is not None else given.get("from")
    content = given.get("content") if given.get("content") is not None else given.get("value")
    if not isinstance(role, str):
        found = "" if role is None else f", found {json_kind(role)} for a role"
        raise ValueError(f'a message has no role: each message is an object with "role" and "content"{found}')
    name = role.strip().lower()
    role = SYNONYMS.get(name, name if name in (*ROLES, *CALLS) else role)
    known = {"role", "from", "content", "value", CALL}
    more = {key: value for key, value in given.items() if key not in known and value is not None}
    if not more.get("tool_calls"):
        more.pop("tool_calls", None)
    call = given.get(CALL)
    if role in CALLS:
        call = _parsed(content, f"the {role} of a message") if isinstance(content, str) else content
        role, content = "assistant", None
    if call is not None:
        more.setdefault("tool_calls", [{"type": "function", "function": call}])
    if content is None and "tool_calls" in more:
        content = ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"the content of a message is text or a list of texts, found {json_kind(content)}")
    weight = more.get("weight", 1)
    if not is_number(weight) or weight not in (0, 1):
        raise ValueError(f"the weight of a message is 0 or 1, found {shown(weight)}")
    return {"role": role, "content": valid_unicode(content), **more}


def _parsed(text: str, what: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{what} can't be read as JSON: {first_line(error)}") from None


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and (part.get("type") or "text") in TEXTS and isinstance(part.get("text"), str):
        return part["text"]
    found = part.get("type") if isinstance(part, Mapping) else None
    raise ValueError(f"the parts of a content are texts, found {shown(found) if found else json_kind(part)}")


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
