"""A server in this process, and clients that are hard on one."""

import asyncio
import json
import random
import socket
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import jax.numpy as jnp
import openai
import uvicorn
from factory import BYTE_TARGET, good_pair, make_tokenizer

from convert.loading import LoadedModel
from domino_jax.runtime.paged_slots import Pages, plan_pages
from domino_jax.runtime.slots import Completion, Request, Slots
from domino_jax.sampling import SamplingParams
from infer.serve.app import Server
from infer.serve.connections import dropping
from infer.serve.metrics import ServingMetrics
from infer.serve.requests import Service
from infer.serve.worker import Worker
from infer.text import encode

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    "{% if tools %}[<tool_call> {% for t in tools %}{{ t.function.name }} {% endfor %}]{% endif %}"
    "<|im_start|>assistant:"
    "{% if enable_thinking is defined and enable_thinking %}<think>{% else %}<think></think>{% endif %}"
)
KEY = "a key"


def tiny_model() -> LoadedModel:
    """A target with a drafter that is often right, and a chat template."""
    target = replace(BYTE_TARGET, tie_word_embeddings=False, max_position_embeddings=512)
    pair = good_pair(target, 3, num_hidden_layers=1)
    return LoadedModel(pair.configs, pair.params, make_tokenizer(TEMPLATE), (), jnp.dtype("float32"), (), 0.0)


class Running:
    """A server in a thread of this process."""

    def __init__(self, loaded: LoadedModel, slots: int = 3, queue: int = 64, key: str | None = KEY, **more: Any):
        self.metrics, self.lines = ServingMetrics("tiny", loaded.configs.proposals), []
        pages = None
        if more.pop("paged", True):
            pages = Pages(plan_pages(loaded.configs, loaded.dtype, slots, loaded.configs.target.positions))
        self.worker = Worker(loaded, slots, False, 0, self.lines.append, self.metrics.seen, pages=pages)
        positions, patience = loaded.configs.target.positions, more.pop("patience", 60.0)
        self.service = Service(loaded, "tiny", more.pop("defaults", {}), positions, 600.0)
        self.server = Server(
            self.service,
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
        if "buffer" in more:  # bytes of an answer that the system holds for a client
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, more.pop("buffer"))
        assert not more
        self._sock.bind(("127.0.0.1", 0))
        self.port = self._sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(self.app, http=dropping(patience), log_level="warning", lifespan="off")
        self._uvicorn = uvicorn.Server(config)
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
        return httpx.post(self.url + path, json=body, headers=headers, timeout=300, **more)

    def get(self, path: str, key: str = KEY) -> httpx.Response:
        return httpx.get(self.url + path, headers={"Authorization": f"Bearer {key}"}, timeout=300)

    def is_idle(self, seconds: float = 20.0) -> bool:
        """Whether nothing waits, runs or is waited for, within so many seconds; and nothing is kept of what did."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not (self.worker.running or self.worker.waiting or self.server.answering or self.worker.usage):
                return not self.metrics._last
            time.sleep(0.02)
        return False


def solo(loaded: LoadedModel, text: str, **how: Any) -> Completion:
    """What the target says to a text, alone and without drafts."""
    params = SamplingParams(**{"max_tokens": 12, **how})
    one = Completion(Request(encode(loaded.tokenizer, text), params))
    lean = loaded.params.without_drafter, loaded.configs.without_drafter
    list(Slots(*lean, 1, loaded.dtype, processors=True).run([one]))
    return one


async def call(app: Any, path: str, raw: bytes) -> tuple[int, bytes]:
    """The status and the body that an ASGI application gives to a POST, without a socket."""
    asked, answered, status, said = False, asyncio.Event(), 0, bytearray()

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": raw, "more_body": False}
        await answered.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            said.extend(message.get("body", b""))
            if not message.get("more_body"):
                answered.set()

    headers = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {KEY}".encode())]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await app(scope, receive, send)
    return status, bytes(said)


CHAT = {"messages": [{"role": "user", "content": "hello"}]}
# What those who leave have asked for.
LEFT = [
    ("/v1/completions", {"prompt": "hello", "max_tokens": 400, "stream": True}),
    ("/v1/completions", {"prompt": "hello", "max_tokens": 60}),
    ("/v1/completions", {"prompt": ["a", "b" * 200], "max_tokens": 80, "n": 2, "stream": True, "logprobs": 5}),
    ("/v1/completions", {"prompt": "x", "max_tokens": 50, "structured_outputs": {"regex": "[a-z]{40}"}}),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 100, "stream": True, "temperature": 0.8}),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 40, "frequency_penalty": 0.5}),
    ("/v1/responses", {"input": "hello", "max_output_tokens": 100, "stream": True}),
    ("/tokenize", {"prompt": "hello " * 200}),
]


def raw_request(path: str, body: Any, key: str = KEY) -> bytes:
    """A POST as it goes over a connection."""
    said = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(said)}\r\n\r\n".encode() + said


@dataclass
class Storm:
    """Clients that ask and leave: in the middle of the request, of the wait, or of the answer."""

    port: int
    clients: int = 12
    patience: float = 0.15  # seconds on average, after which one leaves
    left: int = 0  # clients that have left
    statuses: dict[int, int] = field(default_factory=dict)  # of those that had an answer to begin with

    def blow(self, seconds: float, seed: int = 0) -> None:
        """Keep on for so many seconds."""
        rng, until = random.Random(seed), time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < until:
                await self._one(rng)

        async def all_of_them() -> None:
            await asyncio.gather(*(client() for _ in range(self.clients)))

        asyncio.run(all_of_them())

    async def _one(self, rng: random.Random) -> None:
        raw = raw_request(*rng.choice(LEFT))
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(raw if rng.random() < 0.8 else raw[: rng.randrange(len(raw))])
            said = b""
            try:
                async with asyncio.timeout(rng.expovariate(1 / self.patience)):
                    said = await reader.readline()
                    await reader.read()
            except TimeoutError:
                pass
            if said:
                status = int(said.split()[1])
                self.statuses[status] = self.statuses.get(status, 0) + 1
        except ConnectionError:
            pass
        finally:
            self.left += 1
            if rng.random() < 0.5:
                writer.transport.abort()
            else:
                writer.close()
