"""Conversations as the sequences the drafter meets in use, through the target's own chat template.

What runs in use is: the conversation so far, rendered with the generation prompt and thinking off, as one text; then
the answer's tokens; then the token that ends the turn. A turn to learn is exactly that, and the loss mask is on for the
answer and the token that ends it. The template decides what an answer looks like: it is what the template's rendering
of the conversation *with* the answer has after the rendering that asks for it.

Turns share a sequence as long as the next prompt begins with all that came before. Qwen3's template does not do that:
the empty thought before an answer is left out once the turn is over. There every turn is a sequence of its own, and the
earlier answers in its prompt are not learned again.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from convert.messages import LeftOut, Message, asks, unknown_roles
from convert.tokenizer import THOUGHTS_END, THOUGHTS_START, encode, render

Tokens = tuple[list[int], list[int]]  # ids, and a mask that is 1 on those to learn

ANSWER = "the answer goes here"  # any text that no template changes


class Template:
    """A target's tokenizer and chat template, thinking off."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def prompt(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """The ids that ask for the next answer, as in use; see `convert.tokenizer.render` for what it raises."""
        return self._encode(render(self.tokenizer, messages, tools=tools))

    def _encode(self, rendered: str, split_special: bool = False) -> list[int]:
        return encode(self.tokenizer, rendered, special=False, split_special=split_special)

    def sequences(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[Tokens]:
        """Every answer of a conversation once, each after exactly the ids that ask for it in use.

        An answer is left out where nobody asked for it, where its `weight` is 0 (OpenAI's way to say so), where it
        broke off within its thoughts, or where the template does not render it as an answer to that prompt.

        Returns:
            Ids and mask of each sequence, at least one.

        Raises:
            DominoError, RefusedByTemplate: as `prompt`.
            LeftOut: there is no answer to learn.
        """
        reason = f"have no answer{unknown_roles(messages)}"
        made: list[Tokens] = []
        ids: list[int] = []
        mask: list[int] = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if not any(map(asks, messages[:place])):
                reason = "have an answer that nobody asked for"
                continue
            if message.get("weight", 1) == 0:
                reason = "have no answer that is to be learned (weight is 0)"
                continue
            if _broke_off(message):
                reason = "have an answer that breaks off within a thought"
                continue
            asked = render(self.tokenizer, messages[:place], tools=tools)
            answer = self._answer(asked, messages[: place + 1], tools)
            if answer is None:
                reason = "have an answer that the chat template does not render after the prompt that asks for it"
                continue
            prompt = self._encode(asked)
            if prompt[: len(ids)] != ids:
                made.append((ids, mask))
                ids, mask = [], []
            mask = [*mask, *[0] * (len(prompt) - len(ids)), *[1] * len(answer)]
            ids = prompt + answer
        if not ids:
            raise LeftOut(reason)
        return [*made, (ids, mask)]

    def _answer(self, asked: str, messages: Sequence[Message], tools: list[Any] | None) -> list[int] | None:
        """The last message's ids up to the end of its turn; None if the rendering does not go on from `asked`."""
        *before, said = messages
        after, end = self._ending
        # Where thinking is off, thoughts in the data are what the target would not have written.
        for content in (said, _without_thoughts(said)):
            whole = render(self.tokenizer, [*before, content], ask=False, tools=tools)
            if whole.startswith(asked) and whole[len(asked) :].endswith(after):
                text = whole[len(asked) : len(whole) - len(after)]
                spelled = any(token in content["content"] for token in self._specials.values())
                return self._encode(text, split_special=spelled) + end
        return None

    @cached_property
    def _specials(self) -> dict[int, str]:
        """The tokenizer's special tokens by their ids."""
        return {i: token.content for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}

    @cached_property
    def _ending(self) -> tuple[str, list[int]]:
        """What the template writes after the last answer, and its ids up to its first special token (none without)."""
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ANSWER}]
        after = render(self.tokenizer, messages, ask=False).rpartition(ANSWER)[2]
        ids = self._encode(after)
        ends = [place for place, token in enumerate(ids) if token in self._specials]
        return after, ids[: ends[0] + 1] if ends else []


def _broke_off(message: Message) -> bool:
    """Whether a message holds nothing but the beginning of a thought."""
    return message["content"].lstrip().startswith(THOUGHTS_START) and THOUGHTS_END not in message["content"]


def _without_thoughts(message: Message) -> Message:
    """A message with its final answer only; Qwen3's template finds it in the same way."""
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    return kept | {"content": message["content"].rpartition(THOUGHTS_END)[2].lstrip("\n")}
