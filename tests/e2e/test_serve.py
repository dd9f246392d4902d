"""`python -m infer.serve` as a process: ready, signals, ports, clients that leave or do not read, and a sudden end."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from factory import make_draft, make_target
from serving import TEMPLATE, Storm, raw_request

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_target(root / "target", eos=None, max_position_embeddings=512, template=TEMPLATE)
    make_draft(root / "draft")
    generation = {"temperature": 0.7, "top_p": 0.8}
    (root / "target" / "generation_config.json").write_text(json.dumps(generation))
    return root


class Process:
    """A server process, its log, and its address."""

    def __init__(self, folder: Path, *words: str, port: int = 0, slots: int = 2, **environment: str):
        command = [sys.executable, "-m", "infer.serve", "--model", folder / "target", "--draft", folder / "draft"]
        command += ["--port", port, "--warm-up", "0", "--max-num-seqs", slots, *words]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
        self.process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = "http://" + self.wait("at http://").split("http://")[1].split("/")[0]
        self.port = int(self.url.rsplit(":", 1)[1])
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

    def ask(self, timeout: float = 60, **body: Any) -> Any:
        """What it says to a prompt."""
        body = {"prompt": "hello", "max_tokens": 8, "temperature": 0, **body}
        response = httpx.post(self.url + "/v1/completions", json=body, timeout=timeout)
        assert response.status_code == 200, response.text
        return response.json()

    def is_idle(self, seconds: float = 60) -> bool:
        """Whether nothing waits or runs, within so many seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            text = httpx.get(self.url + "/metrics", timeout=60).text
            busy = [line for line in text.splitlines() if line.startswith("domino:num_requests_")]
            if len(busy) == 2 and all(float(line.rsplit(" ", 1)[1]) == 0 for line in busy):
                return True
            time.sleep(0.1)
        return False

    @property
    def megabytes(self) -> float:
        """Its resident memory, on Linux."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def served(folder) -> Iterator[Process]:
    """A server whose clients have 30 seconds."""
    words = ("--request-timeout", "30", "--max-queue", "512", "--num-draft-tokens", "3")
    made = Process(folder, *words, slots=4)
    yield made
    made.process.kill()


@pytest.mark.slow
def test_clients_that_leave_at_any_moment_leave_nothing(served):
    """Neither slots nor memory; tests/infer/serve/test_stress.py has it for a moment."""
    storm, before, seconds = Storm(served.port), 0.0, 180
    for seed in range(12):  # each program that is compiled takes some megabytes, which it keeps
        storm.blow(30, seed)
        assert served.is_idle()
        began, before = before, served.megabytes
        if before < 1.01 * began:
            break
    left = storm.left
    storm.blow(seconds, seed=99)
    assert served.is_idle(), "all slots are free again"
    after = served.megabytes
    print(f"{storm.left - left} clients left in {seconds} s, {left} before: {before:.0f} MB, then {after:.0f} MB")
    assert set(storm.statuses) <= {200, 400, 429} and storm.left - left > 5 * seconds, storm
    assert served.ask()["usage"]["completion_tokens"] == 8
    assert after < 1.05 * before
    assert not any("Traceback" in line for line in served.lines), served.lines


@pytest.mark.slow
def test_many_who_do_not_read_delay_nobody(served):
    """tests/infer/serve/test_stress.py has one that is dropped."""
    stuck = 8
    body = {"prompt": "hello", "max_tokens": 500, "n": 4, "stream": True, "logprobs": 20, "temperature": 0}
    body |= {"return_drafts": True}
    quick = served.ask()
    began, clients = served.megabytes, []
    for _ in range(stuck):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", served.port))
        client.sendall(raw_request("/v1/completions", body))
        clients.append(client)
    for client in clients:
        client.recv(1, socket.MSG_PEEK)  # its answer has begun
    assert served.is_idle(), "answers end whether they are read or not"
    seconds = []
    for _ in range(5):
        at = time.monotonic()
        assert served.ask()["choices"] == quick["choices"]
        seconds.append(time.monotonic() - at)
    grown = served.megabytes - began
    print(f"{stuck} clients read nothing: others {min(seconds):.2f} to {max(seconds):.2f} s, {grown:.0f} MB more")
    assert min(seconds) < 3 and grown < 100 + 100 * stuck  # a program that is compiled meanwhile may delay some
    time.sleep(31)

    def rest(client: socket.socket) -> bytes:
        """What comes of its answer: the system may hold all of it for its client; else it has been cut."""
        first = b""
        with client, contextlib.suppress(ConnectionError):
            client.settimeout(120)  # a sender whose next piece is larger than the window asks ever more rarely
            first = client.recv(1 << 16)
            while client.recv(1 << 16):
                pass
        return first

    with ThreadPoolExecutor(stuck) as readers:
        assert all(first.startswith(b"HTTP/1.1 200") for first in readers.map(rest, clients))
    assert served.ask()["choices"] == quick["choices"]


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 5])
def test_killed_and_started_again_on_the_same_port(folder, tmp_path, times):
    """While it answers. A client that tries again is answered, and nothing is left behind."""
    how = {"slots": 1, "TMPDIR": str(tmp_path)}
    server = Process(folder, "--served-model-name", tmp_path.name, **how)
    expected = server.ask()["choices"]
    for _ in range(times):
        body = {"prompt": "hello", "max_tokens": 400, "stream": True}
        with (
            pytest.raises(httpx.TransportError),
            httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as response,
        ):
            for _ in response.iter_lines():
                server.process.kill()
        assert server.process.wait(20) == -signal.SIGKILL
        assert not processes_with(tmp_path.name)
        found: dict[str, Any] = {}
        client = threading.Thread(target=ask_until_answered, args=(server.url, found))
        client.start()
        server = Process(folder, "--served-model-name", tmp_path.name, port=server.port, **how)
        client.join()
        assert found["answer"] == expected
    assert server.end(signal.SIGTERM) == 0
    assert list(tmp_path.iterdir()) == [] and not processes_with(tmp_path.name)


def ask_until_answered(url: str, found: dict[str, Any]) -> None:
    """What a client does that tries again: while nobody is there, and while the server says that it compiles."""
    until = time.monotonic() + 120
    while "answer" not in found and time.monotonic() < until:
        with contextlib.suppress(httpx.TransportError):
            body = {"prompt": "hello", "max_tokens": 8, "temperature": 0}
            response = httpx.post(url + "/v1/completions", json=body, timeout=60)
            if response.status_code == 200:
                found["answer"] = response.json()["choices"]
            else:
                assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
        time.sleep(0.2)


def processes_with(word: str) -> list[str]:
    """The command lines of processes that have a word, on Linux."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_text(errors="replace"))
    return [line for line in found if word in line]
