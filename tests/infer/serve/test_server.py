"""The server over HTTP, with OpenAI's own client: every call, what is refused, and what clients do to it."""

import asyncio
import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from serving import KEY, Running, solo, tiny_model

from convert.loading import LoadedModel
from domino_jax import decode
from domino_jax.errors import DominoError
from domino_jax.runtime.slots import Request
from domino_jax.sampling import SamplingParams
from infer.serve import app as routes
from infer.serve import worker as workers
from infer.serve.description import describe_api
from infer.serve.worker import Job, Update
from infer.text import encode

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_model()


@pytest.fixture(scope="module")
def running(loaded) -> Iterator[Running]:
    with Running(loaded) as made:
        made.begin()
        yield made


# --- Every call, with the real client --------------------------------------------------------------------------------


def test_models_and_health(running):
    (model,) = running.client().models.list().data
    assert (model.id, model.object, model.model_extra["drafter"]) == ("tiny", "model", "Domino")
    assert running.get("/health").json() == {"status": "ready"}
    assert running.get("/openapi.json").json() == describe_api("tiny")


def test_a_completion_is_the_targets(running, loaded):
    client, expected = running.client(), solo(loaded, "hello")
    found = client.completions.create(model="tiny", prompt="hello", max_tokens=12)
    (choice,) = found.choices
    assert choice.text == loaded.tokenizer.decode(expected.tokens, skip_special_tokens=True)
    assert (choice.finish_reason, found.usage.completion_tokens, found.usage.prompt_tokens) == ("length", 12, 5)
    ids = encode(loaded.tokenizer, "hello")
    assert client.completions.create(model="tiny", prompt=ids, max_tokens=12).choices[0].text == choice.text
    both = client.completions.create(model="tiny", prompt=["hello", "other"], max_tokens=12, n=2)
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert [c.text for c in both.choices[:2]] == [choice.text] * 2 and both.choices[2].text != choice.text
    echoed = client.completions.create(model="tiny", prompt="hello", max_tokens=12, echo=True)
    assert echoed.choices[0].text == "hello" + choice.text
    assert client.completions.create(model="tiny", prompt="hello").usage.completion_tokens == 16


