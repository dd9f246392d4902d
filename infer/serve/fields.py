"""What a request's body may have: kinds, ranges and meanings, for checking and for the OpenAPI description.

A field that is not here is refused by name, and so is a value that could not be honoured.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from convert.values import is_number, is_whole, shown
from domino_jax.errors import DominoError
from domino_jax.sampling import LEAST_PENALTY

LARGE = 2**31


class BadRequest(DominoError):
    """A request that can't be honoured; `field` is what is wrong with it."""

    def __init__(self, sentence: str, field: str | None = None):
        super().__init__(sentence)
        self.field = field


@dataclass(frozen=True)
class Field:
    """One field of a body."""

    schema: Mapping[str, Any]  # JSON Schema, for the description
    expected: str  # in words, for errors
    fits: Callable[[Any], bool]


def real(least: float, most: float, open_below: bool = False) -> Field:
    """A number of a range."""
    bound = {"exclusiveMinimum" if open_below else "minimum": least, "maximum": most}
    said = f"a number {'above' if open_below else 'from'} {least:g} to {most:g}"
    return Field(
        {"type": "number", **bound},
        said,
        lambda x: is_number(x) and (least < x if open_below else least <= x) and x <= most,
    )


def whole(least: int, most: int = LARGE - 1) -> Field:
    """A whole number of a range."""
    said = f"a whole number from {least} to {most}" if most < LARGE - 1 else f"a whole number of at least {least}"
    schema = {"type": "integer", "minimum": least, "maximum": most}
    return Field(schema, said, lambda x: is_whole(x) and least <= x <= most)


def just(*values: Any) -> Field:
    """One of a few values; true is not 1 here."""
    said = " or ".join(shown(v) for v in values)
    return Field({"enum": list(values)}, said, lambda x: any(type(x) is type(v) and x == v for v in values))


def is_texts(value: Any) -> bool:
    """Whether a value is a text, or a list of one to sixteen, none of them empty."""
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and 1 <= len(texts) <= 16 and all(isinstance(t, str) and t for t in texts)


def is_biases(value: Any) -> bool:
    """Whether a value is {"token": bias}."""
    return isinstance(value, dict) and all(
        key.isascii() and key.isdecimal() and len(key) < 10 and is_number(bias) and -100 <= bias <= 100
        for key, bias in value.items()
    )


BOOLEAN = Field({"type": "boolean"}, "true or false", lambda x: isinstance(x, bool))
TEXT = Field({"type": "string", "minLength": 1}, "a text", lambda x: isinstance(x, str) and bool(x))
ANYTHING = Field({}, "anything", lambda _: True)
OBJECT = Field({"type": "object"}, "an object", lambda x: isinstance(x, dict))
IDS = Field(
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": LARGE - 1}, "maxItems": 64},
    "a list of at most 64 token ids",
    lambda x: isinstance(x, list) and len(x) <= 64 and all(is_whole(i) and 0 <= i < LARGE for i in x),
)
STREAM_OPTIONS = Field(
    {"type": "object", "properties": {"include_usage": {"type": "boolean"}}, "additionalProperties": False},
    '{"include_usage": true or false}',
    lambda x: isinstance(x, dict) and set(x) <= {"include_usage"} and all(isinstance(v, bool) for v in x.values()),
)
TEMPLATE_KWARGS = Field(
    {"type": "object", "properties": {"enable_thinking": {"type": "boolean"}}, "additionalProperties": False},
    '{"enable_thinking": true or false}',
    lambda x: isinstance(x, dict) and set(x) <= {"enable_thinking"} and all(isinstance(v, bool) for v in x.values()),
)


def is_format(value: Any) -> bool:
    """Whether a value is one of OpenAI's response formats."""
    if not isinstance(value, dict) or value.get("type") not in ("text", "json_object", "json_schema"):
        return False
    schema = value.get("json_schema")
    return value["type"] != "json_schema" or (isinstance(schema, dict) and isinstance(schema.get("schema"), dict))


def is_structure(value: Any) -> bool:
    """Whether a value is one of vLLM's structured outputs."""
    kinds = {"json": (dict, str), "regex": (str,), "choice": (list,)}
    if not isinstance(value, dict) or len(value) != 1 or not set(value) <= set(kinds):
        return False
    ((kind, what),) = value.items()
    texts = kind != "choice" or (0 < len(what) <= 64 and all(isinstance(t, str) and t for t in what))
    return isinstance(what, kinds[kind]) and texts


def is_tools(value: Any) -> bool:
    """Whether a value is a list of functions, each with a name, and with a schema of its parameters or none."""

    def is_tool(tool: Any) -> bool:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("parameters", {}), dict | None):
            return False
        return isinstance(function.get("name"), str) and bool(function["name"])

    return isinstance(value, list) and all(is_tool(tool) for tool in value)


def is_tool_choice(value: Any) -> bool:
    """Whether a value is a word for how tools are chosen, or names a function."""
    if not isinstance(value, dict):
        return isinstance(value, str) and value in ("auto", "none", "required")
    function = value.get("function")
    if set(value) != {"type", "function"} or value["type"] != "function" or not isinstance(function, dict):
        return False
    return set(function) == {"name"} and isinstance(function["name"], str)


