"""What Ray Serve runs: servers of a model, what takes requests for them, and which of them gets each."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
from ray.serve.request_router import RequestRouter  # pyright: ignore[reportMissingImports]
from starlette.responses import JSONResponse, StreamingResponse

from domino_jax.errors import first_line
from domino_jax.runtime.compile_cache import enable_compile_cache
from infer.serve.options import Serve
from infer.serve.replicas import TRIES, prefix_of, ranked
from infer.serve.run import load_service, make_server

WAIT_SECONDS = 0.5  # before another replica is tried, and then longer


class Replica:
    """A server whose requests come through Ray."""

    def __init__(self, options: Serve, api_key: str | None):
        """Loads the model and compiles; Ray sends requests when that is done."""
        enable_compile_cache()
        self._server = make_server(options, load_service(options, quiet=True), api_key)
        self._app, self._name = self._server.app(), f"{socket.gethostname()}-{os.getpid()}"
        self._server.worker.start()
        self._server.worker.ready.wait()
        self.check_health()

    def check_health(self) -> None:
        """Raises: RuntimeError: decoding has ended, and Ray is to start another replica."""
        if self._server.worker.failed is not None:
            raise RuntimeError(f"decoding has ended: {first_line(self._server.worker.failed)}")

    async def answer(self, scope: dict[str, Any], body: bytes, prefix: str, turn: int) -> AsyncIterator[Any]:
        """First the status and headers of the answer, then its body in pieces, as they come.

        Args:
            scope: ASGI's, of the request.
            prefix, turn: by which this replica was chosen.
        """
        said: asyncio.Queue[Any] = asyncio.Queue()
        left, given = asyncio.Event(), False

        async def receive() -> dict[str, Any]:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(scope, receive, said.put)
            finally:
                await said.put(None)

        task = asyncio.ensure_future(run())
        try:
            while (message := await said.get()) is not None:
                if message["type"] == "http.response.start":
                    headers = [(name.decode(), value.decode()) for name, value in message["headers"]]
                    yield message["status"], [*headers, ("x-replica", self._name)]
                elif message.get("body"):
                    yield message["body"]
            await task
        finally:
            left.set()
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


class Ingress:
    """Takes requests from clients and gives them to replicas."""

    def __init__(self, replicas: Any):
        """Args: replicas: Ray's handle of the deployment of `Replica`."""
        self._answer = replicas.options(stream=True).answer

    async def __call__(self, request: Any) -> Any:
        """The answer of a replica; of another one where a replica dies before it has said anything."""
        body, headers = await request.body(), [tuple(pair) for pair in request.scope["headers"]]
        names = ("type", "http_version", "method", "path", "raw_path", "root_path", "query_string", "scheme")
        scope = {name: request.scope[name] for name in names if name in request.scope}
        scope |= {"headers": headers, "client": None, "server": None, "asgi": {"version": "3.0"}}
        prefix = prefix_of(body)
        why = ""
        for turn in range(TRIES):
            if turn:
                await asyncio.sleep(turn * WAIT_SECONDS)  # Ray notices that it is gone
            pieces = self._answer.remote(scope, body, prefix=prefix, turn=turn)
            try:
                status, head = await anext(pieces)
            except RayError as error:
                why = first_line(error)
                continue
            response = StreamingResponse(pieces, status_code=status)
            response.raw_headers = [(name.encode(), value.encode()) for name, value in head]
            return response
        said = {"error": {"message": f"no replica answers: {why}.", "type": "server_error"}}
        return JSONResponse(said, status_code=503, headers={"Retry-After": "5"})


class PrefixRouter(RequestRouter):
    """The replicas in the order of `ranked`, of which Ray takes the first that has room; in another turn the next."""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Ranks of replicas, the first one first."""
        asked = pending_request.kwargs if pending_request is not None else {}
        if not asked.get("prefix"):
            return [candidate_replicas]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        names = ranked(asked["prefix"], list(by_name))
        turn = asked["turn"] % max(1, len(names))
        return [[by_name[name]] for name in [*names[turn:], *names[:turn]]]
