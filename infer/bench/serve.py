"""Servers of OpenAI's API under load: streams that ask again at once, or random arrivals; several servers in turn.

    python -m infer.bench.serve --streams 1 4 16 64 --json serve.json --plot plots
    python -m infer.bench.serve --compare plain=http://127.0.0.1:8001/v1 domino=http://127.0.0.1:8000/v1

Token counts are the server's own (`usage`), and so is τ (its /metrics, before and after each round).
"""

import asyncio
import itertools
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from tyro.conf import DisallowNone

from convert.options import UNSET, Flag, check_count, check_file, check_real
from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError, end_process, run_command
from domino_jax.runtime.extras import require
from domino_jax.runtime.parsing import parse_json
from domino_jax.runtime.provenance import git_commit, processor
from infer.bench.load import PERCENTILES, TIMES, Endpoint, Load, Outcome, draw_lengths, round_figures, run_load
from infer.prompts import Prompt

URL = "http://127.0.0.1:8000/v1"
STREAMS = (1, 4, 16, 64)
REQUESTS_PER_STREAM = 4  # at least, so that most of a round runs at its load
MOST_WARMING = 64  # streams that warm a server up for an open loop

Round = dict[str, Any]  # the figures of one round
Rounds = dict[tuple[Load, str], list[Round]]  # by load and server


@dataclass(frozen=True)
class ServeLoad:
    """Measure servers of OpenAI's API under load."""

    url: str = URL
    """the server, with its /v1"""
    compare: Annotated[tuple[str, ...], UNSET] = ()
    """instead of --url, NAME=URL of several servers, which take turns; ratios are to the first"""
    api_key: Annotated[str | None, DisallowNone, UNSET] = None
    """sent to all of them"""
    model: Annotated[str | None, DisallowNone, UNSET] = None
    """the model to ask for; the default is the first that a server lists"""
    chat: Flag = False
    """ask for chat completions; prompts are then messages or text"""
    prompts: Annotated[Path | None, DisallowNone, UNSET] = None
    """JSON lines as for python -m infer; the default are the demo's own prompts, which are token ids"""
    new_tokens: tuple[int, int] = (8, 128)
    """shortest and longest limit of an answer; limits are drawn evenly on a logarithmic scale"""
    full_length: Flag = False
    """also send each limit as min_tokens, so that no answer ends before it"""
    temperature: float = 0.0
    """0 is greedy"""
    extra_body: Annotated[str | None, DisallowNone, UNSET] = None
    """a JSON object of more fields for each request, such as '{"top_p": 0.95}'"""
    streams: Annotated[tuple[int, ...], UNSET] = ()
    """closed loop: streams that each send a request when their last one has ended (default 1 4 16 64)"""
    rates: Annotated[tuple[float, ...], UNSET] = ()
    """open loop: requests a second, which arrive at random (Poisson) whether or not others have ended"""
    num_requests: int = 64
    """requests of a round; a closed loop sends at least four a stream"""
    rounds: int = 3
    """of each server at each load, in turn; figures are medians over them"""
    seed: int = 0
    """of lengths and arrivals, which are the same for all servers"""
    timeout: float = 600.0
    """seconds until a request counts as an error"""
    json: Annotated[Path | None, DisallowNone, UNSET] = None
    """file for the figures: a list of objects, one for each load and server"""
    plot: Annotated[Path | None, DisallowNone, UNSET] = None
    """folder for curves over streams and rates"""

    @property
    def servers(self) -> dict[str, str]:
        """Names and addresses, in turn."""
        pairs = [given.partition("=")[::2] for given in self.compare] or [("server", self.url)]
        return {name: url.rstrip("/") for name, url in pairs}

    @property
    def loads(self) -> list[Load]:
        """What is measured, one after another."""
        streams = self.streams or (() if self.rates else STREAMS)
        return [Load("closed", n) for n in streams] + [Load("open", rate) for rate in self.rates]

    @property
    def extra(self) -> dict[str, Any]:
        """More fields of each request."""
        return parse_json(self.extra_body or "{}")


def check_serve_load(options: ServeLoad) -> None:
    """Check the options before anything is sent.

    Raises:
        UsageError: they contradict each other, or a value is out of range.
        DominoError: a folder can't be written, or a package is missing.
    """
    from infer.bench.options import check_writable

    require("httpx", *(["matplotlib"] if options.plot else []))
    if options.compare and options.url != URL:
        raise UsageError("--url and --compare both name servers: leave one of them out.")
    named = all("=" in given.partition("://")[0] for given in options.compare)
    if not named or len(options.servers) < len(options.compare) or "" in options.servers:
        raise UsageError("--compare takes NAME=URL, each with a name of its own.")
    for name, url in options.servers.items():
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"the address of {name} begins with http:// or https://, found {url!r}.")
    if options.api_key and not (options.api_key.isascii() and options.api_key.isprintable()):
        raise UsageError("--api-key takes printable ASCII characters.")
    least, most = options.new_tokens
    if not 1 <= least <= most:
        raise UsageError("--new-tokens takes two lengths from 1 up, the shorter one first.")
    for name in ("num_requests", "rounds"):
        check_count(name, getattr(options, name))
    for streams in options.streams:
        check_count("streams", streams)
    check_count("seed", options.seed, least=0)
    for name, values in (("rates", options.rates), ("timeout", (options.timeout,))):
        for value in values:
            check_real(name, value, "above 0")
    check_real("temperature", options.temperature, "0 or more")
    if options.chat and options.prompts is None:
        raise UsageError("--chat needs --prompts FILE: the demo's own prompts are token ids.")
    try:
        if not isinstance(options.extra, dict):
            raise ValueError
    except ValueError:
        raise UsageError(f"--extra-body takes a JSON object, found {options.extra_body!r}.") from None
    check_file("json", options.json, options.prompts)
    if options.plot:
        check_writable(options.plot)


