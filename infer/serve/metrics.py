"""Figures for Prometheus, under the names that dashboards of vLLM read, with a prefix of their own."""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from infer.serve.worker import Job, Update, Worker

PREFIX = "domino:"
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class ServingMetrics:
    """Counts what the worker tells; `text` is what /metrics gives."""

    def __init__(self, model: str, most: int):
        """Args: most: draft tokens of a cycle at most."""
        self._registry = CollectorRegistry()

        def named(kind: Any, name: str, said: str, labels: tuple[str, ...] = (), **more: Any) -> Any:
            made = kind(PREFIX + name, said, ("model_name", *labels), registry=self._registry, **more)
            return made if labels else made.labels(model)

        self._model = model
        self.success = named(Counter, "request_success", "Requests that ended, by reason", ("finished_reason",))
        self.refused = named(Counter, "request_refused", "Requests that were refused, by status", ("status",))
        self.prompt = named(Counter, "prompt_tokens", "Prompt tokens")
        self.generation = named(Counter, "generation_tokens", "Generated tokens")
        self.drafts = named(Counter, "spec_decode_num_drafts", "Cycles with drafts")
        self.draft_tokens = named(Counter, "spec_decode_num_draft_tokens", "Draft tokens proposed")
        self.preempted = named(Counter, "num_preemptions", "Times that a request was set aside for want of memory")
        self.cached = named(Counter, "prefix_cache_hits", "Prompt tokens that an earlier request had run")
        self.accepted = named(Counter, "spec_decode_num_accepted_tokens", "Draft tokens accepted")
        self.by_place = named(
            Counter, "spec_decode_num_accepted_tokens_per_pos", "Draft tokens accepted, by their place", ("position",)
        )
        self.first = named(Histogram, "time_to_first_token_seconds", "Seconds to the first token", buckets=SECONDS)
        self.between = named(
            Histogram, "time_per_output_token_seconds", "Seconds of a token, over what a step gave", buckets=SECONDS
        )
        self.whole = named(Histogram, "e2e_request_latency_seconds", "Seconds of a request", buckets=SECONDS)
        self.running = named(Gauge, "num_requests_running", "Requests in a slot")
        self.waiting = named(Gauge, "num_requests_waiting", "Requests without a slot")
        self.slots = named(Gauge, "num_slots", "Slots")
        self.positions = named(Gauge, "slot_positions", "Positions that each slot has now")
        self.used = named(Gauge, "kv_cache_usage_perc", "Share of the KV cache that requests use")
        self._last: dict[Job, float] = {}
        for place in range(most):
            self.by_place.labels(model, str(place))

    def seen(self, job: Job, update: Update) -> None:
        """Note an update of a request."""
        now = time.monotonic()
        if update.tokens:
            if update.start == 0:
                self.first.observe(now - job.admitted)
                self.prompt.inc(len(job.request.prompt))
                self.cached.inc(job.reused)
            else:
                self.between.observe((now - self._last.get(job, job.admitted)) / len(update.tokens))
            self._last[job] = now
            self.generation.inc(len(update.tokens))
        for cycle in update.cycles:
            self.drafts.inc(1 if cycle.drafts else 0)
            self.draft_tokens.inc(len(cycle.drafts))
            self.accepted.inc(cycle.accepted)
            for place in range(cycle.accepted):
                self.by_place.labels(self._model, str(place)).inc()
        reason = "error" if update.error else update.finish_reason
        if reason is not None:
            self._last.pop(job, None)
            self.preempted.inc(job.preemptions)
            self.success.labels(self._model, reason).inc()
            self.whole.observe(now - job.admitted)

    def refuse(self, status: int) -> None:
        """Note a request that was refused."""
        self.refused.labels(self._model, str(status)).inc()

    def text(self, worker: Worker) -> bytes:
        """The page that Prometheus reads."""
        self.running.set(worker.running)
        self.waiting.set(worker.waiting)
        self.slots.set(worker.size)
        self.positions.set(worker.capacity)
        self.used.set(worker.usage)
        return generate_latest(self._registry)
