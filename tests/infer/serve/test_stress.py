"""The server under many requests at once, under any request, and under clients that leave."""

import asyncio
import contextlib
import copy
import itertools
import json
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import openai
import pytest
from serving import KEY, Running, Storm, call, raw_request, solo, tiny_model

from convert.loading import LoadedModel
from infer.serve.description import describe_api

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_model()


@pytest.fixture(scope="module")
def running(loaded) -> Iterator[Running]:
    with Running(loaded, slots=16, queue=100_000) as made:
        made.begin()
        yield made


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.2, "top_k": 20, "seed": 4},
    {"frequency_penalty": 0.8},
    {"temperature": 0.7, "top_p": 0.9, "seed": 5, "presence_penalty": 0.4},
    {"repetition_penalty": 1.3, "logprobs": 2},
    {"temperature": 1.0, "min_p": 0.05, "seed": 6},
    {"logit_bias": {"200": 3.0, "100": -5.0}},
    {"stop_token_ids": [120, 121, 122], "min_tokens": 5},
    {"temperature": 0.9, "seed": 7, "logit_bias": {"90": 2.0}, "repetition_penalty": 1.1, "logprobs": 0},
    {"structured_outputs": {"regex": "[a-f]{5,20}"}},
]
EXTRA = ("top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "structured_outputs")


@pytest.mark.parametrize(("count", "kinds"), [(4, KINDS[:4]), pytest.param(64, KINDS, marks=pytest.mark.slow)])
def test_many_streams_of_mixed_settings_each_as_alone(running, loaded, count, kinds):
    # Of default_rng(24) one prompt has two likeliest tokens 2e-7 apart, whose order is that of the batch size.
    rng = np.random.default_rng(count + 1)
    asked = []
    for i, kind in zip(range(count), itertools.cycle(kinds), strict=False):
        text = "".join(chr(97 + int(c)) for c in rng.integers(0, 26, int(rng.integers(1, 60))))
        asked.append((text, {**kind, "max_tokens": int(rng.integers(5, 60))}, bool(i % 5)))

    def alone(text: str, how: dict[str, Any]) -> str:
        if "structured_outputs" in how:
            body = {"prompt": text, **how, "speculative": False}
            return running.post("/v1/completions", body).json()["choices"][0]["text"]
        biases = tuple((int(i), bias) for i, bias in how.get("logit_bias", {}).items())
        stops = tuple(how.get("stop_token_ids", ()))
        tokens = solo(loaded, text, **{**how, "logit_bias": biases, "stop_token_ids": stops}).tokens
        return loaded.tokenizer.decode(tokens, skip_special_tokens=True)

    expected = [alone(text, how) for text, how, _ in asked]

    async def ask(client: openai.AsyncOpenAI, text: str, how: dict[str, Any], stream: bool) -> str:
        extra = {name: how[name] for name in EXTRA if name in how}
        how = {name: value for name, value in how.items() if name not in EXTRA}
        asked: Any = {"model": "tiny", "prompt": text, "extra_body": extra, "stream": stream, **how}
        found: Any = await client.completions.create(**asked)
        if not stream:
            return found.choices[0].text
        return "".join([chunk.choices[0].text async for chunk in found])

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, *one) for one in asked))

    found = asyncio.run(all_at_once())
    wrong = [(one, alone, here) for one, alone, here in zip(asked, expected, found, strict=True) if alone != here]
    assert not wrong
    assert running.is_idle()


def test_who_leaves_frees_the_slot_whenever_it_is(running):
    """For a moment here; tests/e2e/test_serve.py has minutes, and a process whose memory it measures."""
    storm = Storm(int(running.url.rsplit(":", 1)[1]))
    storm.blow(2.0)
    assert running.is_idle(60), "all slots are free again"
    assert storm.left > 20 and set(storm.statuses) <= {200, 400}, storm
    assert running.post("/v1/completions", {"prompt": "hello", "max_tokens": 3}).status_code == 200


BIG = {"prompt": "hello", "n": 3, "max_tokens": 250, "logprobs": 20, "temperature": 0}