def make_bodies(options: ServeLoad, prompts: Iterable[Prompt], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """A request for each length, the prompts one after another.

    Raises:
        DominoError: a prompt is not of the kind that the requests take.
    """
    bodies = []
    for length, prompt in zip(lengths, prompts, strict=False):
        messages = prompt.messages or ([{"role": "user", "content": prompt.text}] if prompt.text else None)
        if options.chat and messages is None:
            raise DominoError(f"{prompt.where}: --chat takes messages or text, found input_ids.")
        if not options.chat and prompt.messages is not None:
            raise DominoError(f"{prompt.where} has messages, which only --chat sends.")
        limit = prompt.max_new_tokens or length
        body = {"messages": messages} if options.chat else {"prompt": prompt.ids or prompt.text}
        body |= {"tools": prompt.tools} if options.chat and prompt.tools else {}
        body |= {"min_tokens": limit} if options.full_length else {}
        bodies.append({**body, "max_tokens": limit, "temperature": options.temperature, **options.extra})
    return bodies


async def measure_servers(options: ServeLoad, rounds: Rounds, console: Console) -> None:
    """Measure all rounds of all loads, the servers in turn.

    Args:
        rounds: filled as rounds end, so that what was measured before an interruption or an error stays.

    Raises:
        DominoError: a server can't be reached, or answers nothing; prompts can't be read.
    """
    import httpx
    import numpy as np

    from convert.registry import DEMO_FOLDER
    from infer.prompts import read_prompts

    prompts = itertools.cycle(read_prompts(options.prompts or DEMO_FOLDER / "prompts.jsonl"))
    rng = np.random.default_rng(options.seed)
    path = "chat/completions" if options.chat else "completions"
    certificates = httpx.create_ssl_context()  # once, since it takes longer than a request

    def connect() -> httpx.AsyncClient:
        return httpx.AsyncClient(
            verify=certificates,
            headers={"Authorization": f"Bearer {options.api_key}"} if options.api_key else {},
            timeout=options.timeout,
            limits=httpx.Limits(keepalive_expiry=2.0),  # uvicorn lets go of an idle connection after 5 s
            mounts={f"all://{host}": None for host in ("127.0.0.1", "localhost", "[::1]")},  # never through a proxy
        )

    async with AsyncExitStack() as stack:
        servers = []
        for name, url in options.servers.items():
            server = Endpoint(name, url, connect, path, timeout=options.timeout)
            stack.push_async_callback(server.close)
            servers.append(await server.with_model(options.model))
        for load in options.loads:
            closed = load.loop == "closed"
            streams = int(load.value) if closed else max(1, min(MOST_WARMING, int(load.value)))
            counted = max(options.num_requests, REQUESTS_PER_STREAM * streams * closed)
            for number in range(options.rounds + 1):  # the first one warms up: it is short, and does not count
                count, how = (counted, load) if number else (streams, Load("closed", streams))
                bodies = make_bodies(options, prompts, draw_lengths(rng, options.new_tokens, count))
                gaps = list(rng.exponential(1 / load.value, count))
                for server in servers:
                    done = rounds.setdefault((load, server.name), []) if number else []
                    what = f"round {number} of {options.rounds}" if number else "warming up"
                    with console.status(f"{load}, {server.name}, {what}: {count} requests"):
                        await _measure_round(server, bodies, how, gaps, done)
                    last = done[-1]
                    if not number and not last["answered"]:
                        reason = next(iter(last["error_messages"]))
                        raise DominoError(f"{server.name} ({server.url}) answers no request: {reason}.")
                    rate = f"{last['tokens_per_second'] or 0:,.0f} tokens/s"
                    failed = f"{last['errors']} errors, {last['rejected']} times 429"
                    said = f"{load}, {server.name}, {what}: {last['answered']} of {count} answered, {rate}, {failed}"
                    console.print(said, highlight=False, markup=False, soft_wrap=True)


async def _measure_round(
    server: Endpoint, bodies: list[dict[str, Any]], load: Load, gaps: list[float], done: list[Round]
) -> None:
    """Add one round of one server to those done. One that is interrupted counts only where there is no other."""
    outcomes: dict[int, Outcome] = {}
    before, after, whole = await server.count_drafts(), None, False
    began = time.perf_counter()
    try:
        await run_load(server, bodies, load, gaps, outcomes)
        whole = True
    finally:
        seconds = time.perf_counter() - began
        if whole:
            after = await server.count_drafts()
        if whole or (outcomes and not done):
            about = {"model": server.model, "interrupted": not whole}
            about["texts"] = {place: outcome.text for place, outcome in outcomes.items() if not outcome.error}
            done.append(round_figures(list(outcomes.values()), seconds, before, after) | about)


def serve_rows(options: ServeLoad, rounds: Rounds) -> list[dict[str, Any]]:
    """A row for each load and server: medians over its rounds, sums of counts, ratios to the first server's rounds."""
    about = {"commit": git_commit(), "client": processor(), "chat": options.chat, "prompts": str(options.prompts or "")}
    names = "new_tokens", "full_length", "temperature", "extra_body", "seed"
    about |= {name: getattr(options, name) for name in names}
    first, rows = next(iter(options.servers)), []
    for (load, name), done in ((key, done) for key, done in rounds.items() if done):
        row = {**about, "server": name, "url": options.servers[name], "loop": load.loop}
        row |= {"streams" if load.loop == "closed" else "rate": load.value, "rounds": len(done)}
        row |= {key: done[0][key] for key in ("model", "interrupted")}
        for key in (key for key in done[0] if key not in row and key not in ("texts", "error_messages")):
            values = [each[key] for each in done if each[key] is not None]
            counted = values and isinstance(values[0], int)
            row[key] = sum(values) if counted else statistics.median(values) if values else None
        row["error_messages"] = dict(sum((Counter(each["error_messages"]) for each in done), Counter()))
        row["tokens_per_second_of_rounds"] = [each["tokens_per_second"] for each in done]
        pairs = list(zip(done, rounds.get((load, first), []), strict=False))
        for key in ("tokens_per_second", "tpot_ms_p50", "latency_ms_p50"):
            ratios = [ours[key] / theirs[key] for ours, theirs in pairs if ours[key] and theirs[key]]
            row[f"{key}_over_first"] = statistics.median(ratios) if ratios else None
        texts = [(ours["texts"], theirs["texts"]) for ours, theirs in pairs]
        same = [ours[place] == theirs[place] for ours, theirs in texts for place in ours.keys() & theirs.keys()]
        row["same_text_as_first"] = sum(same) / len(same) if same else None
        rows.append(row)
    return rows


def show_load(rows: list[dict[str, Any]], console: Console) -> None:
    """The figures as a table for people."""
    table = Table("load", "server", title="milliseconds as p50 / p95 / p99", title_justify="left")
    several = len({row["server"] for row in rows}) > 1
    for column in ("tokens/s", "requests/s", "to first token", "per token", "whole answer", "τ", "errors", "429"):
        table.add_column(column, justify="right")
    if several:
        table.add_column("tokens/s over first", justify="right")
    for row in rows:
        cells = [_cell(row[f"{name}_per_second"], form) for name, form in (("tokens", ",.0f"), ("requests", ",.2f"))]
        times = [[row[f"{name}_p{p}"] for p in PERCENTILES] for name in TIMES]
        cells += [" / ".join(_cell(ms, ",.0f" if ms and ms >= 100 else ".1f") for ms in three) for three in times]
        cells += [_cell(row["tau"], ".2f"), str(row["errors"]), str(row["rejected"])]
        cells += [_cell(row["tokens_per_second_over_first"], ".2f")] if several else []
        load = Load(row["loop"], row["streams"] if row["loop"] == "closed" else row["rate"])
        table.add_row(f"{load}{', interrupted' if row['interrupted'] else ''}", row["server"], *cells)
    console.print(table)
    for row in rows:
        for message, count in list(row["error_messages"].items())[:3]:
            console.print(f"{row['server']}: {count} × {message}", markup=False, soft_wrap=True)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def run_serve_load(options: ServeLoad) -> None:
    """Measure, print a table, draw and write the figures; Ctrl-C keeps what was measured."""
    check_serve_load(options)
    rounds: Rounds = {}
    try:
        asyncio.run(measure_servers(options, rounds, Console(stderr=True)))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise
    finally:
        rows = serve_rows(options, rounds)
        try:
            if rows:
                show_load(rows, Console(width=None if sys.stdout.isatty() else 160))
            if rows and options.plot:
                from infer.bench.plots import plot_load

                print(*(f"plot: {path}" for path in plot_load(rows, options.plot)), sep="\n")
        finally:
            if rows and options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")


def main(argv: Sequence[str] | None = None, prog: str = "python -m infer.bench.serve") -> int:
    """Run the command line; returns the exit code."""
    return run_command(ServeLoad, run_serve_load, argv, prog=prog)


if __name__ == "__main__":
    end_process(main())
