"""The server's own OpenAPI description, made of the fields that it checks bodies by."""

from collections.abc import Mapping
from typing import Any

from infer.serve import fields

REQUIRED = {"/v1/completions": "prompt", "/v1/chat/completions": "messages", "/v1/responses": "input"}
BODIES = {
    "/v1/completions": fields.COMPLETION,
    "/v1/chat/completions": fields.CHAT,
    "/v1/responses": fields.RESPONSE,
    "/tokenize": fields.TOKENIZE,
    "/detokenize": fields.DETOKENIZE,
}
GETS = ("/health", "/metrics", "/v1/models")
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
        }
    },
}


def describe_api(model: str) -> dict[str, Any]:
    """OpenAPI 3.1."""
    refused = {"description": "refused, with the reason", "content": {"application/json": {"schema": ERROR}}}
    refusals = {str(status): refused for status in (400, 401, 405, 413, 415, 429, 500, 503)}
    found: dict[str, Any] = {}
    for path, known in BODIES.items():
        body = {
            "required": True,
            "content": {"application/json": {"schema": _schema(known, REQUIRED.get(path), model)}},
        }
        answer = {"200": {"description": "the answer"}}
        found[path] = {"post": {"requestBody": body, "responses": answer | refusals}}
    for path in GETS:
        found[path] = {"get": {"responses": {"200": {"description": "the answer"}, "401": refused, "503": refused}}}
    return {"openapi": "3.1.0", "info": {"title": "domino-jax", "version": "1"}, "paths": found}


def _schema(known: Mapping[str, fields.Field], required: str | None, model: str) -> dict[str, Any]:
    properties = {name: dict(field.schema) for name, field in known.items()}
    properties["model"] = {"enum": [model]}
    schema: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": properties}
    return schema | ({"required": [required]} if required else {})
