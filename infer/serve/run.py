"""Load, listen, and go down in order."""

import asyncio
import contextlib
import errno
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from rich.console import Console

from convert import options as shared
from convert.generation import recommended_sampling
from convert.loading import LoadedModel, load_model
from convert.progress import progress_bars
from domino_jax.decode import position_bytes
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.compile_cache import enable_compile_cache
from domino_jax.runtime.interrupts import note_signal
from domino_jax.runtime.paged_slots import Pages, plan_pages
from domino_jax.runtime.parsing import parse_bytes
from domino_jax.runtime.processes import ENDED_EARLY, among_others, code_of_others, join_processes
from domino_jax.sharding import row_shards
from infer.serve.app import Server
from infer.serve.connections import dropping
from infer.serve.followers import Follower, Leader
from infer.serve.metrics import ServingMetrics
from infer.serve.options import Serve
from infer.serve.requests import Service
from infer.serve.worker import Link, Worker

HEARTBEAT_SECONDS = 20  # of silence after which another process counts as gone
FOLLOW_SECONDS = 0.2  # between two looks at what other processes say


def log_line(line: str) -> None:
    """A line on standard error, with the time."""
    with contextlib.suppress(OSError):
        print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


class Listener(uvicorn.Server):
    """A server whose signals are ours: SIGTERM and Ctrl-C end it in order, a second one at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run_server(options: Serve, api_key: str | None) -> None:
    """Serve until a signal. Of several processes the first one has the clients.

    Raises:
        DominoError: the model can't be loaded, the port is taken, or another process has ended.
        KeyboardInterrupt: it was Ctrl-C.
    """
    first = join_processes(options.processes.resolve(), heartbeat=HEARTBEAT_SECONDS)
    enable_compile_cache()
    if not first:
        _follow(options)
        return
    leader = Leader(options) if among_others() else None
    with listening(options.host, options.port) as sock:  # known before a weight is read
        server = make_server(options, load_service(options), api_key, leader)
        worker = server.worker
        host, port = sock.getsockname()[:2]
        log_line(f"{server.service.name} at http://{host}:{port}/ (compiling; /health says when it is ready)")
        worker.start()
        interrupted = asyncio.run(_listen(server, worker, sock, options.shutdown_timeout, leader))
        if leader is not None:
            leader.interrupted = interrupted
        worker.stop()
    _end(worker, interrupted)


def _follow(options: Serve) -> None:
    """Decode what the first process decodes, until it ends. A signal is passed on to it, and a second one ends all.

    Raises:
        DominoError: the model can't be loaded, the options differ, or decoding has failed.
        KeyboardInterrupt: the first process had a Ctrl-C.
    """
    follower = Follower(options)
    follower.service = load_service(options, quiet=True)
    worker = _worker(options, follower.service, lambda line: None, lambda *_: None, follower)
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous, told = {number: signal.getsignal(number) for number in numbers}, False

    def note(number: int, _: Any) -> None:
        nonlocal told
        note_signal()
        told = True
        for each, handler in previous.items():
            signal.signal(each, handler)

    for number in numbers:
        signal.signal(number, note)
    worker.start()
    log_line("following the first process")
    while not worker.wait(FOLLOW_SECONDS):
        if told:
            told = False
            follower.ask_to_end()
    _end(worker, follower.interrupted)


def make_server(options: Serve, service: Service, api_key: str | None, link: Link | None = None) -> Server:
    """What answers requests; its worker is to be started."""
    metrics = ServingMetrics(service.name, service.loaded.configs.depth)
    return Server(
        service,
        _worker(options, service, log_line, metrics.seen, link),
        metrics,
        api_key=api_key,
        max_queue=options.max_queue,
        max_body=options.max_body,
        profile=options.profile,
        log=log_line,
    )


def load_service(options: Serve, quiet: bool = False) -> Service:
    """The model, and what requests are made for.

    Raises:
        DominoError: it can't be loaded.
    """
    console = Console(stderr=True, quiet=quiet)
    target, draft = shared.resolve(options.model, console)
    fixed = options.num_draft_tokens if isinstance(options.num_draft_tokens, int) else None
    with progress_bars(console) as progress:
        loaded = load_model(target, draft, options.model.device.dtype, progress, **options.model.plan(fixed))
    for warning in () if quiet else loaded.warnings:
        log_line(f"warning: {warning}")
    positions = min(options.max_model_len or loaded.configs.target.positions, loaded.configs.target.positions)
    defaults = recommended_sampling(target) if options.generation_config == "auto" else {}
    name = options.served_model_name or options.model.model
    pages = plan_memory(options, loaded, positions)
    if pages is not None:
        positions = min(positions, pages.longest(loaded.configs) - 1)
        if not quiet:
            log_line(describe_pages(pages, loaded))
    service = Service(loaded, name, defaults, positions, options.request_timeout, options.thinking, pages)
    threading.Thread(target=service.prepare_grammars, name="grammars", daemon=True).start()
    return service


def plan_memory(options: Serve, loaded: LoadedModel, positions: int) -> Pages | None:
    """The pages of all slots, each of so many positions at most; None for a contiguous cache.

    Raises:
        DominoError: they can't be had.
    """
    kv = options.kv
    with loaded.context():
        # Where there is no kernel pages are gathered, which on a CPU costs a fifth of the speed or more.
        slow = row_shards() > 1 or loaded.platform == "cpu"
        if kv.kv_cache == "contiguous" or (kv.kv_cache == "auto" and slow and not kv.asked):
            return None
        memory = parse_bytes(kv.kv_memory) if kv.kv_memory else None
        count = plan_pages(loaded.configs, loaded.dtype, options.max_num_seqs, positions, memory, kv.page_size)
    return Pages(count, kv.page_size, kv.enable_prefix_caching)


def _worker(options: Serve, service: Service, say: Any, seen: Any, link: Link | None) -> Worker:
    auto = options.num_draft_tokens == "auto"
    return Worker(service.loaded, options.max_num_seqs, auto, options.warm_up, say, seen, link, service.pages)


def _end(worker: Worker, interrupted: bool) -> None:
    """Raises: DominoError: decoding has ended by itself. KeyboardInterrupt: it was Ctrl-C."""
    if worker.failed is not None:
        if among_others() and code_of_others() is not None:
            raise DominoError(ENDED_EARLY)
        alone = "" if not among_others() else ", as it does when another process is gone"
        raise DominoError(f"decoding has ended{alone}: {first_line(worker.failed)}.")
    log_line("ended")
    if interrupted:
        raise KeyboardInterrupt


def describe_pages(pages: Pages, loaded: LoadedModel) -> str:
    """The memory for keys and values, in words."""
    tokens = pages.count * pages.size
    needed = tokens * position_bytes(loaded.configs, loaded.dtype) / (1 << 30)
    return (
        f"KV cache: {pages.count:,} pages of {pages.size} tokens, {tokens:,} tokens, {needed:.2f} GiB; "
        f"{tokens / 4096:.1f} requests of 4,096 tokens"
    )


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound.

    Raises:
        DominoError: it can't be.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = "is taken: give another with --port" if taken else f"can't be listened at: {first_line(error)}"
            raise DominoError(f"{host}:{port} {why}.") from None
        yield sock


async def _listen(
    server: Server, worker: Worker, sock: socket.socket, patience: float, leader: Leader | None = None
) -> bool:
    """Answer requests until a signal, then until the last answer or for so many seconds; whether it was Ctrl-C.

    Args:
        leader: of several processes; a signal to any of them counts, and so does the end of decoding.
    """
    config = uvicorn.Config(
        server.app(),
        http=dropping(server.service.timeout),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
        ws="none",
    )
    listener, loop, interrupted = Listener(config), asyncio.get_running_loop(), False
    ending = asyncio.Event()

    def end(number: int) -> None:
        nonlocal interrupted
        interrupted |= number == signal.SIGINT
        if ending.is_set():  # the second one: at once
            listener.force_exit = listener.should_exit = True
        ending.set()

    async def go_down() -> None:
        await ending.wait()
        server.draining = True
        until = time.monotonic() + patience
        if server.answering:
            log_line(f"going down: {server.answering} answers are being finished")
        while server.answering and time.monotonic() < until and not listener.force_exit:
            await asyncio.sleep(0.05)
        listener.should_exit = True

    async def announce() -> None:
        said = False
        while not (said and leader is None):
            await asyncio.sleep(FOLLOW_SECONDS if said else 0.05)
            if worker.ready.is_set() and not said:
                said = True
                log_line("ready")
            if worker.failed is not None or (leader is not None and leader.asked_to_end):
                ending.set()
                return

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    tasks = [asyncio.ensure_future(go_down()), asyncio.ensure_future(announce())]
    await listener.serve(sockets=[sock])
    for task in tasks:
        task.cancel()
    return interrupted
