"""What several processes of one server tell each other: here two workers in one process, with a store between them."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import factory
import jax.numpy as jnp
import pytest
from factory import BYTE_TARGET, make_tokenizer

from convert.loading import LoadedModel
from convert.options import DeviceOptions, DraftingOptions, ModelOptions
from domino_jax.errors import DominoError
from domino_jax.runtime import processes, slots
from domino_jax.runtime.processes import FORGET, Messages, publish, read_published
from domino_jax.sampling import SamplingParams
from infer.serve.followers import Asked, Follower, Leader, make_job
from infer.serve.options import KVOptions, Serve
from infer.serve.requests import Service
from infer.serve.worker import Job, Update, Worker


class Store:
    """JAX's store of short texts, in this process."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.changed = threading.Condition()

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        with self.changed:
            assert allow_overwrite or key not in self.texts
            self.texts[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.texts, milliseconds / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED: it took too long")
            return self.texts[key]

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return [(name, text) for name, text in self.texts.items() if name.startswith(key + "/")]

    def key_value_delete(self, key: str) -> None:
        del self.texts[key]


@pytest.fixture
def store(monkeypatch) -> Store:
    made = Store()
    monkeypatch.setattr(processes, "_store", lambda: made)
    return made


def test_messages_come_in_order_and_are_forgotten_when_read(store):
    sent, read = Messages("x"), Messages("x")
    assert read.receive(0.01) is None
    for number in range(3 * FORGET):
        sent.send(str(number))
        assert read.receive(1) == str(number)
    assert len(store.texts) <= 2 * FORGET + 1
    behind = Messages("y")
    for number in range(3 * FORGET):
        behind.send(str(number))
    assert len([key for key in store.texts if "/y/" in key]) == 3 * FORGET, "nobody has read them"
    publish("z", "a")
    publish("z", "b")
    assert read_published("z") == ["b"]


def test_another_error_of_the_store_is_not_taken_for_silence(store, monkeypatch):
    def gone(*_: Any) -> None:
        raise RuntimeError("UNAVAILABLE: the service is gone")

    monkeypatch.setattr(store, "blocking_key_value_get", gone)
    with pytest.raises(RuntimeError, match="UNAVAILABLE"):
        Messages("x").receive(1)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(
            0.7, 20, 0.95, 0.1, 7, (1, 2), 2**32 - 1, "coupled", 1.1, 0.1 + 0.2, -1 / 3, ((5, -100.0),), 2, 3
        ),
        SamplingParams(1e30, logprobs=0),
    ],
)
def test_what_is_asked_arrives_as_it_was(params):
    body = {"prompt": "secret", "messages": [], "stop": ["a", "ü\n"], "chat_template_kwargs": {"enable_thinking": True}}
    asked = Asked([1, 2], params, 3, body, True, True)
    got = Asked.from_json(json.loads(json.dumps(asked.to_json())))
    assert got == asked._replace(body={name: body[name] for name in ("stop", "chat_template_kwargs")})


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"max_num_seqs": 3}, "--max-num-seqs"),
        ({"warm_up": 0}, "--warm-up"),
        ({"num_draft_tokens": 4}, "--num-draft-tokens"),
        ({"thinking": True}, "--thinking"),
        ({"kv": KVOptions(page_size=32)}, "--page-size"),
        ({"model": ModelOptions(device=DeviceOptions(dtype="bfloat16"))}, "--dtype"),
        ({"model": ModelOptions(device=DeviceOptions(mesh="data=2"))}, "--mesh"),
        ({"model": ModelOptions(drafting=DraftingOptions(draft_weights="int8"))}, "--draft-weights"),
    ],
)
def test_a_process_started_otherwise_is_refused(store, changed, name):
    Leader(Serve())
    with pytest.raises(DominoError, match=rf"^{name} is .* in the first process: start all with the same options"):
        Follower(replace(Serve(), **changed))


def test_what_only_the_first_process_reads_may_differ(store):
    Leader(Serve())
    Follower(replace(Serve(), port=1, host="x", api_key="k", max_queue=1, model=ModelOptions("/elsewhere/model")))


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    target = replace(BYTE_TARGET, tie_word_embeddings=False, max_position_embeddings=512)
    pair = factory.good_pair(target, 3, num_hidden_layers=1)
    return LoadedModel(pair.configs, pair.params, make_tokenizer(), (), jnp.dtype("float32"), (), 0.0)


