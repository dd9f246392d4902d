"""The load generator against a server whose answers are made up: only what travels is real."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx")
from infer.bench.load import Endpoint, Load, Outcome, draw_lengths, read_counters, round_figures
from infer.bench.serve import main

DELAY = 0.01  # seconds before the first text


class FakeServer:
    """Answers in OpenAI's form: two texts of half the tokens each, and says how many it ran at once."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.arrivals: list[float] = []
        self.running = self.most_running = 0
        self.key = ""
        self.metrics = True
        self.word = "wörd\u2028"  # a line separator, which ends no event
        self.break_off: dict[int, str] = {}  # by number of the request
        self.retry_after = "0"
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.headers.append(head)
        path = head.split()[1]
        size = next((int(line.split(":")[1]) for line in head.lower().split("\r\n") if "content-length" in line), 0)
        body = json.loads(await reader.readexactly(size)) if size else {}
        status, pieces = await self.answer(path, head, body)
        again = f"retry-after: {self.retry_after}\r\n" if status == 429 else ""
        writer.write(f"HTTP/1.1 {status} x\r\nconnection: close\r\n{again}\r\n".encode())
        async for piece in pieces:
            writer.write(piece)
            await writer.drain()
        writer.close()

    async def answer(self, path: str, head: str, body: dict[str, Any]) -> tuple[int, AsyncIterator[bytes]]:
        if self.key and f"Bearer {self.key}" not in head:
            return 401, whole({"error": {"message": "no such key"}})
        if path == "/v1/models":
            return 200, whole({"data": [{"id": "made-up"}]})
        if path == "/metrics":
            cycles = len(self.bodies)
            text = f'# HELP x\nd:spec_decode_num_drafts_total{{a="}}"}} {cycles}\n'
            text += f"d:spec_decode_num_accepted_tokens_total{{}} {2.5 * cycles}\n"
            return (200, whole(text)) if self.metrics else (404, whole("none"))
        if not path.startswith("/v1/"):
            return 404, whole("no such page")
        number = len(self.bodies)
        self.bodies.append({"path": path, **body})
        self.arrivals.append(time.monotonic())
        how = self.break_off.get(number, "")
        if how in ("429", "500"):
            return int(how), whole({"error": {"message": "queue full" if how == "429" else "broken"}})
        return 200, self.stream(path, body, how)

    async def stream(self, path: str, body: dict[str, Any], how: str) -> AsyncIterator[bytes]:
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            yield b": keep-alive\n\n"
            if how == "form":
                yield b"data: {]\n\n"
            if how == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(0.2)
            if how == "silent":
                await asyncio.sleep(2)
            await asyncio.sleep(DELAY)
            for end in (None, "length"):
                part = {"delta": {"reasoning": self.word, "reasoning_content": self.word}} if "chat" in path else {}
                yield event({"choices": [{"index": 0, "text": self.word, **part, "finish_reason": end}]})
                if how == "error":
                    yield event({"error": {"message": "the device failed"}})
                if how in ("cut", "error"):
                    return
                await asyncio.sleep(DELAY)
            if how != "no usage":
                usage = {"completion_tokens": body["max_tokens"], "prompt_tokens": 3}
                yield event({"choices": [], "usage": usage})
            yield b"data: [DONE]\r\n\r\n"
        finally:
            self.running -= 1


def event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


async def whole(value: Any) -> AsyncIterator[bytes]:
    yield (value if isinstance(value, str) else json.dumps(value)).encode()


@contextmanager
def running(server: FakeServer) -> Iterator[FakeServer]:
    loop, ready = asyncio.new_event_loop(), threading.Event()

    async def serve() -> None:
        listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
        server.port = listening.sockets[0].getsockname()[1]
        ready.set()

    def run() -> None:
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    yield server
    loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
    loop.call_soon_threadsafe(lambda: loop.call_soon(loop.stop))
    thread.join(10)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running(FakeServer()) as it:
        yield it


def measure(tmp_path: Path, *words: str, code: int = 0) -> list[dict[str, Any]]:
    """The rows of a run that ends with the exit code."""
    path = tmp_path / "load.json"
    assert main([*words, "--json", str(path)]) == code
    return json.loads(path.read_text()) if path.exists() else []


