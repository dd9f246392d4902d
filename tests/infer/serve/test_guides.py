"""Answers held to a grammar, written by no model but at random among the tokens that are allowed."""

import json
import random
import re
from types import SimpleNamespace
from typing import Any, cast

import jsonschema_rs
import llguidance
import numpy as np
import pytest
from factory import END_ID, make_tokenizer
from serving import TEMPLATE

from domino_jax.processors import WORD
from domino_jax.runtime import extras
from domino_jax.runtime.slots import Request
from domino_jax.sampling import SamplingParams
from infer.serve import guides
from infer.serve.fields import BadRequest
from infer.serve.manners import ContentPiece, ReasoningPiece, ToolCallArguments, ToolCallStart
from infer.serve.requests import Service
from infer.serve.worker import Job
from infer.text import encode

MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
KINDS = {
    "as Qwen3 has them": ([], MARKERS),
    "special": (MARKERS, []),
    "spelled": ([], []),
    "some": (MARKERS[1:3], []),
}


def service_with(kind: str, thinking: bool = False) -> Service:
    """A service whose tokenizer has the markers as tokens, or has to spell them."""
    special, plain = KINDS[kind]
    tokenizer = make_tokenizer(TEMPLATE)
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens(plain)
    # More logits than tokens, as Qwen3 has.
    configs = SimpleNamespace(target=SimpleNamespace(vocab_size=len(tokenizer) + 7))
    loaded = SimpleNamespace(tokenizer=tokenizer, configs=configs, stop_ids=(END_ID,))
    return Service(cast(Any, loaded), "tiny", {}, 4096, 60.0, thinking)


SERVICES = {kind: service_with(kind) for kind in KINDS}


def walk(
    service: Service,
    body: dict[str, Any],
    seed: int,
    in_reasoning: bool = False,
    limit: int = 1500,
    likelier: frozenset[int] | set[int] = frozenset(),
) -> Job:
    """An answer to a chat, of allowed tokens at random; those that end things are likelier, and those given."""
    rng, tokenizer = random.Random(seed), service.loaded.tokenizer
    text = service.text(body, True, in_reasoning)
    params = SamplingParams(max_tokens=limit, stop_token_ids=(END_ID,))
    job = Job(Request([5], params), guide=service.guide(body, text), text=text)
    ends = {i for i in range(len(tokenizer)) if tokenizer.decode([i]) in ('"', "}", "]", "</think>")} | {
        END_ID,
        *likelier,
    }
    while job.finish_reason is None:
        assert job.guide is not None
        mask = job.guide.allowed()
        allowed = [i for i in range(len(tokenizer)) if mask[i // WORD] >> (i % WORD) & 1]
        some = [i for i in allowed if i in ends]
        job.take([rng.choice(some if some and rng.random() < 0.3 else allowed)])
    return job


def parts_of(job: Job) -> tuple[str, str, list[tuple[str, str]]]:
    """An answer's thoughts, its content, and its calls by name and arguments."""
    pieces, calls = job.update().pieces, []
    for piece in pieces:
        if isinstance(piece, ToolCallStart):
            calls.append((piece.name, ""))
        elif isinstance(piece, ToolCallArguments):
            calls[piece.index] = (calls[piece.index][0], calls[piece.index][1] + piece.text)
    thoughts, content = (
        "".join(p.text for p in pieces if isinstance(p, kind)) for kind in (ReasoningPiece, ContentPiece)
    )
    return thoughts, content, calls


CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Köln", "Bonn"]}, "days": {"type": "integer", "minimum": 0, "maximum": 14}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 3}, "next": {"$ref": "#/$defs/Node"}},
            "required": ["name"],
            "additionalProperties": False,
        }
    },
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/Node"}},
    "required": ["root"],
}
SCHEMAS = {
    "look": CITY,
    "look_up": TREE,
    'say "é"\n': {"properties": {"x": {"type": ["number", "null"]}}, "additionalProperties": {"type": "boolean"}},
    "any": {"type": "object"},
    "now": None,
}
TOOLS = [{"type": "function", "function": {"name": n} | ({"parameters": s} if s else {})} for n, s in SCHEMAS.items()]


