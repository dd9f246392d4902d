"""Load, listen, and go down in order."""

import asyncio
import contextlib
import errno
import signal
import socket
import sys
import time
from collections.abc import Iterator

import uvicorn
from rich.console import Console

from convert import options as shared
from convert.generation import recommended_sampling
from convert.loading import load_model
from convert.progress import progress_bars
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.compile_cache import enable_compile_cache
from infer.serve.app import Server
from infer.serve.metrics import ServingMetrics
from infer.serve.options import Serve
from infer.serve.requests import Service
from infer.serve.worker import Worker


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
    """Serve until a signal.

    Raises:
        DominoError: the model can't be loaded, or the port is taken.
        KeyboardInterrupt: it was Ctrl-C.
    """
    enable_compile_cache()
    console = Console(stderr=True)
    with listening(options.host, options.port) as sock:  # known before a weight is read
        target, draft = shared.resolve(options.model, console)
        fixed = options.num_draft_tokens if isinstance(options.num_draft_tokens, int) else None
        with progress_bars(console) as progress:
            how = options.model.plan(fixed)
            loaded = load_model(target, draft, options.model.device.dtype, progress, **how)
        for warning in loaded.warnings:
            log_line(f"warning: {warning}")
        positions = min(options.max_model_len or loaded.configs.target.positions, loaded.configs.target.positions)
        defaults = recommended_sampling(target) if options.generation_config == "auto" else {}
        name = options.served_model_name or options.model.model
        service = Service(loaded, name, defaults, positions, options.request_timeout, options.thinking)
        metrics = ServingMetrics(name, loaded.configs.proposals)
        worker = Worker(
            loaded, options.max_num_seqs, options.num_draft_tokens == "auto", options.warm_up, log_line, metrics.seen
        )
        server = Server(
            service,
            worker,
            metrics,
            api_key=api_key,
            max_queue=options.max_queue,
            max_body=options.max_body,
            profile=options.profile,
            log=log_line,
        )
        host, port = sock.getsockname()[:2]
        log_line(f"{name} at http://{host}:{port}/ (compiling; /health says when it is ready)")
        worker.start()
        interrupted = asyncio.run(_listen(server, worker, sock, options.shutdown_timeout))
        worker.stop()
    if worker.failed is not None:
        raise DominoError(f"decoding has ended: {first_line(worker.failed)}.")
    log_line("ended")
    if interrupted:
        raise KeyboardInterrupt


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


async def _listen(server: Server, worker: Worker, sock: socket.socket, patience: float) -> bool:
    """Answer requests until a signal, then until the last answer or for so many seconds; whether it was Ctrl-C."""
    config = uvicorn.Config(
        server.app(), log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1, ws="none"
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
        while not worker.ready.is_set():
            if worker.failed is not None:
                ending.set()
                return
            await asyncio.sleep(0.05)
        log_line("ready")

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    tasks = [asyncio.ensure_future(go_down()), asyncio.ensure_future(announce())]
    await listener.serve(sockets=[sock])
    for task in tasks:
        task.cancel()
    return interrupted