def test_figures_of_a_round_are_those_of_numpy_and_leave_failed_requests_out():
    outcomes = [Outcome(0.1 * n, 0.05 * n, tokens=n + 1, prompt_tokens=2, status=200) for n in range(1, 11)]
    outcomes += [Outcome(9.0, 8.0, 50, 2, "", 429, "429: full"), Outcome(9.0, error="refused"), Outcome(0.1, error="x")]
    found = round_figures(outcomes, 2.0, (10, 5), (14, 15))
    assert (found["requests"], found["answered"], found["rejected"], found["errors"]) == (13, 10, 1, 2)
    assert (found["tokens"], found["tokens_per_second"], found["requests_per_second"]) == (65, 32.5, 5)
    assert found["ttft_ms_p50"] == pytest.approx(275) and found["ttft_ms_p95"] == pytest.approx(477.5)
    assert found["latency_ms_p99"] == pytest.approx(991) and found["tpot_ms_p99"] == pytest.approx(50)
    assert found["tau"] == 3.5
    assert found["error_messages"] == {"429: full": 1, "refused": 1, "x": 1}


def test_a_round_without_an_answer_or_a_draft_has_no_figures():
    found = round_figures([Outcome(1.0, error="refused")], 1.0, (10, 5), (10, 5))
    assert (found["tau"], found["ttft_ms_p50"], found["tokens_per_second"]) == (None, None, None)
    one = round_figures([Outcome(1.0, 0.5, tokens=1, prompt_tokens=1, status=200)], 1.0, None, (10, 5))
    assert (one["tau"], one["tpot_ms_p50"], one["latency_ms_p50"]) == (None, None, 1000)
    restarted = round_figures([], 1.0, (10, 5), (3, 1))
    assert restarted["tau"] is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("vllm:spec_decode_num_drafts_total 4\nvllm:spec_decode_num_accepted_tokens_total 1e1\n", (4, 10)),
        (
            'a_spec_decode_num_drafts_total{e="0",m="} 9"} 1.0\na_spec_decode_num_drafts_total{e="1"} 2.0 1712\n'
            "a_spec_decode_num_accepted_tokens_total 5\na_spec_decode_num_accepted_tokens_per_pos_total 7",
            (3, 5),
        ),
        ("# TYPE a_spec_decode_num_drafts_total counter\nrequests_total 4\n", None),
        ("spec_decode_num_drafts_total 4\n", None),
        ("<html>", None),
    ],
)
def test_acceptance_is_read_from_counters_under_any_prefix(text, found):
    assert read_counters(text) == found


def test_lengths_are_drawn_within_their_bounds():
    import numpy as np

    lengths = draw_lengths(np.random.default_rng(0), (8, 128), 2000)
    assert (min(lengths), max(lengths)) == (8, 128)
    assert 28 < np.median(lengths) < 37  # 32 is in the middle of a logarithmic scale
    assert draw_lengths(np.random.default_rng(0), (5, 5), 3) == [5, 5, 5]


def test_a_closed_loop_keeps_its_streams_busy(tmp_path, server, capsys):
    words = (
        "--url",
        server.url,
        "--streams",
        "1",
        "5",
        "--num-requests",
        "6",
        "--rounds",
        "1",
        "--new-tokens",
        "2",
        "9",
    )
    one, five = measure(tmp_path, *words, "--plot", str(tmp_path / "plots"))
    assert server.most_running == 5
    assert (one["requests"], five["requests"]) == (6, 20)  # at least four a stream
    for row in (one, five):
        assert (row["answered"], row["errors"], row["rejected"], row["tau"]) == (row["requests"], 0, 0, 3.5)
        assert row["ttft_ms_p50"] >= 1e3 * DELAY and row["latency_ms_p50"] > row["ttft_ms_p50"] + 1e3 * DELAY
        assert (row["model"], row["server"], row["loop"]) == ("made-up", "server", "closed")
    assert one["seconds"] >= 6 * 2 * DELAY
    assert five["requests_per_second"] > 1.5 * one["requests_per_second"]
    counted = [body["max_tokens"] for body in server.bodies]
    assert one["tokens"] == sum(counted[1:7]) and five["tokens"] == sum(counted[12:])
    body = server.bodies[0]
    assert body["stream"] and body["stream_options"] == {"include_usage": True} and body["temperature"] == 0
    assert body["path"] == "/v1/completions" and isinstance(body["prompt"][0], int) and "min_tokens" not in body
    assert (tmp_path / "plots" / "streams.png").exists()
    out, err = capsys.readouterr()
    assert "5 streams" in out and "3.50" in out and "streams.png" in out
    assert "round 1 of 1: 20 of 20 answered" in err and "round" not in out


