"""Answers that must parse: JSON schemas and regular expressions, by llguidance (extra `serve`).

A grammar says before each token which ones are allowed. Such a request takes plain steps, one a dispatch, and so does
whatever runs beside it.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
from llguidance import numpy as masks

from domino_jax.errors import first_line
from infer.serve.fields import BadRequest

ANY_JSON = {"type": "object"}


class Grammar:
    """A `slots.Guide` of one answer."""

    def __init__(self, tokenizer: Any, grammar: str):
        self._matcher = llguidance.LLMatcher(tokenizer, grammar)
        self._left = False
        self._mask = masks.allocate_token_bitmask(1, tokenizer.vocab_size)

    def allowed(self) -> np.ndarray:
        """The tokens that may come next: [W] int32, a bit for each."""
        masks.fill_next_token_bitmask(self._matcher, self._mask, 0)
        return self._mask[0].copy()

    def accept(self, tokens: Sequence[int]) -> None:
        """Note what has come. What was not allowed ends the answer."""
        self._left |= not self._matcher.consume_tokens(list(tokens))

    @property
    def is_done(self) -> bool:
        """Whether nothing more may come."""
        return self._left or self._matcher.is_stopped()


@lru_cache(maxsize=4)
def _wrapped(tokenizer: Any, vocab_size: int, ends: tuple[int, ...]) -> Any:
    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(ends) or None)


def grammar_of(body: Mapping[str, Any]) -> str | None:
    """The grammar that a body asks for, in OpenAI's form or in vLLM's `structured_outputs`; None for none.

    Raises:
        BadRequest: it asks for one that can't be had, or for two.
    """
    found: list[tuple[str, str, Any]] = []  # field, kind, value
    asked = body.get("response_format", {})
    if asked.get("type") == "json_object":
        found.append(("response_format", "json", ANY_JSON))
    elif asked.get("type") == "json_schema":
        found.append(("response_format", "json", asked.get("json_schema", {}).get("schema", ANY_JSON)))
    found += [("structured_outputs", kind, value) for kind, value in body.get("structured_outputs", {}).items()]
    if not found:
        return None
    if len(found) > 1:
        raise BadRequest("one grammar can be had, and several are asked for.", found[1][0])
    ((field, kind, value),) = found
    try:
        if kind == "json":
            value = json.loads(value) if isinstance(value, str) else value
            return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(value))
        if kind == "regex":
            return llguidance.LLMatcher.grammar_from_regex(str(value))
        choices = " | ".join(json.dumps(str(choice)) for choice in value)
        return llguidance.LLMatcher.grammar_from_lark(f"start: {choices}")
    except ValueError as error:
        raise BadRequest(f"{field} can't be used: {first_line(error)}.", field) from None


def make_guide(tokenizer: Any, vocab_size: int, ends: Sequence[int], grammar: str) -> Grammar:
    """A new answer's guide.

    Args:
        vocab_size: of the target.
        ends: ids that end an answer, allowed where the grammar is at its end.

    Raises:
        BadRequest: the grammar is wrong, or this tokenizer can't be used.
    """
    try:
        wrapped = _wrapped(tokenizer, vocab_size, tuple(ends))
    except Exception as error:  # llguidance's own kinds
        raise BadRequest(f"this tokenizer can't be used with a grammar: {first_line(error)}.") from None
    wrong = llguidance.LLMatcher.validate_grammar(grammar, wrapped)
    if wrong:
        raise BadRequest(f"the grammar is wrong: {wrong.splitlines()[0]}.", "response_format")
    return Grammar(wrapped, grammar)
