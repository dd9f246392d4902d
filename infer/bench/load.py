"""A client that puts a server of OpenAI's API under load: streamed requests, their arrivals, and what they measure."""

import asyncio
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from domino_jax.errors import DominoError, first_line, one_line

TOO_MANY_REQUESTS = 429
PERCENTILES = (50, 95, 99)
TIMES = ("ttft_ms", "tpot_ms", "latency_ms")
# vLLM's counters, under whatever prefix: drafted cycles of rows, and the drafts of them that were accepted.
DRAFTS, ACCEPTED = "spec_decode_num_drafts_total", "spec_decode_num_accepted_tokens_total"
LONGEST_WAIT = 60.0  # seconds that a stream waits after 429
SHOWN_CHARACTERS = 200  # of an error


class Load(NamedTuple):
    """How requests come: so many streams that ask again at once, or so many requests a second, at random."""

    loop: Literal["closed", "open"]
    value: float  # streams, or requests a second

    def __str__(self) -> str:
        unit = "requests/s" if self.loop == "open" else "stream" if self.value == 1 else "streams"
        return f"{self.value:g} {unit}"


@dataclass(frozen=True)
class Outcome:
    """What became of one request; times are in seconds from its arrival."""

    seconds: float  # to the end
    first: float | None = None  # to the first text
    tokens: int = 0  # of the answer, by the server's usage
    prompt_tokens: int = 0
    text: str = ""
    status: int = 0  # of HTTP; 0 where no answer came
    error: str = ""  # why it has no whole answer
    wait: float = 0.0  # seconds until it may ask again, as a server says that is full


@dataclass(frozen=True)
class Endpoint:
    """A server of OpenAI's API, and how it is asked."""

    name: str
    url: str  # with its /v1
    connect: Callable[[], Any]  # makes an httpx.AsyncClient
    path: str = "completions"  # or chat/completions
    model: str = ""
    timeout: float = 600.0  # seconds that an answer may take
    idle: list[Any] = field(default_factory=list)  # clients without a request

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        """A client for one request at a time."""
        # One that 64 streams share looks through all its connections again and again, which took it seconds.
        client = self.idle.pop() if self.idle else self.connect()
        try:
            yield client
        finally:
            self.idle.append(client)

    async def get(self, url: str) -> Any:
        """The answer to a GET request."""
        async with self.client() as http:
            return await http.get(url)

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(client.aclose() for client in self.idle))

    async def with_model(self, model: str | None) -> "Endpoint":
        """The server with the model that it is asked for: this one, or the first that it lists.

        Raises:
            DominoError: it can't be reached, refuses, or lists none.
        """
        import httpx

        try:
            response = await self.get(f"{self.url}/models")
            if response.status_code == 200:
                return replace(self, model=model or str(response.json()["data"][0]["id"]))
            hint = "; give the address with its /v1" if response.status_code == 404 else ""
            problem = f"answers {response.status_code}: {_said(response.content)}{hint}"
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            problem = f"can't be reached: {_reason(error)}"
        except (ValueError, TypeError, LookupError):
            problem = "lists no model in OpenAI's form"
        raise DominoError(f"{self.url}/models {problem}.")

    async def ask(self, body: Mapping[str, Any], arrival: float | None = None) -> Outcome:
        """Send one request and read its stream to the end.

        Args:
            arrival: when it was due, by time.perf_counter(); now when None.
        """
        import httpx

        began = time.perf_counter() if arrival is None else arrival
        answer, status, error, wait = _Answer(began), 0, "", 0.0
        body = {"model": self.model, **body, "stream": True, "stream_options": {"include_usage": True}}
        try:
            url = f"{self.url}/{self.path}"
            within = asyncio.timeout(self.timeout)
            async with within, self.client() as http, http.stream("POST", url, json=body) as reply:
                status = reply.status_code
                if status != 200:
                    error = f"{status}: {_said(await reply.aread())}"
                    if status == TOO_MANY_REQUESTS and re.fullmatch(
                        r"\d+(\.\d+)?", reply.headers.get("retry-after", "")
                    ):
                        wait = min(float(reply.headers["retry-after"]), LONGEST_WAIT)
                else:
                    async for data in _events(reply):
                        answer.read(data)
                    error = answer.problem()
        except TimeoutError:
            error = f"no whole answer within {self.timeout:g} s"
        except httpx.HTTPError as problem:
            error = answer.error or _reason(problem)
        except (ValueError, TypeError, AttributeError, LookupError):
            error = "the stream is not in OpenAI's form"
        seconds = answer.seconds or time.perf_counter() - began
        return Outcome(seconds, answer.first, *answer.usage, "".join(answer.texts), status, error, wait)

    async def count_drafts(self) -> tuple[float, float] | None:
        """Drafted cycles and accepted drafts so far, by the server's /metrics; None where it has none."""
        import httpx

        try:
            response = await self.get(f"{self.url.removesuffix('/v1')}/metrics")
        except httpx.HTTPError:
            return None
        return read_counters(response.text) if response.status_code == 200 else None


def read_counters(text: str) -> tuple[float, float] | None:
    """Drafted cycles and accepted drafts of a page of Prometheus metrics, over all labels; None where it has none."""
    sums: dict[str, float] = defaultdict(float)
    for name, value in re.findall(r"^([\w:]+)(?:\{.*\})?[ \t]+([\d.eE+-]+)", text, re.MULTILINE):
        sums[next((ending for ending in (DRAFTS, ACCEPTED) if name.endswith(ending)), "")] += float(value)
    return (sums[DRAFTS], sums[ACCEPTED]) if {DRAFTS, ACCEPTED} <= sums.keys() else None