def connected(made: Running, body: dict[str, Any]) -> socket.socket:
    """A client that holds little of its answer, and has asked."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(20)
    client.connect(("127.0.0.1", made.port))
    client.sendall(raw_request("/v1/completions", body))
    return client


@pytest.mark.slow
def test_who_does_not_read_delays_nobody_and_is_dropped(loaded):
    with Running(loaded, slots=16, patience=2.0, buffer=8192) as made:
        made.begin()
        quick = {"prompt": "hello", "max_tokens": 8}
        expected = made.post("/v1/completions", quick).json()["choices"]
        made.post("/v1/completions", BIG)  # programs are compiled
        with connected(made, {**BIG, "stream": True}) as client:
            for _ in range(3):
                again = made.post("/v1/completions", quick)
                assert again.json()["choices"] == expected and again.elapsed.total_seconds() < 5
            assert made.is_idle(), "nothing is kept of it"
            said = bytearray()
            with contextlib.suppress(ConnectionError):
                while part := client.recv(1 << 16):
                    said += part
        assert said.startswith(b"HTTP/1.1 200") and b"[DONE]" not in said


def test_who_reads_slowly_gets_all_of_it(loaded):
    with Running(loaded, slots=16, buffer=8192) as made:
        made.begin()
        expected = [choice["text"] for choice in made.post("/v1/completions", BIG).json()["choices"]]
        found, said = [""] * 3, bytearray()
        with connected(made, {**BIG, "stream": True}) as client:
            while b"[DONE]" not in said[-100:]:
                said += client.recv(4096)
                time.sleep(0.002)
        for event in re.findall(rb"data: (\{.*\})\n\n", said):
            (choice,) = json.loads(event)["choices"]
            found[choice["index"]] += choice["text"]
        assert found == expected and made.is_idle()


# --- Any body --------------------------------------------------------------------------------------------------------

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize")
AT_ONCE = 64
RUN = 300  # bodies of one run of hypothesis
MIXED = 9  # bodies put together for each that is drawn
NEEDED = {"prompt", "messages", "input", "tokens", "max_tokens", "max_completion_tokens", "max_output_tokens"}
JUNK = [None, True, -1, 0, 2**70, 1e308, "", "\ud800", "é" * 300, [], [[]], {}, {"type": "function"}, [None], "none"]


def test_bodies_of_its_own_description_get_no_5xx(running):
    """Some of them, and others that it does not describe. `-m slow` has far more."""
    fuzz(running, 100)


@pytest.mark.slow
def test_a_hundred_thousand_bodies_get_no_5xx(running):
    print(fuzz(running, 100_000))


def fuzz(running: Running, cases: int) -> Counter[tuple[str, int]]:
    """Ask with bodies of the server's description, and with changed ones; the statuses of each path."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, seed, settings

    description = copy.deepcopy(describe_api("tiny"))
    for answer in description["paths"].values():  # answers are not looked at here, and long ones take long
        if "post" in answer:
            schema = answer["post"]["requestBody"]["content"]["application/json"]["schema"]
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n", "min_tokens"):
                if name in schema["properties"]:
                    schema["properties"][name]["maximum"] = 3
            prompts = schema["properties"].get("prompt", {}).get("anyOf", ())
            for ids in (schema["properties"].get("tokens", {}), *prompts):
                if ids.get("items", {}).get("type") == "string":
                    ids["maxItems"] = 3
                if ids.get("items", {}).get("type") == "integer":
                    ids["items"] = {**ids["items"], "maximum": 270}  # most of them below the vocabulary
            limits = {"max_completion_tokens", "max_output_tokens"} & {*schema["properties"]}
            schema["required"] = [*schema.get("required", ()), *limits]
    api, statuses = schemathesis.openapi.from_dict(description), Counter()
    how = settings(
        max_examples=min(RUN, cases // len(PATHS) // (1 + MIXED)),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=cast(Any, list(HealthCheck)),
    )
    with asyncio.Runner() as runner:
        for path in PATHS:
            asker = Asker(running, path, runner)
            for number in itertools.count():
                seed(number)(how(given(case=api[path]["POST"].as_strategy())(asker.take)))()
                asker.flush()
                if asker.statuses.total() >= cases // len(PATHS):
                    break
            statuses += Counter({(path, status): count for status, count in asker.statuses.items()})
    answered = sum(count for (_, status), count in statuses.items() if status == 200)
    assert answered > cases // 20 and statuses.total() > answered, statuses
    assert running.is_idle(60), "no slot is leaked"
    return statuses


def whole(value: Any) -> Any:
    """A body without numbers such as 3.0, which are integers to JSON Schema and none to the server."""
    if isinstance(value, dict):
        return {name: whole(one) for name, one in value.items()}
    if isinstance(value, list):
        return [whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


class Asker:
    """Asks with many bodies at once: those that are drawn, some of them changed, and others put together of theirs."""

    def __init__(self, running: Running, path: str, runner: asyncio.Runner):
        self.running, self.path, self.runner = running, path, runner
        self.waiting: list[bytes] = []
        self.statuses: Counter[int] = Counter()
        self.rng = random.Random(0)
        self.fields: dict[str, list[Any]] = {}  # values that were drawn

    def take(self, case: Any) -> None:
        self.add(case.body)
        if not isinstance(case.body, dict):
            return
        drawn = whole(case.body)
        for name, value in drawn.items():
            held = self.fields.setdefault(name, [])
            held.append(value)
            if len(held) > 500:
                held.pop(self.rng.randrange(len(held)))
        for _ in range(MIXED):
            names = self.rng.sample(list(self.fields), self.rng.randrange(min(6, len(self.fields) + 1)))
            kept = drawn if self.rng.random() < 0.2 else {n: v for n, v in drawn.items() if n in NEEDED}
            body = {**kept, **{name: self.rng.choice(self.fields[name]) for name in names}}
            if self.path == "/tokenize" and "messages" in body:  # it takes one or the other
                body.pop("prompt", None)
            if self.rng.random() < 0.1:
                body[self.rng.choice([*body, "seed", "stop", "tools", "unknown"])] = self.rng.choice(JUNK)
            self.add(body)

    def add(self, body: Any) -> None:
        try:
            self.waiting.append(json.dumps(body).encode())
        except (TypeError, ValueError):
            return
        if len(self.waiting) >= AT_ONCE:
            self.flush()

    def flush(self) -> None:
        async def ask_all() -> list[tuple[int, bytes]]:
            return await asyncio.gather(*(call(self.running.app, self.path, raw) for raw in self.waiting))

        for raw, (status, said) in zip(self.waiting, self.runner.run(ask_all()), strict=True):
            assert status in (200, 400, 413) and b'"server_error"' not in said, (self.path, raw, status, said[:500])
            self.statuses[status] += 1
        self.waiting.clear()
