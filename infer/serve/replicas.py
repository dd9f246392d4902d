"""Several servers of one model behind one address, by Ray Serve (extra `ray`).

    python -m infer.serve.replicas --replicas 2 --model qwen3-8b --resources GPU=1

Each replica is a whole server of its own. Requests that begin alike go to the same replica, whose caches may hold what
they begin with, as long as it has room; a replica that dies is started again, and the others go on meanwhile. The
header x-replica of an answer says who gave it. Ray calls its interface for choosing replicas alpha.
"""

import hashlib
import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

from tyro.conf import DisallowNone

from convert.options import GROUP, UNSET, check_count
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.command import UsageError, end_process, own_environment, run_command
from domino_jax.runtime.extras import require
from infer.serve.options import Serve

PREFIX = 256  # characters or ids of a prompt by which a replica is chosen; of a chat the first two messages count
TRIES = 4  # of a request of which nothing has been answered yet, where replicas die
HEALTH_SECONDS = 2.0
NO_CPUS, ROUTER = {"num_cpus": 0}, "infer.serve.behind_ray:PrefixRouter"


@dataclass(frozen=True)
class ServeReplicas:
    """Serve a model by several servers behind one address, with Ray Serve."""

    serve: Annotated[Serve, GROUP] = field(default_factory=Serve)
    replicas: int = 2
    """servers, each with the model"""
    resources: Annotated[str | None, DisallowNone, UNSET] = None
    """what Ray is to give each of them: GPU=1, or TPU=4"""


def check_replicas(options: ServeReplicas) -> None:
    """Refuse options that make no sense.

    Raises:
        UsageError: they don't.
    """
    options.serve.check()
    check_count("replicas", options.replicas)
    actor_options(options.resources)
    if options.serve.processes.resolve() is not None:
        raise UsageError("a replica is one process: leave --coordinator, --num-processes and --process-id out.")


def actor_options(resources: str | None) -> dict[str, Any]:
    """What Ray is to give a replica.

    Raises:
        UsageError: it is not of the form NAME=COUNT.
    """
    if resources is None:
        return {"num_cpus": 1}
    name, _, count = resources.partition("=")
    if not name.isidentifier() or not (count.isascii() and count.isdecimal() and 0 < len(count) < 5):
        raise UsageError(f"--resources is given as GPU=1 or TPU=4, found {resources[:80]!r}.")
    return {"num_gpus": int(count)} if name == "GPU" else {"resources": {name: int(count)}}


def prefix_of(body: bytes) -> str:
    """What a request's prompt begins with; empty where it has none."""
    try:
        asked = json.loads(body) if body else None
    except ValueError:
        return ""
    if not isinstance(asked, dict):
        return ""
    for name in ("messages", "prompt", "input"):
        begins = asked.get(name)
        if isinstance(begins, list) and begins and isinstance(begins[0], dict):
            return json.dumps(begins[:2], sort_keys=True)
        if isinstance(begins, str | list) and begins:
            begins = begins[0] if isinstance(begins[0], list | str) and isinstance(begins, list) else begins
            return json.dumps(begins[:PREFIX])
    return ""


def ranked(prefix: str, names: Sequence[str]) -> list[str]:
    """Replicas in the order in which a prefix tries them, which others' coming and going leaves as it is.

    Rendezvous hashing: a replica that dies hands its prefixes to all others alike.
    """
    return sorted(names, key=lambda name: hashlib.sha256(f"{prefix}\0{name}".encode()).digest())


def run_replicas(options: ServeReplicas) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        UsageError: the options make no sense.
        DominoError: Ray can't start the replicas.
    """
    check_replicas(options)
    require("starlette", "uvicorn", "prometheus_client", "ray")
    import ray  # pyright: ignore[reportMissingImports]
    from ray import serve  # pyright: ignore[reportMissingImports]
    from ray.serve.config import RequestRouterConfig  # pyright: ignore[reportMissingImports]

    from infer.serve.behind_ray import Ingress, Replica
    from infer.serve.run import log_line

    o, environment = options.serve, own_environment()
    room = o.max_num_seqs + o.max_queue  # requests of a replica, beyond which the next one is tried
    key = os.environ.get("DOMINO_API_KEY") if o.api_key is None else o.api_key
    ending: list[int] = []
    ray.init(
        address=os.environ.get("RAY_ADDRESS"),
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": environment["PYTHONPATH"]}},
    )
    try:
        serve.start(http_options={"host": o.host, "port": o.port})
        replica = serve.deployment(
            Replica,
            num_replicas=options.replicas,
            max_ongoing_requests=room,
            ray_actor_options=actor_options(options.resources),
            health_check_period_s=HEALTH_SECONDS,
            graceful_shutdown_timeout_s=o.shutdown_timeout,
            request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        )
        ingress = serve.deployment(
            Ingress,
            max_ongoing_requests=options.replicas * (o.max_num_seqs + o.max_queue),
            ray_actor_options={"num_cpus": 0},
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: ending.append(number))
        log_line(f"starting {options.replicas} replicas")
        try:
            serve.run(ingress.bind(replica.bind(o, key)), name="domino")
        except RuntimeError as error:
            raise DominoError(f"the replicas can't be started: {first_line(error)}.") from None
        log_line(f"ready: {options.replicas} replicas at http://{o.host}:{o.port}/")
        while not ending:
            time.sleep(0.2)
    finally:
        with suppress(Exception):
            serve.shutdown()
        ray.shutdown()
    log_line("ended")
    if signal.SIGINT in ending:
        raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None, prog: str = "python -m infer.serve.replicas") -> int:
    """Run the command line; returns the exit code."""
    return run_command(ServeReplicas, run_replicas, argv, prog=prog)


if __name__ == "__main__":
    end_process(main())
