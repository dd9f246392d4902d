"""Conversations and a model's own chat template, for those who generate and those who train."""

from collections.abc import Mapping, Sequence
from typing import Any

from domino_jax.errors import first_line

THOUGHTS_START, THOUGHTS_END = "<think>", "</think>"  # as Qwen3 writes them


def has_template(tokenizer: Any) -> bool:
    """Whether conversations can be rendered; a base model has no template and takes raw text."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    ask: bool = True,
    thinking: bool = False,
    tools: list[Any] | None = None,
) -> str:
    """A conversation in the model's template, which writes the special tokens itself.

    Args:
        ask: with the generation prompt, up to where the assistant answers.
        thinking: off by default (templates that know no `enable_thinking` ignore it): the drafters are trained so.

    Raises:
        ValueError: the template refuses the messages; it says why.
    """
    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=ask, enable_thinking=thinking
        )
    except Exception as error:  # jinja's, and whatever the template itself raises
        raise ValueError(first_line(error)) from None


def final_answer(text: str) -> str:
    """An answer without the thoughts before it, which later turns are not told; empty where they were cut off.

    Qwen3's own template drops them too, but only those that came to an end.
    """
    _, end, answer = text.rpartition(THOUGHTS_END)
    if end:
        return answer.lstrip("\n")
    return "" if text.lstrip().startswith(THOUGHTS_START) else text


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens, without special ones."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