def test_an_open_loop_does_not_wait_for_answers(tmp_path, server):
    server.metrics = False
    words = ("--url", server.url, "--rates", "200", "--num-requests", "60", "--rounds", "1", "--full-length")
    (row,) = measure(tmp_path, *words, "--seed", "3")
    assert (row["answered"], row["loop"], row["rate"], row["tau"]) == (60, "open", 200, None)
    assert "streams" not in row
    arrivals = server.arrivals[-60:]
    assert 0.15 < arrivals[-1] - arrivals[0] < 3  # 0.3 s by the rate, later where the machine is slow
    gaps = sorted(b - a for a, b in pairwise(arrivals))
    assert gaps[-1] > 2 * gaps[len(gaps) // 2]  # at random, not evenly
    assert all(body["min_tokens"] == body["max_tokens"] for body in server.bodies)


def test_failures_are_counted_by_their_kind(tmp_path, server, capsys):
    kinds = ["429", "429", "500", "form", "cut", "error", "no usage", "silent"]
    server.break_off = dict(enumerate(kinds, start=2))  # behind those that warm up
    words = ("--url", server.url, "--streams", "2", "--num-requests", "20", "--rounds", "1", "--timeout", "1.2")
    (row,) = measure(tmp_path, *words)
    assert (row["requests"], row["answered"], row["rejected"], row["errors"]) == (20, 12, 2, 6)
    assert row["error_messages"] == {
        "429: queue full": 2,
        "500: broken": 1,
        "the stream is not in OpenAI's form": 1,
        "the stream ended before its [DONE]": 1,
        "the device failed": 1,
        "the stream has no usage": 1,
        "no whole answer within 1.2 s": 1,
    }
    assert "queue full" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("retry_after", "least", "most"), [("0.5", 0.5, 3.0), ("Fri, 27 Nov 2026 23:00:00 GMT", 0.0, 0.45), ("..", 0, 0.45)]
)
def test_a_stream_that_is_refused_waits_before_its_next_request(tmp_path, server, retry_after, least, most):
    server.break_off, server.retry_after = {2: "429"}, retry_after
    words = ("--url", server.url, "--streams", "1", "--num-requests", "4", "--rounds", "1")
    (row,) = measure(tmp_path, *words)
    assert (row["answered"], row["rejected"], len(server.bodies)) == (3, 1, 5)
    assert least <= server.arrivals[3] - server.arrivals[2] < most


def test_servers_take_turns_and_are_compared_with_the_first(tmp_path, server, capsys):
    with running(FakeServer()) as other:
        other.word = "other"
        words = ("--compare", f"a={server.url}", f"b={other.url}/", "--streams", "2", "--num-requests", "8")
        a, b = measure(tmp_path, *words, "--rounds", "2", "--extra-body", '{"top_p": 0.9}')
    parts = slice(0, 2), slice(2, 10), slice(10, 18)  # the warm-up and two rounds; two streams may overtake each other
    ours, theirs = ([sorted(map(json.dumps, it.bodies[part])) for part in parts] for it in (server, other))
    assert ours == theirs
    assert len({str(body["prompt"]) for body in server.bodies}) == 18  # no round repeats what a cache may hold
    assert server.arrivals[2] < other.arrivals[2] < server.arrivals[10] < other.arrivals[10]
    assert server.bodies[0]["top_p"] == 0.9
    assert (a["tokens_per_second_over_first"], a["same_text_as_first"]) == (1, 1)
    assert 0.2 < b["tokens_per_second_over_first"] < 5 and b["same_text_as_first"] == 0
    assert (b["rounds"], b["requests"], len(b["tokens_per_second_of_rounds"])) == (2, 16, 2)
    assert "over first" in " ".join(capsys.readouterr().out.split())