def check_calls(calls: list[tuple[str, str]], names: set[str]) -> None:
    for name, arguments in calls:
        assert name in names
        given = json.loads(arguments)
        assert isinstance(given, dict)
        assert jsonschema_rs.is_valid(SCHEMAS[name] or {"maxProperties": 0}, given), (name, arguments)


@pytest.mark.parametrize("kind", SERVICES)
@pytest.mark.parametrize("several", [True, False])
def test_calls_that_must_come_are_calls_that_fit(kind, several):
    """Of functions whose names begin alike, have references of their own, take anything or nothing."""
    body = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": several}
    counts, seen = set(), set()
    for seed in range(12):
        job = walk(SERVICES[kind], body, seed)
        thoughts, content, calls = parts_of(job)
        if job.finish_reason == "stop":
            assert calls and not content and not thoughts, (seed, content)
            counts.add(len(calls))
            seen |= {name for name, _ in calls}
        check_calls(calls, set(SCHEMAS))
    assert len(seen) > 2 and (counts == {1} if not several else max(counts) > 1)


@pytest.mark.parametrize("kind", SERVICES)
def test_calls_that_may_come_follow_strict_schemas(kind):
    """Text comes before them or in their place; without `strict` the arguments are any object."""
    service, seen, texts = SERVICES[kind], set(), 0
    strict = {"look", "look_up"}
    tools = [
        {"type": "function", "function": {**t["function"], "strict": t["function"]["name"] in strict}} for t in TOOLS
    ]
    marker = service.loaded.tokenizer.convert_tokens_to_ids("<tool_call>")
    for seed in range(16):
        job = walk(service, {"tools": tools}, seed, limit=400, likelier={marker} if kind != "spelled" else set())
        _, content, calls = parts_of(job)
        if "<tool_call>" in content:  # a number that is JSON and no float's: the call stays text
            assert re.search(r"[eE]\+?\d{3}", content)
            continue
        texts += bool(content.strip())
        for name, arguments in calls[: None if job.finish_reason == "stop" else -1]:
            given = json.loads(arguments)
            assert isinstance(given, dict) and name in SCHEMAS
            assert name not in strict or jsonschema_rs.is_valid(SCHEMAS[name], given), (name, arguments)
            seen.add(name in strict)
    assert texts > 2 and (kind == "spelled" or seen == {True, False})


