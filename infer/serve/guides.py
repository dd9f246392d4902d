"""Answers that must parse: JSON schemas, regular expressions and calls of functions, by llguidance (extra `serve`).

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

from convert.tokenizer import THOUGHTS_END, THOUGHTS_START
from domino_jax.errors import first_line
from domino_jax.processors import WORD
from infer.serve.fields import BadRequest
from infer.serve.manners import CALL_END, CALL_START, AnswerParser, call_opening

ANY_JSON = {"type": "object"}
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
# The arguments of a call as Qwen3's template writes them; a model can't lose itself in white space.
AS_TEMPLATES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """A `slots.Guide` of one answer."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int):
        self._matcher = matcher
        self._left = False
        self._mask = masks.allocate_token_bitmask(1, vocab_size)

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

    @property
    def error(self) -> str:
        """Why the grammar can be followed no further, as where it has grown too complex; nothing where it can."""
        return _first(self._matcher.get_error())


class AfterThoughts:
    """A `slots.Guide` of what follows the thoughts. In them anything may come but the end of the answer.

    Args:
        guide: of what follows.
        parser: of the same answer, which has taken a token before the guide is told of it.
        may_think: the answer may begin with thoughts, where they are not open already.
        ends: ids that end an answer.
    """

    def __init__(self, guide: Grammar, parser: AnswerParser, may_think: bool, ends: Sequence[int]):
        self._guide, self._parser, self._ends = guide, parser, ends
        self._thinking, tokens = parser.thinking, parser.tokens_of_markers
        self._opener = tokens.get(THOUGHTS_START) if may_think and not self._thinking else None
        self._closer = tokens.get(THOUGHTS_END)

    def allowed(self) -> np.ndarray:
        """The tokens that may come next: [W] int32, a bit for each."""
        mask = self._guide.allowed()
        if self._thinking:
            mask[:] = -1
            for token in self._ends:  # below the vocabulary
                mask[token // WORD] &= ~_bit(token)
        elif self._opener is not None:
            mask[self._opener // WORD] |= _bit(self._opener)
        return mask

    def accept(self, tokens: Sequence[int]) -> None:
        """Note the next token, which comes alone."""
        if self._thinking:  # a parser that looks for stop strings may be a token behind
            self._thinking = self._parser.thinking if self._closer is None else tokens[-1] != self._closer
        elif self._opener is not None and tokens[-1] == self._opener:
            self._thinking = True
        else:
            self._guide.accept(tokens)
        self._opener = None

    @property
    def is_done(self) -> bool:
        """Whether nothing more may come."""
        return self._guide.is_done

    @property
    def error(self) -> str:
        """Why the grammar can be followed no further."""
        return self._guide.error


def _first(error: str) -> str:
    return error.strip().splitlines()[0].rstrip(".:") if error.strip() else ""


def _bit(token: int) -> np.int32:
    return np.uint32(1 << token % WORD).astype(np.int32)


@lru_cache(maxsize=4)
def wrapped_tokenizer(tokenizer: Any, vocab_size: int, ends: tuple[int, ...]) -> llguidance.LLTokenizer:
    """A tokenizer as llguidance takes it; it takes seconds for one of Qwen3's size."""
    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(ends) or None)


def grammar_of(field: str, body: Mapping[str, Any]) -> str:
    """The grammar that `response_format` or vLLM's `structured_outputs` asks for.

    Raises:
        BadRequest: it can't be had.
    """
    if field == "response_format":
        form = body[field]
        kind, value = "json", ANY_JSON if form["type"] == "json_object" else form["json_schema"]["schema"]
    else:
        ((kind, value),) = body[field].items()
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


def calls_grammar(
    functions: Sequence[Mapping[str, Any]], several: bool, tokens: Mapping[str, int], text: bool = False
) -> str:
    """The grammar of calls as Qwen3 writes them.

    Args:
        functions: those that may be called, each with `name` and perhaps `parameters`.
        several: more than one call may come.
        text: text may come before them, or in their place; then arguments follow their schema where `strict` is true.
        tokens: of the markers, where the tokenizer has one for each.

    Raises:
        BadRequest: the parameters of one are no object's.
    """
    start, end = (f"<[{tokens[m]}]>" if m in tokens else json.dumps(m) for m in (CALL_START, CALL_END))
    names = " | ".join(f"call_{i}" for i in range(len(functions)))
    more = ' ("\\n" call)*' if several else ""
    rules = [f'start: "\\n\\n"? call{more}', f"call: {start} ({names}) {end}"]
    if text:
        rules[0] = f"start: TEXT? | {f'TEXT? {start}' if CALL_START in tokens else 'opened'} ({names}) {end}{more}"
        rules.append(f"TEXT: /(?s:.+)/ & ~/(?s:.*){CALL_START}(?s:.*)/")
        rules.append(f"opened[lazy]: /(?s:.*){CALL_START}/")
    for i, function in enumerate(functions):
        schema = NO_PARAMETERS if function.get("parameters") is None else function["parameters"]
        schema = ANY_JSON if text and not function.get("strict") else schema
        kinds = schema.get("type", "object")
        if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
            raise BadRequest(f"the parameters of {function['name']} must be the schema of an object.", "tools")
        opening = json.dumps("\n" + call_opening(function["name"]))
        rules.append(f'call_{i}: {opening} arguments_{i} "}}\\n"')
        # A JSON document of its own, in which references to $defs hold.
        rules.append(f"arguments_{i}: %json {json.dumps({**schema, 'type': 'object', 'x-guidance': AS_TEMPLATES})}")
    return llguidance.LLMatcher.grammar_from_lark("\n".join(rules))


def make_guide(tokenizer: Any, vocab_size: int, ends: Sequence[int], grammar: str, field: str) -> Grammar:
    """A new answer's guide.

    Args:
        vocab_size: of the target.
        ends: ids that end an answer, allowed where the grammar is at its end.
        field: of the body, which the grammar is made of.

    Raises:
        BadRequest: the grammar is wrong, or this tokenizer can't be used.
    """
    return Grammar(_matcher(tokenizer, vocab_size, tuple(ends), grammar, field).deep_copy(), vocab_size)


@lru_cache(maxsize=32)
def _matcher(tokenizer: Any, vocab_size: int, ends: tuple[int, ...], grammar: str, field: str) -> llguidance.LLMatcher:
    try:
        wrapped = wrapped_tokenizer(tokenizer, vocab_size, ends)
    except Exception as error:  # llguidance's own kinds
        raise BadRequest(f"this tokenizer can't be used with a grammar: {first_line(error)}.", field) from None
    matcher = llguidance.LLMatcher(wrapped, grammar)
    if matcher.is_error():
        raise BadRequest(f"{field} can't be used: the grammar is wrong: {_first(matcher.get_error())}.", field)
    return matcher