def test_a_chat_sends_messages_and_its_key(tmp_path, server):
    server.key = "s3cret"
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "Hi"}, {"messages": [{"role": "user", "content": "Ho"}], "max_new_tokens": 2}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--url", server.url, "--chat", "--prompts", str(prompts), "--streams", "1", "--num-requests", "4")
    (row,) = measure(tmp_path, *words, "--api-key", "s3cret", "--rounds", "1")
    assert row["answered"] == 4 and "s3cret" not in json.dumps(row)
    first, second = server.bodies[:2]
    assert first["path"] == "/v1/chat/completions" and first["messages"] == [{"role": "user", "content": "Hi"}]
    assert second["messages"][0]["content"] == "Ho" and second["max_tokens"] == 2
    assert all("Bearer s3cret" in head for head in server.headers)


def test_ctrl_c_keeps_the_rounds_that_ended(tmp_path, server, capsys):
    server.break_off = {1 + 6 + 3: "interrupt"}  # in the second round
    words = ("--url", server.url, "--streams", "1", "--num-requests", "6")
    (row,) = measure(tmp_path, *words, code=130)
    assert (row["rounds"], row["answered"], row["interrupted"]) == (1, 6, False)
    out, err = capsys.readouterr()
    assert "1 stream " in out and err.endswith("interrupted\n")


def test_ctrl_c_in_the_only_round_keeps_its_answers(tmp_path, server, capsys):
    server.break_off = {2 + 5: "interrupt"}
    (row,) = measure(tmp_path, "--url", server.url, "--streams", "2", "--num-requests", "40", code=130)
    assert (row["rounds"], row["interrupted"]) == (1, True) and 3 <= row["answered"] <= 5
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--api-key", "wrong"], "/v1/models answers 401: no such key."),
        (["--chat", "--prompts", "ids.jsonl"], "ids.jsonl, line 1: --chat takes messages or text, found input_ids."),
        (["--prompts", "messages.jsonl"], "messages.jsonl, line 1 has messages, which only --chat sends."),
        (["--url", "http://127.0.0.1:9/v1"], "http://127.0.0.1:9/v1/models can't be reached:"),
        (["--url", "http://127.0.0.1:x/v1"], "http://127.0.0.1:x/v1/models can't be reached: Invalid port: 'x'."),
        (["--url", "{root}"], "/models answers 404: no such page; give the address with its /v1."),
    ],
)
def test_what_can_not_be_measured_is_one_sentence(tmp_path, monkeypatch, server, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    Path("ids.jsonl").write_text('{"input_ids": [1, 2]}\n')
    Path("messages.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    server.key = "right" if "--api-key" in words else ""
    words = [word.replace("{root}", server.url.removesuffix("/v1")) for word in words]
    assert main([*(() if "--url" in words else ("--url", server.url)), *words]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and says in err


def test_a_server_that_answers_nothing_ends_the_run_with_its_reason(server, capsys):
    server.break_off = dict.fromkeys(range(100), "500")
    assert main(["--url", server.url, "--streams", "2"]) == 1
    assert f"server ({server.url}) answers no request: 500: broken." in capsys.readouterr().err


def test_a_load_is_said_in_words():
    assert [str(load) for load in (Load("closed", 4), Load("closed", 1), Load("open", 2.5))] == [
        "4 streams",
        "1 stream",
        "2.5 requests/s",
    ]


def test_a_client_has_one_request_at_a_time_and_is_used_again():
    """One that all requests share takes longer for each than most servers do."""
    server = Endpoint("a", "http://127.0.0.1:9/v1", connect=object)

    async def use() -> None:
        async with server.client() as one, server.client() as other:
            assert one is not other
        async with server.client() as again:
            assert again in (one, other)
        assert len(server.idle) == 2

    asyncio.run(use())
