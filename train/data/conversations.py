"""Conversations as the sequences the drafter meets in use, through the target's own chat template.

What runs in use is: the conversation so far, rendered with the generation prompt and thinking off, as one text; then
the answer's tokens; then the token that ends the turn. A turn to learn is exactly that, and the loss mask is on for the
answer and the token that ends it. The template decides what an answer looks like: it is what the template's rendering
of the conversation *with* the answer has after the rendering that asks for it.

Turns share a sequence as long as the next prompt begins with all that came before. Qwen3's template does not do that:
the empty thought before an answer is left out once the turn is over. There every turn is a sequence of its own, and the
earlier answers in its prompt are not learned again.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from convert.template import THOUGHTS_END, THOUGHTS_START, has_template, render

Message = dict[str, Any]  # {"role": "user", "content": "..."}, perhaps with reasoning_content, tool_calls, ...
Tokens = tuple[list[int], list[int]]  # ids, and a mask that is 1 on those to learn

ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
KEPT = ("reasoning_content", "tool_calls", "tool_call_id", "name", "weight")  # what else a message may say
ANSWER = "the answer goes here"  # any text that no template changes


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """The conversation of a line: OpenAI's `messages` or ShareGPT's `conversations`, as roles and texts.

    Raises:
        ValueError: a message has no role or no text.
    """
    given = row["messages"] if "messages" in row else row["conversations"]
    if not isinstance(given, Sequence) or not all(isinstance(message, Mapping) for message in given):
        raise ValueError("a conversation is a list of messages, each with role and content")
    return [_message(message) for message in given]


def _message(given: Mapping[str, Any]) -> Message:
    role = given.get("role", given.get("from"))
    content = given.get("content", given.get("value"))
    if not isinstance(role, str):
        raise ValueError("a message has no role")
    more = {key: given[key] for key in KEPT if given.get(key) is not None}
    if content is None and "tool_calls" in more:
        content = ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"the content of a message is text or a list of texts, found {type(content).__name__}")
    return {"role": ROLES.get(role, role), "content": content, **more}


def _part(part: Any) -> str:
    """The text of one part of a content."""
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else None
    raise ValueError(f"the parts of a content are texts, found {kind or type(part).__name__}")


def tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """The tools a line declares, which some datasets hold as JSON; None where there are none."""
    tools = row.get("tools")
    return (json.loads(tools) if isinstance(tools, str) and tools else tools) or None


class Template:
    """A target's tokenizer and chat template, thinking off."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def prompt(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """The ids that ask for the next answer, as in use.

        Raises:
            ValueError: there is no template, or it refuses the messages.
        """
        return self.encode(self._render(messages, tools, True))

    def encode(self, text: str, specials: bool = True) -> list[int]:
        """The ids of text; without `specials`, text that spells a special token is ordinary text.

        Raises:
            ValueError: there is no tokenizer, or it is not text (a lone half of a UTF-16 pair).
        """
        if self.tokenizer is None:
            raise ValueError("it holds text, and the target's folder has no tokenizer")
        text.encode("utf-8")
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=not specials)["input_ids"])

    def sequences(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[Tokens]:
        """Every answer of a conversation once, each after exactly the ids that ask for it in use.

        An answer is left out where nobody said anything before it, where its `weight` is 0 (OpenAI's way to say so),
        where it broke off within its thoughts, or where the template does not render it as an answer to that prompt.

        Returns:
            Ids and mask of each sequence; none if there is no answer to learn.

        Raises:
            ValueError: as `prompt`.
        """
        made: list[Tokens] = []
        ids: list[int] = []
        mask: list[int] = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant" or place == 0 or message.get("weight", 1) == 0 or _broke_off(message):
                continue
            asked = self._render(messages[:place], tools, True)
            answer = self._answer(asked, messages[: place + 1], tools)
            if answer is None:
                continue
            prompt = self.encode(asked)
            if prompt[: len(ids)] != ids:
                made.append((ids, mask))
                ids, mask = [], []
            mask = [*mask, *[0] * (len(prompt) - len(ids)), *[1] * len(answer)]
            ids = prompt + answer
        return [*made, (ids, mask)] if ids else made

    def _answer(self, asked: str, messages: Sequence[Message], tools: list[Any] | None) -> list[int] | None:
        """The last message's ids up to the end of its turn; None if the rendering does not go on from `asked`."""
        *before, said = messages
        after, end = self._ending
        # Where thinking is off, thoughts in the data are what the target would not have written.
        for content in (said, _without_thoughts(said)):
            whole = self._render([*before, content], tools, False)
            if whole.startswith(asked) and whole[len(asked) :].endswith(after):
                text = whole[len(asked) : len(whole) - len(after)]
                spelled = any(token in content["content"] for token in self._specials.values())
                return self.encode(text, specials=not spelled) + end
        return None

    @cached_property
    def _specials(self) -> dict[int, str]:
        """The tokenizer's special tokens by their ids."""
        return {i: token.content for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}

    @cached_property
    def _ending(self) -> tuple[str, list[int]]:
        """What the template writes after the last answer, and its ids up to its first special token (none without)."""
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ANSWER}]
        _, found, after = self._render(messages, None, False).rpartition(ANSWER)
        if not found:
            raise ValueError("the target's chat template leaves the answers out")
        ids = self.encode(after)
        ends = [place for place, token in enumerate(ids) if token in self._specials]
        return after, ids[: ends[0] + 1] if ends else []

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, ask: bool) -> str:
        if not has_template(self.tokenizer):
            raise ValueError("it holds messages, and the target has no chat template")
        plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        try:
            return render(self.tokenizer, plain, ask=ask, tools=tools)
        except ValueError as error:
            raise ValueError(f"the target's chat template refuses it: {error}") from None


def _broke_off(message: Message) -> bool:
    """Whether a message holds nothing but the beginning of a thought."""
    return message["content"].lstrip().startswith(THOUGHTS_START) and THOUGHTS_END not in message["content"]


def _without_thoughts(message: Message) -> Message:
    """A message with its final answer only; Qwen3's template finds it in the same way."""
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    return kept | {"content": message["content"].rpartition(THOUGHTS_END)[2].lstrip("\n")}
