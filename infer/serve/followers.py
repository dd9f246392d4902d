"""A model over several processes behind one server: the first has the clients, the others follow it.

All of them run the same `Slots`, whose programs wait for each other. So before each step the first process tells the
others what it admits and evicts, and every process does that in the same order. What else decides (stop strings,
grammars, the times that drafts are chosen by) each works out alike.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from domino_jax.errors import DominoError
from domino_jax.runtime.processes import Messages, publish, read_published
from domino_jax.sampling import SamplingParams
from infer.serve.options import Serve
from infer.serve.requests import Service
from infer.serve.worker import Command, Job

PROMPTS = ("prompt", "messages", "input")  # fields of a body that only the prompt's ids are made of
ENDING = "serve/ending"
WAIT_SECONDS = 1.0  # after which a follower that hears nothing waits again
# Options that only the first process reads, and those that may differ by place.
OWN = {"host", "port", "api_key", "served_model_name", "max_queue", "max_body", "request_timeout", "shutdown_timeout"}
OWN |= {"generation_config", "profile", "processes", "model", "draft", "draft_revision"}


class Asked(NamedTuple):
    """Of what an answer is made."""

    prompt: Sequence[int]
    params: SamplingParams
    number: int  # of the request's answers, from 0 on
    body: Mapping[str, Any]
    chat: bool = False
    in_reasoning: bool = False  # the prompt has opened the thoughts

    def to_json(self) -> dict[str, Any]:
        """As it is sent."""
        body = {name: value for name, value in self.body.items() if name not in PROMPTS}
        return self._asdict() | {"params": dataclasses.asdict(self.params), "body": body}

    @classmethod
    def from_json(cls, sent: Mapping[str, Any]) -> "Asked":
        """As it was sent."""
        params = dict(sent["params"])
        params["stop_token_ids"] = tuple(params["stop_token_ids"])
        params["logit_bias"] = tuple(map(tuple, params["logit_bias"]))
        return cls(**{**sent, "params": SamplingParams(**params)})


def make_job(service: Service, asked: Asked) -> Job:
    """One answer to be decoded.

    Raises:
        BadRequest: something of the body can't be had.
    """
    text = service.text(asked.body, asked.chat, asked.in_reasoning)
    job = service.job(list(asked.prompt), asked.params, asked.number, text, asked.body)
    job.asked = asked
    return job


def alike(options: Serve) -> dict[str, Any]:
    """Those of the options that must be the same in all processes, by name."""
    values = dataclasses.asdict(options)
    values |= values["model"]["drafting"] | values["model"]["device"] | values.pop("kv")
    return {name: value for name, value in values.items() if name not in OWN}


class Leader:
    """The first process's `worker.Link`."""

    leads = True

    def __init__(self, options: Serve):
        """Tells the others how this process was started."""
        self._messages, self._admitted = Messages("serve/commands"), 0
        self._messages.send(json.dumps(alike(options)))
        self.interrupted = False  # what a stop says: whether it was Ctrl-C

    def exchange(self, commands: list[Command]) -> list[Command]:
        """Tell the others."""
        said: list[list[Any]] = []
        for what, job in commands:
            if job is None:
                said.append([what, self.interrupted])
            elif what == "admit":
                job.place, self._admitted = self._admitted, self._admitted + 1
                said.append([what, job.place, job.asked.to_json()])
            else:
                said.append([what, job.place])
        self._messages.send(json.dumps(said))
        return commands

    @property
    def asked_to_end(self) -> bool:
        """Whether another process has had a signal."""
        return bool(read_published(ENDING))


class Follower:
    """Another process's `worker.Link`."""

    leads = False

    def __init__(self, options: Serve):
        """Waits for the first process.

        Raises:
            DominoError: it was started with other options.
        """
        self._messages = Messages("serve/commands")
        self.service: Service | None = None  # to be set before the first exchange
        self._jobs: WeakValueDictionary[int, Job] = WeakValueDictionary()
        self.interrupted = False
        theirs, ours = self._receive(), alike(options)
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                raise DominoError(
                    f"--{name.replace('_', '-')} is {ours.get(name)} here and {theirs.get(name)} in the first process: "
                    "start all with the same options."
                )

    def _receive(self) -> Any:
        while (text := self._messages.receive(WAIT_SECONDS)) is None:
            pass
        return json.loads(text)

    def exchange(self, commands: list[Command]) -> list[Command]:
        """What the first process tells."""
        assert self.service is not None and not commands
        found: list[Command] = []
        for what, number, *more in self._receive():
            if what == "stop":
                self.interrupted = number
                found.append((what, None))
            elif what == "admit":
                job = make_job(self.service, Asked.from_json(*more))
                self._jobs[number] = job
                found.append((what, job))
            elif number in self._jobs:
                found.append((what, self._jobs[number]))
        return found

    def ask_to_end(self) -> None:
        """Tell the first process of a signal."""
        publish(ENDING, "")
