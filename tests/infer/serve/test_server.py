"""The server over HTTP, with OpenAI's own client: every call, what is refused, and what clients do to it."""

import asyncio
import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import factory
import httpx
import jax.numpy as jnp
import numpy as np
import openai
import pytest
import uvicorn
from factory import BYTE_TARGET, make_tokenizer

from convert.loading import LoadedModel
from domino_jax import decode
from domino_jax.errors import DominoError
from domino_jax.runtime.slots import Completion, Request, Slots
from domino_jax.sampling import SamplingParams
from infer.serve import app as routes
from infer.serve.app import Server
from infer.serve.description import describe_api
from infer.serve.metrics import ServingMetrics
from infer.serve.requests import Service
from infer.serve.worker import Job, Update, Worker
from infer.text import encode

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_compilation")]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    "{% if tools %}[tools <tool_call> {{ tools | length }}]{% endif %}<|im_start|>assistant:"
    "{% if enable_thinking is defined and enable_thinking %}<think>{% else %}<think></think>{% endif %}"
)
KEY = "a key"


class Running:
    """A server in a thread of this process."""

    def __init__(self, loaded: LoadedModel, slots: int = 3, queue: int = 64, key: str | None = KEY, **more: Any):
        self.metrics, self.lines = ServingMetrics("tiny", loaded.configs.proposals), []
        self.worker = Worker(loaded, slots, False, 0, self.lines.append, self.metrics.seen)
        service = Service(loaded, "tiny", more.pop("defaults", {}), loaded.configs.target.positions, 60.0)
        self.server = Server(
            service,
            self.worker,
            self.metrics,
            api_key=key,
            max_queue=queue,
            max_body=20_000,
            profile=None,
            log=self.lines.append,
        )
        self.app = self.server.app()
        self._sock = socket.socket()
        self._sock.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}"
        self._uvicorn = uvicorn.Server(uvicorn.Config(self.app, log_level="warning", lifespan="off"))
        self._thread = threading.Thread(target=lambda: self._uvicorn.run(sockets=[self._sock]), daemon=True)

    def __enter__(self) -> "Running":
        self._thread.start()
        return self

    def begin(self) -> None:
        self.worker.start()
        assert self.worker.ready.wait(120)

    def __exit__(self, *_: object) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(30)
        self.worker.stop()

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def post(self, path: str, body: Any, key: str = KEY, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}", **more.pop("headers", {})}
        return httpx.post(self.url + path, json=body, headers=headers, timeout=60, **more)

    def get(self, path: str, key: str = KEY) -> httpx.Response:
        return httpx.get(self.url + path, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    def is_idle(self, seconds: float = 20.0) -> bool:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not (self.worker.running or self.worker.waiting or self.server.answering):
                return True
            time.sleep(0.02)
        return False


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    target = replace(BYTE_TARGET, tie_word_embeddings=False, max_position_embeddings=512)
    pair = factory.good_pair(target, 3, num_hidden_layers=1)
    tokenizer = make_tokenizer(TEMPLATE)
    return LoadedModel(pair.configs, pair.params, tokenizer, (), jnp.dtype("float32"), (), 0.0)


@pytest.fixture(scope="module")
def running(loaded) -> Iterator[Running]:
    with Running(loaded) as made:
        made.begin()
        yield made


def solo(loaded: LoadedModel, text: str, **how: Any) -> Completion:
    """What the target says to a text, alone and without drafts."""
    params = SamplingParams(**{"max_tokens": 12, **how})
    one = Completion(Request(encode(loaded.tokenizer, text), params))
    lean = loaded.params.without_drafter, loaded.configs.without_drafter
    list(Slots(*lean, 1, loaded.dtype, processors=True).run([one]))
    return one


# --- Every call, with the real client --------------------------------------------------------------------------------


def test_models_and_health(running):
    (model,) = running.client().models.list().data
    assert (model.id, model.object) == ("tiny", "model")
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
    chunks = list(client.chat.completions.create(**how, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    thought = client.chat.completions.create(**how, extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    extra = thought.choices[0].message.model_extra
    assert extra["reasoning"] == extra["reasoning_content"] and not thought.choices[0].message.content
    developer = [{"role": "developer", "content": "Be brief."}, *messages]
    assert client.chat.completions.create(model="tiny", messages=developer, max_tokens=3).usage.completion_tokens == 3


def test_a_response(running):
    client = running.client()
    how = {"model": "tiny", "input": "hi", "instructions": "Be brief.", "max_output_tokens": 20}
    found = client.responses.create(**how)
    assert found.status == "incomplete" and found.incomplete_details.reason == "max_output_tokens"
    assert found.output_text and found.usage.output_tokens == 20
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


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
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


# --- What is refused -------------------------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "a"}]}
LONG = {"prompt": "x" * 500, "max_tokens": 100}


@pytest.mark.parametrize(
    ("path", "body", "field", "said"),
    [
        ("completions", {"prompt": "a", "best_off": 2}, "best_off", "is no field that this server can honour"),
        ("completions", {"prompt": "a", "best_of": 2}, "best_of", "must be 1"),
        ("completions", {"prompt": "a", "temperature": -1}, "temperature", "a number from 0 to 100, found -1"),
        ("completions", {"prompt": "a", "temperature": True}, "temperature", "found True"),
        ("completions", {"prompt": "a", "n": 1.5}, "n", "a whole number"),
        ("completions", {"prompt": "a", "model": "gpt-4"}, "model", "has the model tiny, not 'gpt-4'"),
        ("completions", {}, "prompt", "prompt is missing"),
        ("completions", {"prompt": [300]}, None, "id 300, outside the vocabulary of 260"),
        ("completions", {"prompt": [[1], "a", []]}, "prompt", "none of them empty"),
        ("completions", LONG, "max_tokens", "500 tokens and 100 new ones, and this server has room for 512"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", 'such as {"42": -100}'),
        ("completions", {"prompt": "a", "echo": True, "logprobs": 1}, "echo", "of the prompt can't be had"),
        ("completions", {"prompt": "a", "stop": [""]}, "stop", "none of them empty"),
        ("completions", {"prompt": "a", "min_tokens": 99, "max_tokens": 9}, None, "min_tokens is 99"),
        ("chat/completions", {"messages": []}, "messages", "at least one message"),
        ("chat/completions", {**CHAT, "top_logprobs": 2}, "top_logprobs", "needs"),
        ("chat/completions", {**CHAT, "tool_choice": "required"}, "tool_choice", "'auto' or 'none'"),
        ("chat/completions", {**CHAT, "response_format": {"type": "xml"}}, "response_format", '{"type": "text"}'),
        ("completions", {"prompt": "a", "structured_outputs": {"regex": "["}}, "response_format", "grammar is wrong"),
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


def test_many_streams_of_mixed_settings_each_as_alone(running, loaded):
    rng = np.random.default_rng(0)
    kinds = itertools.cycle(
        [
            {},
            {"temperature": 0.8, "seed": 3},
            {"temperature": 1.2, "top_k": 20, "seed": 4},
            {"frequency_penalty": 0.8},
            {"temperature": 0.7, "top_p": 0.9, "seed": 5, "presence_penalty": 0.4},
        ]
    )
    asked = []
    for i, kind in zip(range(24), kinds, strict=False):
        text = "".join(chr(97 + int(c)) for c in rng.integers(0, 26, int(rng.integers(1, 60))))
        asked.append((text, {**kind, "max_tokens": int(rng.integers(1, 40)), "stream": bool(i % 3)}))
    expected = [solo(loaded, text, **{k: v for k, v in how.items() if k != "stream"}) for text, how in asked]

    async def ask(client: openai.AsyncOpenAI, text: str, how: dict[str, Any]) -> str:
        extra = {"top_k": how.pop("top_k")} if "top_k" in how else {}
        found = await client.completions.create(model="tiny", prompt=text, extra_body=extra, **how)
        if not how["stream"]:
            return found.choices[0].text
        return "".join([chunk.choices[0].text async for chunk in found])

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, text, dict(how)) for text, how in asked))

    found = asyncio.run(all_at_once())
    assert found == [loaded.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in expected]
    assert running.is_idle()


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


def test_bodies_of_its_own_description_get_no_5xx(running):
    """Some that it describes, and others. `-m slow` has far more."""
    fuzz(running, 60)


@pytest.mark.slow
def test_many_bodies_of_its_own_description_get_no_5xx(running):
    fuzz(running, 4000)


def fuzz(running: Running, cases: int) -> None:
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    description = describe_api("tiny")
    for answer in description["paths"].values():  # answers are not looked at here, and long ones take long
        if "post" in answer:
            schema = answer["post"]["requestBody"]["content"]["application/json"]["schema"]
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n"):
                if name in schema["properties"]:
                    schema["properties"][name]["maximum"] = 3
    schema, every = schemathesis.openapi.from_dict(description), cast(Any, list(HealthCheck))
    statuses: dict[int, int] = {}
    with httpx.Client(timeout=60, headers={"Authorization": f"Bearer {KEY}"}) as client:
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"):

            def ask(case: Any, path: str) -> None:
                try:
                    body = json.dumps(case.body).encode()
                except (TypeError, ValueError):
                    return
                response = client.post(running.url + path, content=body, headers={"content-type": "application/json"})
                statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
                assert response.status_code in (200, 400, 413, 429), (case.body, response.text)

            how = settings(
                max_examples=cases // 5,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=every,
            )
            how(given(case=schema[path]["POST"].as_strategy(), path=st.just(path))(ask))()
    assert statuses.get(200, 0) > cases // 20 and statuses.get(400, 0) > 0, statuses
    assert running.is_idle(60)