def test_a_spelled_marker_opens_a_strict_call():
    """It comes at random rarely, so here it is told."""
    service = SERVICES["spelled"]
    body = {"tools": [{"type": "function", "function": {"name": "look", "parameters": CITY, "strict": True}}]}
    for before in ("", "I look. ", "a <tool"):
        text = service.text(body, True)
        guide = service.guide(body, text)
        opened = before + '<tool_call>\n{"name": "look", "arguments": {"city": "'
        tokens = service.loaded.tokenizer.encode(opened, add_special_tokens=False)
        for token in tokens:
            assert guide.allowed()[token // WORD] >> (token % WORD) & 1, (before, token)
            guide.accept([token])
        allowed = {i for i in range(256) if guide.allowed()[i // WORD] >> (i % WORD) & 1}
        assert {service.loaded.tokenizer.decode([i]) for i in allowed} <= {"K", "B", "Kö", "Bo"}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_named_function_is_called_once(name):
    body = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": name}}}
    for seed in range(4):
        job = walk(SERVICES["as Qwen3 has them"], body, seed)
        _, content, calls = parts_of(job)
        if job.finish_reason == "stop":
            assert [called for called, _ in calls] == [name] and not content
        check_calls(calls, {name})


FORMAT = {"response_format": {"type": "json_schema", "json_schema": {"schema": CITY}}}
CALLS = {"tools": TOOLS[:2], "tool_choice": "required"}


@pytest.mark.parametrize("kind", SERVICES)
@pytest.mark.parametrize("body", [FORMAT, CALLS], ids=["a schema", "calls"])
def test_thoughts_that_the_prompt_has_opened_come_before_what_must_parse(kind, body):
    """Anything may come in them but the answer's end."""
    for seed in range(4):
        job = walk(SERVICES[kind], body, seed, in_reasoning=True)
        thoughts, content, calls = parts_of(job)
        if not calls and not content:  # a marker that is spelled comes at random rarely
            assert kind in ("spelled",) and job.finish_reason == "length"
            continue
        assert job.finish_reason == "stop" and thoughts
        check_calls(calls, {"look", "look_up"})
        if body is FORMAT:
            assert jsonschema_rs.is_valid(CITY, json.loads(content))


def test_a_model_that_is_to_think_may_open_the_thoughts_itself():
    """As Qwen3 does. One that is not to think can't, and neither has to."""
    opener = SERVICES["as Qwen3 has them"].loaded.tokenizer.convert_tokens_to_ids("<think>")
    for thinking in (True, False):
        body = {**CALLS, "chat_template_kwargs": {"enable_thinking": thinking}}
        found = {bool(parts_of(walk(service_with("as Qwen3 has them"), body, seed))[0]) for seed in range(12)}
        assert found == ({True, False} if thinking else {False})
        service = service_with("as Qwen3 has them", thinking)
        guide = service.guide(CALLS, service.text(CALLS, True))
        mask = guide.allowed()
        assert bool(mask[opener // WORD] >> (opener % WORD) & 1) is thinking
        assert np.unpackbits(mask.view(np.uint8)).sum() <= 3, "the call's marker, a line end, and perhaps the opener"


def test_a_stop_string_that_may_end_a_marker_delays_nothing():
    """The parser holds back what may become the stop string; the grammar begins at once."""
    for seed in range(6):
        body = {**FORMAT, "stop": [">>", "</think>!"]}
        job = walk(SERVICES["as Qwen3 has them"], body, seed, in_reasoning=True)
        if job.text is not None and not job.text.stopped:
            assert jsonschema_rs.is_valid(CITY, json.loads(parts_of(job)[1]))


@pytest.mark.parametrize("tokens", [[10**9], [6, 10**6]])
def test_a_requests_own_stop_ids_make_no_grammar_of_their_own(tokens):
    """They end the answer where they come, as ever; the tokenizer is prepared once, for the model's."""
    service = SERVICES["as Qwen3 has them"]
    service.prepare_grammars()
    body = {**FORMAT, "stop_token_ids": tokens}
    before = guides.wrapped_tokenizer.cache_info().misses
    assert service.guide(body, service.text(body, True)).allowed().any()
    assert guides.wrapped_tokenizer.cache_info().misses == before


def test_a_grammar_that_grows_too_complex_fails_its_own_request():
    """It does not end as if the answer were whole."""
    tokenizer = SERVICES["special"].loaded.tokenizer
    wrapped = guides.wrapped_tokenizer(tokenizer, len(tokenizer), (END_ID,))
    grammar = llguidance.LLMatcher.grammar_from_json_schema({"type": "object"})
    matcher = llguidance.LLMatcher(wrapped, grammar, limits=llguidance.LLParserLimits(max_items_in_row=3))
    job = Job(Request([5], SamplingParams(max_tokens=9)), guide=guides.Grammar(matcher, len(tokenizer)))
    job.take(encode(tokenizer, "{"))
    assert isinstance(job.failed, BadRequest) and "can be followed no further: Parser Error" in str(job.failed)


NAMED = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "look"}}}


@pytest.mark.parametrize("body", [CALLS, NAMED, FORMAT, {"structured_outputs": {"regex": "a"}}], ids=str)
def test_without_llguidance_a_grammar_is_refused_by_name(monkeypatch, body):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    service = SERVICES["as Qwen3 has them"]
    with pytest.raises(BadRequest, match=r"can't be honoured: the package llguidance is not installed") as error:
        service.guide(body, service.text(body, True))
    assert error.value.field in body and str(error.value).startswith(str(error.value.field))
    assert service.guide({}, None) is None


def test_one_grammar_makes_many_guides_that_know_nothing_of_each_other():
    service = SERVICES["special"]
    first, second = (walk(service, CALLS, seed) for seed in (3, 4))
    assert [parts_of(walk(service, CALLS, seed))[2] for seed in (3, 4)] == [parts_of(first)[2], parts_of(second)[2]]