class Side:
    """A worker, and what it told of each answer."""

    def __init__(self, loaded: LoadedModel, link: Any):
        self.jobs: dict[Job, list[Update]] = {}
        self.worker = Worker(loaded, 2, False, 0, lambda line: None, self._seen, link)
        self.worker.start()

    def _seen(self, job: Job, update: Update) -> None:
        self.jobs.setdefault(job, []).append(update)

    @property
    def answers(self) -> list[Any]:
        return [(job.asked.number, job.tokens, job.finish_reason, job.accepted, job.steps) for job in self.jobs]


@pytest.fixture(autouse=True)
def dispatches_of_any_length(monkeypatch):
    """As it is with several processes, no dispatch is cut by times, which differ between the two workers here."""
    monkeypatch.setattr(slots, "RESPONSE", 1e9)


@pytest.fixture
def sides(store, loaded) -> Iterator[tuple[Service, Side, Side]]:
    service = Service(loaded, "tiny", {}, 512, 600.0)
    leader, follower = Leader(Serve()), Follower(Serve())
    follower.service = service
    first, other = Side(loaded, leader), Side(loaded, follower)
    yield service, first, other
    first.worker.stop()
    assert other.worker.wait(30), "a stop is for all"


def until(true: Any, seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.e2e
@pytest.mark.usefixtures("quick_compilation")
def test_a_follower_decodes_what_the_first_decodes(sides):
    """Stop strings, seeds, a grammar, penalties, a client that leaves, and one that is too late."""
    service, first, other = sides
    bodies: list[tuple[dict[str, Any], SamplingParams]] = [
        ({}, SamplingParams(1.2, max_tokens=30, seed=4)),
        ({"stop": ["e", "a"]}, SamplingParams(1.0, max_tokens=200, seed=3)),
        ({"structured_outputs": {"regex": "[ab]{4}"}}, SamplingParams(1.0, max_tokens=9, seed=1)),
        ({}, SamplingParams(0.9, max_tokens=40, sampler="rejection", seed=9, presence_penalty=0.5)),
    ]
    for number, (body, params) in enumerate(bodies):
        first.worker.submit(make_job(service, Asked([40 + number, 50], params, number, body)))
    until(lambda: len(first.jobs) == 4 and all(job.finish_reason for job in first.jobs))
    leaves = make_job(service, Asked([1], SamplingParams(1.0, max_tokens=480), 5, {}))
    late = make_job(service, Asked([2], SamplingParams(1.0, max_tokens=480), 6, {}))
    late.deadline = time.monotonic() + 0.2
    first.worker.submit(leaves)
    first.worker.submit(late)
    until(lambda: leaves.tokens)
    first.worker.cancel(leaves)
    until(lambda: leaves.finish_reason and late.finish_reason)
    first.worker.submit(make_job(service, Asked([3], SamplingParams(1.0, max_tokens=5), 7, {})))
    until(lambda: len(first.jobs) == 7 and all(job.finish_reason for job in first.jobs))
    until(lambda: len(other.jobs) == 7 and all(job.finish_reason for job in other.jobs))
    assert other.answers == first.answers
    reasons = [reason for _, _, reason, *_ in first.answers]
    assert set(reasons) >= {"stop", "length", "cancelled"} and not first.worker.failed and not other.worker.failed


@pytest.mark.e2e
@pytest.mark.usefixtures("quick_compilation")
def test_what_fails_in_one_of_several_ends_its_decoding(sides, monkeypatch):
    """What the others hold then is not known; on its own a process would go on."""
    service, first, _ = sides

    def fails(*_: Any) -> None:
        raise RuntimeError("of the device")

    monkeypatch.setattr(first.worker._slots, "step", fails)
    job = make_job(service, Asked([1], SamplingParams(max_tokens=4), 0, {}))
    first.worker.submit(job)
    until(lambda: first.worker.failed and job.failed)  # one after the other, in its own thread
    assert str(first.worker.failed) == "of the device"
    Messages.send(first.worker._link._messages, '[["stop", false]]')  # type: ignore[union-attr]