RESPONSE_FORMAT = Field(
    {
        "type": "object",
        "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": {"type": "object"}},
        "required": ["type"],
    },
    '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": {...}}}',
    is_format,
)
STRUCTURED_OUTPUTS = Field(
    {
        "type": "object",
        "properties": {
            "json": {"type": "object"},
            "regex": {"type": "string"},
            "choice": {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": 64},
        },
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
    },
    'one of {"json": {...}}, {"regex": "..."} and {"choice": ["...", "..."]}',
    is_structure,
)
NAME = {"type": "string", "minLength": 1, "maxLength": 64}
TOOLS = Field(
    {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {"name": NAME, "parameters": {"type": "object"}},
                    "required": ["name"],
                },
            },
            "required": ["type", "function"],
        },
    },
    'a list of {"type": "function", "function": {"name": ..., "parameters": {...}}}',
    is_tools,
)
TOOL_CHOICE = Field(
    {
        "anyOf": [
            {"enum": ["auto", "none", "required"]},
            {
                "type": "object",
                "properties": {
                    "type": {"const": "function"},
                    "function": {
                        "type": "object",
                        "properties": {"name": NAME},
                        "required": ["name"],
                        "additionalProperties": False,
                    },
                },
                "required": ["type", "function"],
                "additionalProperties": False,
            },
        ]
    },
    '\'auto\', \'none\', \'required\' or {"type": "function", "function": {"name": ...}}',
    is_tool_choice,
)
PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": PART}]},
    },
    "required": ["role", "content"],
}

SAMPLING = {
    "temperature": real(0, 100),
    "top_p": real(0, 1, open_below=True),
    "top_k": whole(-1),
    "min_p": real(0, 1),
    "seed": whole(-(2**63), 2**63 - 1),
    "presence_penalty": real(-2, 2),
    "frequency_penalty": real(-2, 2),
    "repetition_penalty": real(LEAST_PENALTY, 10),
    "min_tokens": whole(0),
    "stop_token_ids": IDS,
    "logit_bias": Field(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        'an object such as {"42": -100}, of token ids and numbers from -100 to 100',
        is_biases,
    ),
}
COMMON = {
    "model": TEXT,
    "stream": BOOLEAN,
    "stream_options": STREAM_OPTIONS,
    "n": whole(1, 16),
    "stop": Field(
        {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string"}}]},
        "a text or a list of at most 16 texts, none of them empty",
        lambda x: is_texts(x) or x == [],
    ),
    "response_format": RESPONSE_FORMAT,
    "structured_outputs": STRUCTURED_OUTPUTS,
    "return_drafts": BOOLEAN,
    "speculative": BOOLEAN,
    # Of no consequence here.
    "user": ANYTHING,
    "metadata": ANYTHING,
    "store": just(False),
    "service_tier": just("auto", "default"),
    **SAMPLING,
}
COMPLETION = {
    "prompt": Field(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": 64},
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            ]
        },
        "a text, a list of texts, token ids, or a list of lists of them",
        lambda x: isinstance(x, str | list) and bool(x),
    ),
    "max_tokens": whole(0),
    "echo": BOOLEAN,
    "logprobs": whole(0, 20),
    "best_of": just(1),
    "suffix": just(""),
    **COMMON,
}
CHAT = {
    "messages": Field(
        {"type": "array", "minItems": 1, "items": MESSAGE},
        "a list of at least one message",
        lambda x: isinstance(x, list) and bool(x) and all(isinstance(m, dict) for m in x),
    ),
    "max_tokens": whole(1),
    "max_completion_tokens": whole(1),
    "logprobs": BOOLEAN,
    "top_logprobs": whole(0, 20),
    "tools": TOOLS,
    "tool_choice": TOOL_CHOICE,
    "parallel_tool_calls": BOOLEAN,
    "chat_template_kwargs": TEMPLATE_KWARGS,
    **COMMON,
}
RESPONSE = {
    "input": Field(
        {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "minItems": 1, "items": MESSAGE}]},
        "a text or a list of messages",
        lambda x: isinstance(x, str | list) and bool(x),
    ),
    "instructions": TEXT,
    "max_output_tokens": whole(1),
    "chat_template_kwargs": TEMPLATE_KWARGS,
    **{name: COMMON[name] for name in ("model", "stream", "user", "metadata", "store", "service_tier")},
    **SAMPLING,
}
TOKENIZE = {
    "model": TEXT,
    "prompt": Field({"type": "string"}, "a text", lambda x: isinstance(x, str)),
    "messages": CHAT["messages"],
    "chat_template_kwargs": TEMPLATE_KWARGS,
}
DETOKENIZE = {
    "model": TEXT,
    "tokens": Field(
        {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "a list of token ids",
        lambda x: isinstance(x, list) and all(is_whole(i) and 0 <= i < LARGE for i in x),
    ),
}


def check_body(body: Any, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The fields of a body that are not null.

    Raises:
        BadRequest: it is no object, or has a field or a value that can't be honoured.
    """
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object.")
    found = {name: value for name, value in body.items() if value is not None}
    for name, value in found.items():
        if name not in fields:
            raise BadRequest(f"{shown(name)} is no field that this server can honour.", name)
        if not fields[name].fits(value):
            raise BadRequest(f"{name} must be {fields[name].expected}, found {shown(value)}.", name)
    return found
