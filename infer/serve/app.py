"""The routes: OpenAI's API over a `Worker`."""

import asyncio
import base64
import hmac
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import jax
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from convert.tokenizer import decode, encode
from domino_jax.errors import DominoError
from domino_jax.runtime.parsing import parse_json
from domino_jax.runtime.slots import room_after
from infer.serve import fields, replies
from infer.serve.description import describe_api
from infer.serve.fields import BadRequest, check_body
from infer.serve.followers import Asked, make_job
from infer.serve.metrics import ServingMetrics
from infer.serve.requests import DEFAULT_TOKENS, Service, Total
from infer.serve.responses import ResponseStream, response_body, response_messages
from infer.serve.worker import Job, Update, Worker

PAGE = Path(__file__).parent / "page.html"
KEEP_ALIVE = 10.0  # seconds of silence after which a stream says that it is alive
JSON_TYPE = "application/json"


class Refused(Exception):
    """A request that gets another status than 200."""

    def __init__(self, status: int, sentence: str, kind: str, field: str | None = None, retry: int | None = None):
        super().__init__(sentence)
        self.status, self.kind, self.field, self.retry = status, kind, field, retry


class EventStream(StreamingResponse):
    """Server-sent events, with what is to be done when they have ended, even if not one of them was sent."""

    def __init__(self, events: AsyncGenerator[str], end: Callable[[], None]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._end = events, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()
            await self._events.aclose()


class Server:
    """Answers requests."""

    def __init__(
        self,
        service: Service,
        worker: Worker,
        metrics: ServingMetrics,
        *,
        api_key: str | None,
        max_queue: int,
        max_body: int,
        profile: Path | None,
        log: Callable[[str], None],
    ):
        self.service, self.worker, self.metrics = service, worker, metrics
        self.draining = False  # after SIGTERM: what runs is finished, nothing more is taken
        self._key, self._max_queue, self._max_body = api_key, max_queue, max_body
        self._profile, self._log = profile, log
        self._open: set[Job] = set()

    def app(self) -> Starlette:
        """The ASGI application."""
        post = {
            "/v1/completions": self.completions,
            "/v1/chat/completions": self.chat_completions,
            "/v1/responses": self.responses,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
            "/start_profile": self.start_profile,
            "/stop_profile": self.stop_profile,
        }
        get = {
            "/": self.page,
            "/health": self.health,
            "/metrics": self.show_metrics,
            "/v1/models": self.models,
            "/openapi.json": self.openapi,
        }
        routes = [Route(path, self._guarded(answer), methods=["POST"]) for path, answer in post.items()]
        routes += [Route(path, self._guarded(answer), methods=["GET"]) for path, answer in get.items()]
        return Starlette(routes=routes, exception_handlers={HTTPException: self._other_route})

    def _guarded(self, answer: Any) -> Any:
        """A route with the key checked, errors in OpenAI's form, a request id, and a line in the log."""

        async def route(request: HttpRequest) -> Response:
            began, identity = time.monotonic(), request.headers.get("x-request-id") or f"req-{secrets.token_hex(8)}"
            identity = "".join(c for c in identity if c.isprintable() and c.isascii())[:100]
            try:
                self._check_key(request)
                response = await answer(request)
            except Refused as error:
                response = self._refusal(error)
            except BadRequest as error:
                response = self._refusal(Refused(400, str(error), "invalid_request_error", error.field))
            except ClientDisconnect:
                response = Response(status_code=499)
            response.headers["x-request-id"] = identity
            if request.method == "POST":
                self._log(
                    f"{identity} {request.method} {request.url.path} {response.status_code} "
                    f"{(time.monotonic() - began) * 1e3:.0f} ms"
                )
            return response

        return route

    def _refusal(self, error: Refused) -> Response:
        self.metrics.refuse(error.status)
        headers = {} if error.retry is None else {"Retry-After": str(error.retry)}
        if error.status == 401:
            headers["WWW-Authenticate"] = 'Basic realm="API key as password"'
        body = replies.error(str(error), error.kind, error.field)
        return JSONResponse(body, status_code=error.status, headers=headers)

    def _other_route(self, request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        try:
            self._check_key(request)
        except Refused as refused:
            return self._refusal(refused)
        said = {404: f"there is no {request.url.path} here.", 405: f"{request.method} is not for {request.url.path}."}
        return self._refusal(
            Refused(error.status_code, said.get(error.status_code, str(error.detail)), "invalid_request_error")
        )

    def _check_key(self, request: HttpRequest) -> None:
        """Every route needs the key. A browser, which opens the page, sends it as a password."""
        if self._key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except ValueError:
                given = ""
        if scheme.lower() not in ("bearer", "basic") or not hmac.compare_digest(
            given.strip().encode(), self._key.encode()
        ):
            said = "this server needs its API key: send it as Authorization: Bearer KEY."
            raise Refused(401, said, "authentication_error")

    async def _body(self, request: HttpRequest, known: Mapping[str, fields.Field]) -> dict[str, Any]:
        """A request's body, checked."""
        if self.worker.failed is not None:
            raise Refused(500, "the server's decoding has ended; start it again.", "server_error")
        if self.draining:
            raise Refused(503, "the server is going down.", "server_error", retry=5)
        if not self.worker.ready.is_set():
            raise Refused(503, "the server is still compiling.", "server_error", retry=10)
        kind = request.headers.get("content-type", JSON_TYPE).partition(";")[0].strip().lower()
        if kind != JSON_TYPE:
            raise Refused(415, f"the body must be {JSON_TYPE}, found {kind[:60]!r}.", "invalid_request_error")
        found = bytearray()
        async for chunk in request.stream():
            found += chunk
            if len(found) > self._max_body:
                raise Refused(413, f"the body has more than {self._max_body} bytes.", "invalid_request_error")
        try:
            text = found.decode("utf-8")
            body = parse_json(text)
            if "\\ud" in text.lower():  # what has no UTF-8 could be neither tokenized nor said again
                json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadRequest("the body has half of a surrogate pair, which is no text.") from None
        except ValueError as error:
            raise BadRequest(f"the body is not JSON: {error}.") from None
        except RecursionError:
            raise BadRequest("the body is nested too deeply.") from None
        checked = check_body(body, known)
        self.service.check_model(checked)
        return checked

    # --- What takes no decoding ---

    async def page(self, request: HttpRequest) -> Response:
        if not PAGE.is_file():
            raise Refused(404, "there is no page.", "invalid_request_error")
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    async def health(self, request: HttpRequest) -> Response:
        if self.worker.failed is not None:
            return JSONResponse({"status": "failed"}, status_code=500)
        if self.draining or not self.worker.ready.is_set():
            return JSONResponse({"status": "draining" if self.draining else "compiling"}, status_code=503)
        return JSONResponse({"status": "ready"})

    async def show_metrics(self, request: HttpRequest) -> Response:
        return Response(self.metrics.text(self.worker), media_type="text/plain; version=0.0.4")

    async def models(self, request: HttpRequest) -> Response:
        service = self.service
        drafter = service.loaded.configs.drafter
        model = {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "domino-jax",
            "max_model_len": service.positions,
            "chat": service.is_chat,
            "thinking": service.is_chat and replies.has_switch(service.loaded.tokenizer),
            "thinking_default": service.thinking,
            "drafter": drafter.name if drafter else None,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def openapi(self, request: HttpRequest) -> Response:
        return JSONResponse(describe_api(self.service.name))

    async def tokenize(self, request: HttpRequest) -> Response:
        body = await self._body(request, fields.TOKENIZE)
        if ("prompt" in body) == ("messages" in body):
            raise BadRequest("give either prompt or messages.", "prompt")
        if "messages" in body:
            ids = self.service.chat_ids(body)[0]
        else:
            try:
                ids = encode(self.service.tokenizer(), body["prompt"]) if body["prompt"] else []
            except DominoError as error:
                raise BadRequest(str(error), "prompt") from None
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self.service.positions})

    async def detokenize(self, request: HttpRequest) -> Response:
        body = await self._body(request, fields.DETOKENIZE)
        if "tokens" not in body:
            raise BadRequest("tokens is missing.", "tokens")
        vocabulary = self.service.loaded.configs.target.vocab_size
        if any(token >= vocabulary for token in body["tokens"]):
            raise BadRequest(f"tokens must be below {vocabulary}.", "tokens")
        return JSONResponse({"prompt": decode(self.service.tokenizer(), body["tokens"])})

    async def start_profile(self, request: HttpRequest) -> Response:
        if self._profile is None:
            raise Refused(404, "start the server with --profile DIR to trace it.", "invalid_request_error")
        try:
            jax.profiler.start_trace(str(self._profile))
        except RuntimeError as error:
            raise BadRequest(f"no trace can begin: {error}.") from None
        return JSONResponse({"profile": str(self._profile)})

    async def stop_profile(self, request: HttpRequest) -> Response:
        try:
            jax.profiler.stop_trace()
        except RuntimeError as error:
            raise BadRequest(f"no trace can end: {error}.") from None
        return JSONResponse({"profile": str(self._profile)})

    # --- What takes decoding ---

    async def completions(self, request: HttpRequest) -> Response:
        body = await self._body(request, fields.COMPLETION)
        if "prompt" not in body:
            raise BadRequest("prompt is missing.", "prompt")
        if body.get("max_tokens") == 0 and not body.get("echo"):
            raise BadRequest("max_tokens 0 goes with echo: true, which gives the prompt.", "max_tokens")
        prompts, tokenizer = self.service.prompts(body["prompt"]), self.service.loaded.tokenizer
        jobs = []
        for prompt in prompts:
            limit = max(1, body.get("max_tokens", self._default_tokens(prompt)))  # 0 is for the prompt alone
            params = self.service.sampling(body, prompt, limit)
            for number in range(body.get("n", 1)):
                jobs.append(make_job(self.service, Asked(prompt, params, number, body)))
        begin = [replies.tokens_before(body, tokenizer, job.request.prompt) for job in jobs]
        head = replies.head("text_completion", f"cmpl-{secrets.token_hex(12)}", self.service.name)
        said, drafts = [len(text) for text in begin], [replies.DraftPieces(tokenizer) for _ in jobs]

        def choice(index: int, job: Job, update: Update, first: bool) -> dict[str, Any]:
            text = (begin[index] if first else "") + "".join(piece.text for piece in update.pieces)
            if first and job.scores:  # the prompt's before the answer's
                tokens, told = [*job.request.prompt, *update.tokens], [*job.prompt_logprobs, *update.logprobs]
                logprobs = replies.completion_logprobs(tokenizer, tokens, told)
            else:
                logprobs = replies.completion_logprobs(tokenizer, update.tokens, update.logprobs, said[index])
            said[index] += len(text)
            found = {"index": index, "text": text, "logprobs": logprobs}
            found["finish_reason"] = replies.finish_reason(job, False)
            if body.get("return_drafts"):
                found["drafts"] = drafts[index].add(update)
            if tokenizer is None:
                found["token_ids"] = update.tokens
            return found

        if body.get("stream"):
            return self._stream(request, jobs, body, head, choice)
        totals = await self._whole(request, jobs)
        choices = [choice(i, job, total.update, True) for i, (job, total) in enumerate(zip(jobs, totals, strict=True))]
        return JSONResponse({**head, "choices": choices, "usage": replies.usage(jobs)})

    def _default_tokens(self, prompt: Sequence[int]) -> int:
        return max(1, min(DEFAULT_TOKENS, room_after(prompt, self.service.positions)))

    async def chat_completions(self, request: HttpRequest) -> Response:
        body = await self._body(request, fields.CHAT)
        if "messages" not in body:
            raise BadRequest("messages is missing.", "messages")
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        prompt, in_reasoning = self.service.chat_ids(body)
        params = self.service.sampling(body, prompt, limit)
        jobs = [
            make_job(self.service, Asked(prompt, params, number, body, True, in_reasoning))
            for number in range(body.get("n", 1))
        ]
        tokenizer, called = self.service.loaded.tokenizer, [False] * len(jobs)
        drafts = [replies.DraftPieces(tokenizer) for _ in jobs]
        identity, kind = f"chatcmpl-{secrets.token_hex(12)}", "chat.completion"

        def choice(index: int, job: Job, update: Update, first: bool) -> dict[str, Any]:
            parts = replies.message_parts(update.pieces)
            called[index] |= "tool_calls" in parts
            found: dict[str, Any] = {"index": index}
            if body.get("stream"):
                found["delta"] = ({"role": "assistant"} if first else {}) | parts
            else:
                found["message"] = replies.whole_message(update.pieces)
            found["logprobs"] = replies.chat_logprobs(tokenizer, update.tokens, update.logprobs)
            found["finish_reason"] = replies.finish_reason(job, called[index])
            if body.get("return_drafts"):
                found["drafts"] = drafts[index].add(update)
            return found

        if body.get("stream"):
            return self._stream(request, jobs, body, replies.head(f"{kind}.chunk", identity, self.service.name), choice)
        totals = await self._whole(request, jobs)
        choices = [choice(i, job, total.update, True) for i, (job, total) in enumerate(zip(jobs, totals, strict=True))]
        head = replies.head(kind, identity, self.service.name)
        return JSONResponse({**head, "choices": choices, "usage": replies.usage(jobs)})

    async def responses(self, request: HttpRequest) -> Response:
        body = await self._body(request, fields.RESPONSE)
        if "input" not in body:
            raise BadRequest("input is missing.", "input")
        chat = {"messages": response_messages(body), **{k: v for k, v in body.items() if k == "chat_template_kwargs"}}
        prompt, in_reasoning = self.service.chat_ids(chat)
        params = self.service.sampling(body, prompt, body.get("max_output_tokens"))
        job = make_job(self.service, Asked(prompt, params, 0, body, True, in_reasoning))
        identity = secrets.token_hex(12)
        if body.get("stream"):
            stream = ResponseStream(identity, self.service.name, body)

            async def events() -> AsyncGenerator[str]:
                for event in stream.begin():
                    yield event
                async with aclosing(self._updates([job])) as updates:
                    async for _, update in updates:
                        if update is None:
                            yield ": still at work\n\n"
                            continue
                        for event in stream.failed(update.error) if update.error else stream.add(update.pieces):
                            yield event
                if not job.failed:
                    for event in stream.end(job):
                        yield event

            self._admit([job])
            return EventStream(events(), lambda: self._release([job]))
        (total,) = await self._whole(request, [job])
        return JSONResponse(response_body(identity, self.service.name, body, job, total.update.pieces))

    def _admit(self, jobs: list[Job]) -> None:
        """Take a request's answers, all or none.

        Raises:
            Refused: too many are waiting.
        """
        waiting, free = self.worker.waiting, self.worker.size - self.worker.running
        if waiting + len(jobs) > self._max_queue + max(0, free):
            raise Refused(
                429, f"{waiting} requests are waiting already; try again.", "rate_limit_error", retry=1 + waiting // 8
            )
        loop = asyncio.get_running_loop()
        for job in jobs:
            queue: asyncio.Queue[Update] = asyncio.Queue()

            def tell(update: Update, queue: asyncio.Queue[Update] = queue) -> None:
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(queue.put_nowait, update)

            job.tell, job.inbox = tell, queue
            self._open.add(job)
            self.worker.submit(job)

    async def _updates(self, jobs: list[Job]) -> AsyncGenerator[tuple[int, Update | None]]:
        """Every update of some answers, by their numbers, as they come; None when nothing has come for long.

        Whoever leaves it early ends the answers.
        """
        running = {i: asyncio.ensure_future(job.inbox.get()) for i, job in enumerate(jobs)}
        try:
            while running:
                done, _ = await asyncio.wait(running.values(), timeout=KEEP_ALIVE, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    yield 0, None
                for i in [i for i, task in running.items() if task in done]:
                    update = running.pop(i).result()
                    if update.error is None and update.finish_reason is None:
                        running[i] = asyncio.ensure_future(jobs[i].inbox.get())
                    yield i, update
        finally:
            for task in running.values():
                task.cancel()
            self._release(jobs)

    def _release(self, jobs: list[Job]) -> None:
        """Forget answers that nobody waits for any more, and end those that still run."""
        for job in jobs:
            if job in self._open:
                self._open.discard(job)
                self.worker.cancel(job)

    async def _whole(self, request: HttpRequest, jobs: list[Job]) -> list[Total]:
        """All that the answers give, unless the client leaves before.

        Raises:
            Refused: one of them failed.
            ClientDisconnect: the client has left.
        """
        self._admit(jobs)
        totals = [Total() for _ in jobs]

        async def collect() -> None:
            async with aclosing(self._updates(jobs)) as updates:
                async for i, update in updates:
                    if update is not None:
                        totals[i].add(update)

        async def leaves() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.ensure_future(collect()), asyncio.ensure_future(leaves())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise ClientDisconnect
            tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
        for total in totals:
            if isinstance(total.update.error, BadRequest):
                raise total.update.error
            if total.update.error:
                raise Refused(500, str(total.update.error), "server_error")
        return totals

    def _stream(
        self, request: HttpRequest, jobs: list[Job], body: Mapping[str, Any], head: dict[str, Any], choice: Any
    ) -> Response:
        """The answers as server-sent events."""
        with_usage = body.get("stream_options", {}).get("include_usage", False)

        async def events() -> AsyncGenerator[str]:
            begun: set[int] = set()
            async with aclosing(self._updates(jobs)) as updates:
                async for i, update in updates:
                    if update is None:
                        yield ": still at work\n\n"
                    elif update.error:
                        mine = isinstance(update.error, BadRequest)
                        yield event(
                            replies.error(str(update.error), "invalid_request_error" if mine else "server_error")
                        )
                        return
                    else:
                        found = choice(i, jobs[i], update, i not in begun)
                        begun.add(i)
                        yield event({**head, "choices": [found]} | ({"usage": None} if with_usage else {}))
            if with_usage:
                yield event({**head, "choices": [], "usage": replies.usage(jobs)})
            yield "data: [DONE]\n\n"

        self._admit(jobs)
        return EventStream(events(), lambda: self._release(jobs))

    @property
    def answering(self) -> int:
        """Answers that clients are waiting for."""
        return len(self._open)


def event(data: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data)}\n\n"
