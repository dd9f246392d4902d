"""`python -m infer.serve` as a process: ready, signals, ports."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from factory import make_draft, make_target

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_target(root / "target", eos=None, max_position_embeddings=512)
    make_draft(root / "draft")
    generation = {"temperature": 0.7, "top_p": 0.8}
    (root / "target" / "generation_config.json").write_text(json.dumps(generation))
    return root


class Process:
    """A server process, its log, and its address."""

    def __init__(self, folder: Path, *words: str):
        command = [sys.executable, "-m", "infer.serve", "--model", folder / "target", "--draft", folder / "draft"]
        command += ["--port", "0", "--warm-up", "0", "--max-num-seqs", "2", *words]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = "http://" + self.wait("at http://").split("http://")[1].split("/")[0]
        self.wait("ready")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def wait(self, text: str, seconds: float = 120) -> str:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for line in self.lines:
                if text in line and not (text == "ready" and "when it is ready" in line):
                    return line
            assert self.process.poll() is None, self.lines
            time.sleep(0.05)
        raise AssertionError(self.lines)

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        status = self.process.wait(60)
        self._reader.join(10)
        return status


def test_sigterm_finishes_what_runs_and_ends_with_0(folder):
    server = Process(folder)
    body = {"prompt": "hello", "max_tokens": 300, "stream": True, "temperature": 0}
    found: dict[str, Any] = {}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        found["first"] = next(lines)
        server.process.send_signal(signal.SIGTERM)
        found["rest"] = [line for line in lines if line]
    assert found["rest"][-1] == "data: [DONE]", "the answer that ran is whole"
    assert server.process.wait(60) == 0
    assert any("ended" in line for line in server.lines)
    assert not any("Traceback" in line for line in server.lines), server.lines


def test_ctrl_c_ends_with_130_and_a_taken_port_with_one_sentence(folder):
    server = Process(folder, "--generation-config", "none")
    body = {"prompt": "hello", "max_tokens": 8}
    texts = {
        httpx.post(server.url + "/v1/completions", json=body, timeout=60).json()["choices"][0]["text"] for _ in "123"
    }
    assert len(texts) == 1, "greedy without the checkpoint's sampling"
    port = server.url.rsplit(":", 1)[1]
    words = [sys.executable, "-m", "infer.serve", "--model", str(folder / "target"), "--draft", "none", "--port", port]
    other = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert other.returncode == 1 and f"127.0.0.1:{port} is taken: give another with --port" in other.stderr
    assert server.end(signal.SIGINT) == 130


@pytest.mark.slow
def test_after_the_patience_what_still_runs_is_cut(folder):
    server = Process(folder, "--shutdown-timeout", "0.2")
    host, port = server.url.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host, int(port))) as client:  # that reads nothing
        body = json.dumps({"prompt": "hello", "max_tokens": 400, "stream": True, "n": 16}).encode()
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        time.sleep(1)
        assert server.end(signal.SIGTERM) == 0