def _said(content: bytes) -> str:
    """What an answer other than 200 says: OpenAI's error message, or its text."""
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, TypeError, LookupError):
        message = content.decode(errors="replace")
    return one_line(" ".join(str(message).split())[:SHOWN_CHARACTERS].rstrip(".")) or "nothing"


def _reason(error: BaseException) -> str:
    """Why there was no answer; many of httpx's errors have no text."""
    return one_line(first_line(error)) if str(error) else type(error).__name__


async def _events(reply: Any) -> AsyncIterator[bytes]:
    r"""The data of server-sent events. A line ends at \n alone: JSON may hold other line separators."""
    rest = b""
    async for piece in reply.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
    if rest.startswith(b"data:"):
        yield rest[5:].strip()


class _Answer:
    """What is known of one request while its stream comes."""

    def __init__(self, began: float):
        self.began, self.error = began, ""
        self.first: float | None = None
        self.seconds = 0.0  # until [DONE]
        self.usage = (0, 0)  # tokens of answer and prompt
        self.texts: list[str] = []

    def read(self, data: bytes) -> None:
        """Take one event; raises what Python raises where it is not of OpenAI's form."""
        now = time.perf_counter() - self.began
        if data == b"[DONE]":
            self.seconds = now
            return
        chunk = json.loads(data)
        if chunk.get("error"):
            self.error = _said(data)
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            # Reasoning may come under two names, with the same text.
            names = ("content", "reasoning_content", "reasoning")
            text = choice.get("text") or next((delta[name] for name in names if delta.get(name)), "")
            self.texts.append(text)
            if self.first is None and (text or delta.get("tool_calls") or choice.get("finish_reason")):
                self.first = now
        if usage := chunk.get("usage"):
            self.usage = int(usage["completion_tokens"]), int(usage["prompt_tokens"])

    def problem(self) -> str:
        """Why the stream that has ended is no whole answer; empty where it is."""
        if self.error or not self.seconds:
            return self.error or "the stream ended before its [DONE]"
        return "" if self.usage[1] else "the stream has no usage"


def draw_lengths(rng: np.random.Generator, bounds: tuple[int, int], count: int) -> list[int]:
    """Lengths from the shortest to the longest, evenly on a logarithmic scale."""
    low, high = np.log(bounds[0]), np.log(bounds[1] + 1)
    return [min(int(n), bounds[1]) for n in np.exp(rng.uniform(low, high, count))]


async def run_load(
    server: Endpoint,
    bodies: Sequence[Mapping[str, Any]],
    load: Load,
    gaps: Sequence[float],
    outcomes: dict[int, Outcome],
) -> None:
    """Send the requests as the load says, and wait for all of them. None is sent twice.

    A stream that gets 429 waits as long as the server says before its next request.

    Args:
        gaps: seconds from each arrival to the next, for an open loop.
        outcomes: filled as requests end, by their place; what has ended before a cancellation stays.
    """

    async def ask(place: int, arrival: float | None = None) -> None:
        outcomes[place] = await server.ask(bodies[place], arrival)

    async def stream(places: Iterator[int]) -> None:
        for place in places:
            await ask(place)
            await asyncio.sleep(outcomes[place].wait)

    async with asyncio.TaskGroup() as group:
        if load.loop == "closed":
            places = iter(range(len(bodies)))  # one iterator, from which all streams take
            for _ in range(int(load.value)):
                group.create_task(stream(places))
            return
        arrival = time.perf_counter()
        for place, gap in enumerate(gaps):
            arrival += gap
            await asyncio.sleep(max(0.0, arrival - time.perf_counter()))
            group.create_task(ask(place, arrival))


def round_figures(
    outcomes: Sequence[Outcome], seconds: float, before: tuple[float, float] | None, after: tuple[float, float] | None
) -> dict[str, Any]:
    """The figures of one round; None where there is nothing to make them of.

    Args:
        seconds: of the whole round.
        before, after: the server's counters of drafted cycles and accepted drafts.
    """
    whole = [outcome for outcome in outcomes if not outcome.error]
    rejected = sum(outcome.status == TOO_MANY_REQUESTS for outcome in outcomes)
    tokens = sum(outcome.tokens for outcome in whole)
    cycles, accepted = (after[i] - before[i] if before and after else 0.0 for i in (0, 1))
    times: dict[str, list[float]] = {
        "ttft_ms": [1e3 * o.first for o in whole if o.first is not None],
        "tpot_ms": [1e3 * (o.seconds - o.first) / (o.tokens - 1) for o in whole if o.first and o.tokens > 1],
        "latency_ms": [1e3 * o.seconds for o in whole],
        # Where a server sends many tokens at once, this says more than the time after the first.
        "latency_per_token_ms": [1e3 * o.seconds / o.tokens for o in whole if o.tokens],
    }
    return {
        "requests": len(outcomes),
        "answered": len(whole),
        "rejected": rejected,
        "errors": len(outcomes) - len(whole) - rejected,
        "seconds": seconds,
        "tokens": tokens,
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in whole),
        "tokens_per_second": tokens / seconds if whole else None,
        "requests_per_second": len(whole) / seconds if whole else None,
        **{
            f"{name}_p{p}": float(np.percentile(values, p)) if values else None
            for name, values in times.items()
            for p in PERCENTILES
        },
        "tau": 1 + accepted / cycles if cycles > 0 and accepted >= 0 else None,
        "error_messages": dict(Counter(outcome.error for outcome in outcomes if outcome.error)),
    }