def test_streamed_pieces_make_the_whole(running):
    client = running.client()
    how = {"model": "tiny", "prompt": "hello", "max_tokens": 40}
    whole = client.completions.create(**how).choices[0]
    chunks = list(client.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert len(chunks) > 3 and chunks[-1].usage.completion_tokens == 40 and chunks[0].usage is None


def test_a_chat(running, loaded):
    client, messages = running.client(), [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    how = {"model": "tiny", "messages": messages, "max_completion_tokens": 20}
    found = client.chat.completions.create(**how)
    message = found.choices[0].message
    assert message.role == "assistant" and message.content and found.usage.completion_tokens == 20
    assert message.model_extra.get("reasoning_content") is None
    assert found.usage.completion_tokens_details.reasoning_tokens == 0
    chunks = list(client.chat.completions.create(**how, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    thinking = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}
    thought = client.chat.completions.create(**how, **thinking)
    extra = thought.choices[0].message.model_extra
    assert extra["reasoning"] == extra["reasoning_content"] and not thought.choices[0].message.content
    assert thought.usage.completion_tokens_details.reasoning_tokens == 20
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    *_, last = client.chat.completions.create(**how, **thinking, **usage, n=2)
    assert last.usage.completion_tokens_details.reasoning_tokens == last.usage.completion_tokens == 40
    whole = client.completions.create(model="tiny", prompt="hi", max_tokens=2)
    assert whole.usage.completion_tokens_details is None, "a completion's thoughts are not told apart"
    developer = [{"role": "developer", "content": "Be brief."}, *messages]
    assert client.chat.completions.create(model="tiny", messages=developer, max_tokens=3).usage.completion_tokens == 3


def test_a_response(running):
    client = running.client()
    how = {"model": "tiny", "input": "hi", "instructions": "Be brief.", "max_output_tokens": 20}
    found = client.responses.create(**how)
    assert found.status == "incomplete" and found.incomplete_details.reason == "max_output_tokens"
    assert found.output_text and found.usage.output_tokens == 20
    assert found.usage.output_tokens_details.reasoning_tokens == 0
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    thought = client.responses.create(**how, extra_body=thinking)
    assert thought.usage.output_tokens_details.reasoning_tokens == 20 and not thought.output_text
    *_, end = client.responses.create(**how, extra_body=thinking, stream=True)
    assert end.response.usage.output_tokens_details.reasoning_tokens == 20
    events = list(client.responses.create(**how, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == found.output_text
    assert [events[0].type, events[-1].type] == ["response.created", "response.incomplete"]
    assert [e.sequence_number for e in events] == list(range(len(events)))


def test_a_seed_gives_the_same_sample_and_none_another(running, loaded):
    client = running.client()
    how = {"model": "tiny", "prompt": "hello", "max_tokens": 12, "temperature": 0.9, "top_p": 0.95}
    first, again = (client.completions.create(**how, seed=5).choices[0].text for _ in range(2))
    expected = solo(loaded, "hello", temperature=0.9, top_p=0.95, seed=5)
    assert first == again == loaded.tokenizer.decode(expected.tokens, skip_special_tokens=True)
    assert len({client.completions.create(**how).choices[0].text for _ in range(4)}) > 1
    assert len({c.text for c in client.completions.create(**how, seed=5, n=4).choices}) > 1


def test_logprobs_penalties_and_stops(running, loaded):
    client = running.client()
    found = client.completions.create(model="tiny", prompt="hello", max_tokens=6, logprobs=3).choices[0].logprobs
    expected = solo(loaded, "hello", logprobs=3)
    assert found.token_logprobs == pytest.approx([told.chosen for told in expected.logprobs[:6]], abs=1e-4)
    assert all(len(top) <= 3 for top in found.top_logprobs) and len(found.text_offset) == 6
    messages = [{"role": "user", "content": "hi"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, logprobs=True, top_logprobs=2)
    assert [len(c.top_logprobs) for c in chat.choices[0].logprobs.content] == [2] * 6
    how = {"frequency_penalty": 1.5, "presence_penalty": 0.5, "logit_bias": {"200": 3.0}}
    biased = solo(loaded, "hello", **{**how, "logit_bias": ((200, 3.0),)})
    text = client.completions.create(model="tiny", prompt="hello", max_tokens=12, **how).choices[0].text
    assert text == loaded.tokenizer.decode(biased.tokens, skip_special_tokens=True)
    whole = client.completions.create(model="tiny", prompt="hello", max_tokens=40).choices[0].text
    stop = next(c for i, c in enumerate(whole) if i > 3 and c not in whole[:i] and c.isprintable() and c != "�")
    cut = client.completions.create(model="tiny", prompt="hello", max_tokens=40, stop=[stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    ended = solo(loaded, "hello").tokens[4]
    by_id = client.completions.create(
        model="tiny", prompt="hello", max_tokens=40, extra_body={"stop_token_ids": [ended]}
    )
    assert by_id.choices[0].finish_reason == "stop" and by_id.usage.completion_tokens <= 5


def test_logprobs_of_the_prompt(running, loaded):
    """As harnesses of evaluation ask for them: echo, logprobs, and no token or one, which they leave out."""
    create, expected = running.client().completions.create, solo(loaded, "hello", logprobs=3)
    ids, said = expected.ids, expected.tokens
    found = create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=3)
    (choice,) = found.choices
    assert choice.text == loaded.tokenizer.decode(ids, skip_special_tokens=True) and choice.finish_reason == "length"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids), 0)
    told = choice.logprobs
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None and len(told.tokens) == len(ids)
    assert told.token_logprobs[-len(said) :] == pytest.approx([one.chosen for one in expected.logprobs], abs=1e-4)
    assert all(0 < len(top) <= 3 for top in told.top_logprobs[1:])
    *several, _ = create(model="tiny", prompt=[ids, ids[:7]], max_tokens=1, echo=True, logprobs=3, n=2).choices
    assert [len(one.logprobs.tokens) for one in several] == [len(ids) + 1] * 2 + [8]
    assert several[0].logprobs.token_logprobs[:-1] == told.token_logprobs
    chunks = list(create(model="tiny", prompt=ids, max_tokens=20, echo=True, logprobs=3, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    streamed = [value for part in parts if part for value in part.token_logprobs]
    assert streamed[: len(ids)] == told.token_logprobs and len(streamed) == len(ids) + 20
    alone = create(model="tiny", prompt="hello", max_tokens=0, echo=True).choices[0]
    assert (alone.text, alone.logprobs) == ("hello", None) and running.is_idle()


def test_who_leaves_while_a_prompt_is_scored_leaves_nothing(loaded, monkeypatch):
    """And others go on meanwhile."""

    def endless(*_: Any) -> Any:
        while True:
            time.sleep(0.01)
            yield

    monkeypatch.setattr(workers, "prompt_logprobs", endless)
    with Running(loaded) as made:
        made.begin()
        body = {"prompt": "hello", "max_tokens": 0, "echo": True, "logprobs": 1}
        with pytest.raises(httpx.TimeoutException):
            httpx.post(made.url + "/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=0.5)
        assert made.post("/v1/completions", {"prompt": "hello", "max_tokens": 20}).status_code == 200
        assert made.is_idle()
        told: list[Update] = []
        params = SamplingParams(max_tokens=1, logprobs=1)
        made.worker.submit(Job(Request([50], params), scores=True, tell=told.append, deadline=time.monotonic() + 0.1))
        made.post("/v1/completions", {"prompt": "hello", "max_tokens": 200})
        assert made.is_idle() and told[-1].finish_reason == "length"


def test_tokens_and_back(running):
    ids = running.post("/tokenize", {"prompt": "hello"}).json()
    assert ids["count"] == 5 and running.post("/detokenize", {"tokens": ids["tokens"]}).json() == {"prompt": "hello"}
    chat = running.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}).json()
    assert chat["count"] > 10


def test_where_tokens_came_from(running):
    """The pieces that are no rejected drafts make the text."""
    body = {"prompt": "hello", "max_tokens": 30, "return_drafts": True}
    (choice,) = (found := running.post("/v1/completions", body).json())["choices"]
    kept = "".join(p["text"] for c in choice["drafts"] for p in c["pieces"] if p["origin"] != "rejected")
    assert kept == choice["text"] and max(c["accepted"] for c in choice["drafts"]) > 1
    assert found["usage"]["domino"]["tau"] > 1
    assert sum(c["tokens"] for c in choice["drafts"]) == found["usage"]["completion_tokens"]
    plain = running.post("/v1/completions", {**body, "speculative": False}).json()
    assert plain["choices"][0]["text"] == choice["text"] and plain["usage"]["domino"]["cycles"] == 0


def test_figures_for_prometheus(running):
    running.post("/v1/completions", {"prompt": "hello", "max_tokens": 20})
    text = running.get("/metrics").text
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    model = '{model_name="tiny"}'
    assert float(found[f"domino:generation_tokens_total{model}"]) >= 20
    drafted, accepted = (
        float(found[f"domino:spec_decode_num_{n}_total{model}"]) for n in ("draft_tokens", "accepted_tokens")
    )
    assert 0 < accepted < drafted
    assert float(found[f"domino:time_to_first_token_seconds_count{model}"]) >= 1
    assert float(found[f"domino:num_slots{model}"]) == 3
    assert any(line.startswith("req-") and "/v1/completions 200" in line for line in running.lines)


CHAT = {"messages": [{"role": "user", "content": "a"}]}
JSON = {"type": "json_object"}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


TOOLS = {**CHAT, "tools": [tool("look")]}
REQUIRED = {**TOOLS, "tool_choice": "required"}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_structured_answers_always_parse(running, loaded, temperature):
    """Of a model that knows no JSON; beside others, which stay as they are."""
    client, how = running.client(), {"model": "tiny", "temperature": temperature, "max_tokens": 120}
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    beside = threading.Thread(target=lambda: client.completions.create(model="tiny", prompt="hello", max_tokens=200))
    beside.start()
    for seed in range(4):
        messages = [{"role": "user", "content": f"who {seed}"}]
        answer = client.chat.completions.create(messages=messages, response_format=form, seed=seed, **how).choices[0]
        if answer.finish_reason == "stop":
            found = json.loads(answer.message.content)
            assert set(found) == {"name", "age"} and len(found["name"]) <= 6 and found["age"] <= 99
        else:
            assert answer.message.content.lstrip().startswith("{")
    outputs = {"structured_outputs": {"choice": ["yes", "no"]}}
    chosen = client.completions.create(prompt="well", extra_body=outputs, **how).choices[0]
    assert chosen.text in ("yes", "no") and chosen.finish_reason == "stop"
    digits = client.completions.create(prompt="n", extra_body={"structured_outputs": {"regex": "[0-9]{3}"}}, **how)
    assert digits.choices[0].text.isdigit() and len(digits.choices[0].text) == 3
    beside.join()
    plain = client.completions.create(model="tiny", prompt="hello", max_tokens=12).choices[0].text
    assert plain == loaded.tokenizer.decode(solo(loaded, "hello").tokens, skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_calls_that_must_come(running, temperature):
    """Of a model that knows no calls, streamed or not; see test_guides.py for the grammars."""
    tools = [tool("look", SCHEMA), tool("now"), tool("look_up", {**SCHEMA, "required": ["name"]})]
    how = {"model": "tiny", "messages": CHAT["messages"], "tools": tools, "temperature": temperature}
    create = running.client().chat.completions.create
    for seed in range(3):
        more = {"seed": seed, "max_tokens": 300, "parallel_tool_calls": False}
        answer = create(**how, **more, tool_choice="required").choices[0]
        (called,) = answer.message.tool_calls
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        found = json.loads(called.function.arguments)
        assert called.function.name in ("look", "now", "look_up") and set(found) <= {"name", "age"}
        chunks = list(create(**how, **more, tool_choice=named("look_up"), stream=True))
        deltas = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
        assert [d.function.name for d in deltas if d.id] == ["look_up"] and chunks[-1].choices[0].finish_reason
        assert "name" in json.loads("".join(d.function.arguments for d in deltas))
    none = create(**how, max_tokens=20, tool_choice="none").choices[0].message
    assert none.tool_calls is None


# --- What is refused -------------------------------------------------------------------------------------------------

LONG = {"prompt": "x" * 500, "max_tokens": 100}


@pytest.mark.parametrize(
    ("path", "body", "field", "said"),
    [
        ("completions", {"prompt": "a", "best_off": 2}, "best_off", "is no field that this server can honour"),
        ("completions", {"prompt": "a", "best_of": 2}, "best_of", "must be 1"),
        ("completions", {"prompt": "a", "temperature": -1}, "temperature", "a number from 0 to 100, found -1"),
        ("completions", {"prompt": "a", "temperature": True}, "temperature", "found True"),
        ("completions", {"prompt": "a", "repetition_penalty": 1e-300}, "repetition_penalty", "from 0.001 to 10"),
        ("completions", {"prompt": "a", "n": 1.5}, "n", "a whole number"),
        ("completions", {"prompt": "a", "model": "gpt-4"}, "model", "has the model tiny, not 'gpt-4'"),
        ("completions", {}, "prompt", "prompt is missing"),
        ("completions", {"prompt": [300]}, None, "id 300, outside the vocabulary of 260"),
        ("completions", {"prompt": [[1], "a", []]}, "prompt", "none of them empty"),
        ("completions", LONG, "max_tokens", "500 tokens and 100 new ones, and this server has room for 512"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", 'such as {"42": -100}'),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens", "goes with echo"),
        ("completions", {"prompt": "x" * 600, "echo": True, "logprobs": 1, "max_tokens": 0}, "prompt", "room for 512"),
        ("completions", {"prompt": "a", "stop": [""]}, "stop", "none of them empty"),
        ("completions", {"prompt": "a", "min_tokens": 99, "max_tokens": 9}, None, "min_tokens is 99"),
        ("chat/completions", {"messages": []}, "messages", "at least one message"),
        ("chat/completions", {**CHAT, "top_logprobs": 2}, "top_logprobs", "needs"),
        ("chat/completions", {**CHAT, "tool_choice": "required"}, "tool_choice", "needs tools"),
        ("chat/completions", {**CHAT, "tool_choice": "any"}, "tool_choice", "'auto', 'none', 'required' or {"),
        ("chat/completions", {**CHAT, "tool_choice": named("look"), "tools": []}, "tool_choice", "none of the tools"),
        ("chat/completions", {**TOOLS, "tool_choice": named("loo")}, "tool_choice", "'loo', which is none"),
        ("chat/completions", {**TOOLS, "parallel_tool_calls": False}, "parallel_tool_calls", "'required'"),
        ("chat/completions", {**REQUIRED, "tools": 2 * TOOLS["tools"]}, "tools", "'look' twice"),
        ("chat/completions", {**REQUIRED, "tools": [tool("f", {"type": "array"})]}, "tools", "schema of an object"),
        ("chat/completions", {**REQUIRED, "tools": [tool("f", {"$ref": "#/x"})]}, "tool_choice", "grammar is wrong"),
        ("chat/completions", {**REQUIRED, "response_format": JSON}, "tool_choice", "response_format and tool_choice"),
        ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, "tools", '"parameters": {...}'),
        ("completions", {"prompt": "a", "structured_outputs": {"choice": ["a"]}, "response_format": JSON},
         "structured_outputs", "one grammar can be had"),
        ("chat/completions", {**CHAT, "response_format": {"type": "xml"}}, "response_format", '{"type": "text"}'),
        ("completions", {"prompt": "a", "structured_outputs": {"regex": "["}}, "structured_outputs", "is wrong"),
        ("completions", {"prompt": "a", "structured_outputs": {"lark": "x"}}, "structured_outputs", "one of"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "image_url",
        ),
        ("responses", {"input": [{"type": "function_call"}]}, "input", "messages alone"),
        ("responses", {"input": "a", "previous_response_id": "x"}, "previous_response_id", "is no field"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_can_not_be_honoured_is_refused_by_name(running, path, body, field, said):
    response = running.post(f"/v1/{path}", body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == field and said in error["message"] and error["message"].count("\n") == 0


def test_other_refusals(running):
    assert running.get("/nothing").status_code == 404 and running.get("/v1/completions").status_code == 405
    for path in ("/health", "/metrics", "/v1/models", "/", "/openapi.json", "/nothing"):
        assert running.get(path, key="wrong").status_code == 401, path
        assert httpx.get(running.url + path).status_code == 401, path
    assert httpx.post(running.url + "/v1/completions", json={"prompt": "a"}).status_code == 401
    basic = httpx.get(running.url + "/health", auth=("anyone", KEY))
    assert basic.status_code == 200
    assert running.post("/v1/completions", {"prompt": "a" * 20_000}).status_code == 413
    headers = {"Authorization": f"Bearer {KEY}", "content-type": "text/plain"}
    assert httpx.post(running.url + "/v1/completions", content=b"{}", headers=headers).status_code == 415
    headers["content-type"] = "application/json"
    for content in (b"{", b"\xff", b"[1]", b'{"prompt": NaN}', b'{"a": 1, "a": 2}', b"[" * 5000):
        response = httpx.post(running.url + "/v1/completions", content=content, headers=headers)
        assert response.status_code == 400 and response.json()["error"]["message"], content
    for path, content in (
        ("completions", b'{"prompt": "\\ud800"}'),
        ("responses", b'{"input": "a", "metadata": {"a": "\\uDFFF", "b": "c"}}'),
        ("chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "user": "\\ud83d"}'),
    ):
        response = httpx.post(f"{running.url}/v1/{path}", content=content, headers=headers)
        assert response.status_code == 400 and "surrogate" in response.json()["error"]["message"], content
    pair = b'{"prompt": "\\ud83d\\ude00", "max_tokens": 1}'
    assert httpx.post(running.url + "/v1/completions", content=pair, headers=headers).status_code == 200
    with pytest.raises(openai.BadRequestError, match="no field"):
        running.client().completions.create(model="tiny", prompt="a", extra_body={"guided_regex": "a+"})
    assert (
        running.post("/v1/completions", {"prompt": "a"}, headers={"x-request-id": "mine"}).headers["x-request-id"]
        == "mine"
    )


def test_before_it_is_ready_and_when_it_goes_down(loaded):
    with Running(loaded) as made:
        assert made.get("/health").status_code == 503
        early = made.post("/v1/completions", {"prompt": "a"})
        assert (early.status_code, early.headers["retry-after"]) == (503, "10")
        made.begin()
        assert made.get("/health").status_code == 200
        made.server.draining = True
        assert made.get("/health").status_code == made.post("/v1/completions", {"prompt": "a"}).status_code == 503


# --- What clients do to it -------------------------------------------------------------------------------------------


def test_who_disconnects_frees_the_slot(running):
    body = {"prompt": "hello", "max_tokens": 400}
    headers = {"Authorization": f"Bearer {KEY}"}
    for i in range(12):  # more than there are slots
        if i % 2:
            with httpx.stream(
                "POST", running.url + "/v1/completions", json={**body, "stream": True}, headers=headers
            ) as r:
                next(r.iter_lines())
        else:
            with contextlib.suppress(httpx.TimeoutException):
                httpx.post(running.url + "/v1/completions", json=body, headers=headers, timeout=0.05)
    assert running.is_idle(), "all slots are free again"
    assert running.post("/v1/completions", {"prompt": "hello", "max_tokens": 3}).status_code == 200


def test_a_full_queue_is_429_and_harms_nobody(loaded):
    with Running(loaded, slots=1, queue=2) as made:
        made.begin()
        body = {"prompt": "hello", "max_tokens": 60}

        async def flood() -> list[httpx.Response]:
            async with httpx.AsyncClient(timeout=60) as client:
                headers = {"Authorization": f"Bearer {KEY}"}
                posts = [client.post(made.url + "/v1/completions", json=body, headers=headers) for _ in range(12)]
                return await asyncio.gather(*posts)

        found = asyncio.run(flood())
        refused = [r for r in found if r.status_code == 429]
        assert refused and all(int(r.headers["retry-after"]) >= 1 for r in refused)
        assert refused[0].json()["error"]["type"] == "rate_limit_error"
        served = [r.json()["choices"][0]["text"] for r in found if r.status_code == 200]
        assert len(served) >= 3 and len(set(served)) == 1 and len(served) + len(refused) == 12
        assert made.is_idle()


def test_who_has_left_is_not_counted_as_waiting(loaded):
    """As while a program is compiled, which may take long; else others were refused for them."""
    with Running(loaded, slots=1) as made:
        told: list[Update] = []
        jobs = [Job(Request([50, i], SamplingParams(max_tokens=3)), tell=told.append) for i in range(6)]
        for job in jobs:
            made.worker.submit(job)
        assert made.worker.waiting == 6
        for job in jobs[:4] * 3:
            made.worker.cancel(job)
        assert made.worker.waiting == 2
        made.begin()
        assert made.is_idle() and made.worker.waiting == 0
        assert [job.finish_reason for job in jobs] == ["cancelled"] * 4 + ["length"] * 2


def test_a_dispatch_that_fails_harms_no_later_request(loaded, monkeypatch):
    with Running(loaded) as made:
        made.begin()
        body = {"prompt": "hello", "max_tokens": 20}
        before = made.post("/v1/completions", body).json()["choices"][0]["text"]
        speculate, calls = decode.speculate, itertools.count()

        def failing(*arguments: Any) -> Any:
            if next(calls) == 1:
                raise RuntimeError("a cosmic ray")
            return speculate(*arguments)

        monkeypatch.setattr(decode, "speculate", failing)
        failed = made.post("/v1/completions", body)
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
        assert made.post("/v1/completions", body).json()["choices"][0]["text"] == before
        assert made.get("/health").status_code == 200 and made.is_idle()


def test_text_that_can_not_be_made_fails_its_own_request(running, loaded):
    class Broken:
        stopped = False

        def feed(self, tokens: list[int]) -> int:
            raise ValueError("no text")

        def finish(self) -> None: ...

        def take(self) -> list[Any]:
            return []

    told: list[Update] = []
    job = Job(Request([50, 60], SamplingParams(max_tokens=20)), text=Broken(), tell=told.append)
    other: list[Update] = []
    sound = Job(Request([50, 60], SamplingParams(max_tokens=20)), tell=other.append)
    running.worker.submit(job)
    running.worker.submit(sound)
    assert running.is_idle()
    assert isinstance(told[-1].error, DominoError) and "no text" in str(told[-1].error)
    assert sum(len(u.tokens) for u in other) == 20 and other[-1].finish_reason == "length"


def test_a_request_that_takes_too_long_ends_as_it_is(running):
    told: list[Update] = []
    job = Job(Request([50, 60], SamplingParams(max_tokens=400)), tell=told.append, deadline=time.monotonic() + 0.05)
    running.worker.submit(job)
    assert running.is_idle() and told[-1].finish_reason == "length" and len(job.tokens) < 400


def test_a_silent_stream_says_that_it_is_alive(loaded, monkeypatch):
    speculate = decode.speculate
    monkeypatch.setattr(decode, "speculate", lambda *a: time.sleep(0.05) or speculate(*a))
    monkeypatch.setattr(routes, "KEEP_ALIVE", 0.01)
    with Running(loaded, slots=1) as made:
        made.begin()
        headers = {"Authorization": f"Bearer {KEY}"}
        body = {"prompt": "hello", "max_tokens": 60, "stream": True}
        with httpx.stream("POST", made.url + "/v1/completions", json=body, headers=headers, timeout=60) as response:
            lines = list(response.iter_lines())
        assert ": still at work" in lines and [line for line in lines if line][-1] == "data: [DONE]"


def test_the_checkpoints_sampling_is_the_default(loaded):
    with Running(loaded, defaults={"temperature": 1.5, "top_p": 0.99}) as made:
        made.begin()
        body = {"prompt": "hello", "max_tokens": 12}
        assert len({made.post("/v1/completions", body).json()["choices"][0]["text"] for _ in range(4)}) > 1
        greedy = [
            made.post("/v1/completions", {**body, "temperature": 0}).json()["choices"][0]["text"] for _ in range(3)
        ]
        assert len(set(greedy)) == 1
