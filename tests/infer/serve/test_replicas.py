"""Which replica a request goes to, and two of them behind Ray Serve."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from factory import make_draft, make_target

from domino_jax.runtime.command import UsageError
from infer.serve.replicas import PREFIX, actor_options, main, prefix_of, ranked

ROOT = Path(__file__).parents[3]
SYSTEM, LONG = {"role": "system", "content": "Be brief."}, "x" * 1000


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ({"prompt": LONG + "a"}, {"prompt": LONG + "b", "max_tokens": 3}, True),
        ({"prompt": "a" + LONG}, {"prompt": "b" + LONG}, False),
        ({"prompt": [LONG + "a", "b"]}, {"prompt": LONG}, True),
        ({"prompt": [1] * PREFIX + [2]}, {"prompt": [1] * PREFIX}, True),
        ({"prompt": [[1, 2]]}, {"prompt": [1, 2]}, True),
        ({"messages": [SYSTEM, {"content": "a"}, {"content": "b"}]}, {"messages": [SYSTEM, {"content": "a"}]}, True),
        ({"messages": [SYSTEM, {"content": "a"}]}, {"messages": [SYSTEM, {"content": "b"}]}, False),
        ({"input": "a"}, {"input": "b"}, False),
    ],
)
def test_requests_that_begin_alike_have_one_prefix(one, other, alike):
    found = prefix_of(body(**one))
    assert found and (found == prefix_of(body(**other))) == alike


@pytest.mark.parametrize("given", [b"", b"{", b"[]", b"\xff", b"null", b"{}", *(body(prompt=x) for x in ("", [], 5))])
def test_what_has_no_prompt_has_no_prefix(given):
    assert prefix_of(given) == ""


def test_prefixes_spread_over_replicas_and_stay_where_they_are():
    names, prefixes = [f"replica-{i}" for i in range(4)], [str(i) for i in range(400)]
    first = {prefix: ranked(prefix, names)[0] for prefix in prefixes}
    assert min(Counter(first.values()).values()) > 60
    fewer = {prefix: ranked(prefix, names[1:])[0] for prefix in prefixes}
    assert all(fewer[prefix] == name for prefix, name in first.items() if name != names[0])
    assert len({fewer[prefix] for prefix, name in first.items() if name == names[0]}) == 3, (
        "all others take its prefixes"
    )


@pytest.mark.parametrize(
    ("text", "options"),
    [(None, {"num_cpus": 1}), ("GPU=2", {"num_gpus": 2}), ("TPU=4", {"resources": {"TPU": 4}})],
)
def test_what_a_replica_is_given(text, options):
    assert actor_options(text) == options


@pytest.mark.parametrize("text", ["", "GPU", "GPU=", "=1", "GPU=-1", "GPU=0.5", "GPU=x", "G P=1", "GPU=٣", "GPU=99999"])
def test_resources_that_make_no_sense(text):
    with pytest.raises(UsageError, match="--resources is given as GPU=1 or TPU=4"):
        actor_options(text)


def test_words_that_make_no_sense(capsys):
    for words, says in (
        (["--replicas", "0"], "--replicas must be at least 1"),
        (["--max-num-seqs", "0"], "--max-num-seqs must be at least 1"),
        (["--coordinator", "a:1", "--num-processes", "2", "--process-id", "0"], "a replica is one process"),
    ):
        assert main(words) == 2
        assert says in capsys.readouterr().err


@pytest.mark.skipif(find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_the_extra_is_named(capsys):
    assert main([]) == 1
    assert 'pip install "domino-jax[ray]"' in capsys.readouterr().err


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason='needs ray: pip install -e ".[ray]"')
def test_one_of_two_replicas_is_killed_and_requests_go_on(tmp_path):
    make_target(tmp_path / "target", eos=None, max_position_embeddings=512)
    make_draft(tmp_path / "draft")
    port = 18123
    words = ["--model", str(tmp_path / "target"), "--draft", str(tmp_path / "draft"), "--warm-up", "0"]
    command = [sys.executable, "-m", "infer.serve.replicas", *words, "--port", str(port), "--max-num-seqs", "2"]
    server = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    lines: list[str] = []
    assert server.stderr is not None
    reader = threading.Thread(target=lambda: lines.extend(server.stderr), daemon=True)  # type: ignore[arg-type]
    reader.start()
    url = f"http://127.0.0.1:{port}"

    def ask(prompt: str) -> httpx.Response:
        asked = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
        return httpx.post(url + "/v1/completions", json=asked, timeout=120)

    try:
        until = time.monotonic() + 240
        while not any("ready" in line for line in lines):
            assert server.poll() is None and time.monotonic() < until, lines
            time.sleep(0.2)
        prompts = [f"{number} {LONG[:PREFIX]}" for number in range(12)]
        before = {prompt: ask(prompt) for prompt in prompts}
        where = {prompt: answer.headers["x-replica"] for prompt, answer in before.items()}
        assert len(set(where.values())) == 2
        assert all(ask(prompt + " and more").headers["x-replica"] == where[prompt] for prompt in prompts)
        with httpx.stream(
            "POST", url + "/v1/completions", json={"prompt": "a", "stream": True}, timeout=60
        ) as response:
            assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"
        gone = where[prompts[0]]
        os.kill(int(gone.rsplit("-", 1)[1]), signal.SIGKILL)
        after = {prompt: ask(prompt) for prompt in prompts}
        assert [answer.text for answer in after.values() if answer.status_code != 200] == []
        text = {prompt: answer.json()["choices"][0]["text"] for prompt, answer in before.items()}
        assert {prompt: answer.json()["choices"][0]["text"] for prompt, answer in after.items()} == text
        assert gone not in {answer.headers["x-replica"] for answer in after.values()}
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        if server.poll() is None:
            server.terminate()
            server.wait(60)
