"""`python -m infer.serve` over two processes on loopback: the answers of one, signals, and processes that vanish."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from factory import make_draft, make_target

from convert.loading import load_model
from infer.engine import Engine

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
PROMPTS = [[40, 50, 60], [70, 80], [90] * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_target(root / "target", eos=None, max_position_embeddings=512)
    make_draft(root / "draft")
    return root


class Processes:
    """The processes of one server, and what each says."""

    def __init__(self, folder: Path, *words: str, others: tuple[str, ...] = ()):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
        self.processes: list[subprocess.Popen[str]] = []
        self.lines: list[list[str]] = [[], []]
        self._readers: list[threading.Thread] = []
        for number in range(2):
            command = [sys.executable, "-m", "infer.serve", "--model", folder / "target", "--draft", folder / "draft"]
            command += ["--port", "0", "--warm-up", "0", "--max-num-seqs", "2", "--mesh", "model=2", *words]
            command += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", str(number)]
            command += others if number else ()
            pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True}
            self.processes.append(subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, **pipes))
            self._readers.append(threading.Thread(target=self._read, args=(number,), daemon=True))
            self._readers[-1].start()

    def _read(self, number: int) -> None:
        stream = self.processes[number].stderr
        assert stream is not None
        for line in stream:
            self.lines[number].append(line.rstrip("\n"))

    def wait(self, text: str, seconds: float = 120) -> str:
        """The first line of the first process that has the text."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for line in self.lines[0]:
                if re.search(text, line):
                    return line
            assert self.processes[0].poll() is None, self.lines
            time.sleep(0.05)
        raise AssertionError(self.lines)

    @property
    def url(self) -> str:
        self.wait(" ready$")
        return "http://" + self.wait("at http://").split("http://")[1].split("/")[0]

    def ends(self, seconds: float = 60) -> list[int]:
        """The exit codes, when all have ended."""
        try:
            codes = [process.wait(seconds) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(self.lines) from None
        for reader in self._readers:
            reader.join(10)
        return codes

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def sentences(self, number: int) -> list[str]:
        """The errors that a process has said."""
        return [line for line in self.lines[number] if line.startswith("error: ")]


def complete(url: str, **body: Any) -> str:
    asked = {"max_tokens": 12, "temperature": 0, **body}
    return httpx.post(url + "/v1/completions", json=asked, timeout=60).json()["choices"][0]["text"]


@pytest.mark.slow
def test_two_processes_answer_as_one_and_end_together(folder):
    loaded = load_model(folder / "target", folder / "draft")
    engine = Engine(loaded)
    alone = [engine.sequence(prompt, 12, row)[0] for row, prompt in enumerate(PROMPTS)]
    with Processes(folder) as server:
        url = server.url
        engine.generate(alone)
        found: dict[int, str] = {}

        def ask(number: int) -> None:
            found[number] = complete(url, prompt=PROMPTS[number])

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[number] for number in range(3)] == [sequence.text for sequence in alone]
        body = {"prompt": PROMPTS[0], "max_tokens": 150, "stream": True, "temperature": 0}
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as response:
            next(response.iter_lines())  # and leaves
        assert complete(url, prompt=PROMPTS[1]) == alone[1].text
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.processes[1].send_signal(signal.SIGTERM)  # to either of them
            assert [line for line in lines if line][-1] == "data: [DONE]", "the answer that runs is whole"
        assert server.ends() == [0, 0], server.lines
    assert not any("Traceback" in line for lines in server.lines for line in lines), server.lines


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2", "data=1,model=2"])
def test_ctrl_c_ends_both_with_130_and_auto_drafts_agree(folder, mesh):
    with Processes(folder, "--mesh", mesh, "--num-draft-tokens", "auto") as server:
        url = server.url
        answers = {complete(url, prompt=PROMPTS[0], max_tokens=200) for _ in range(4)}
        assert len(answers) == 1
        server.processes[0].send_signal(signal.SIGINT)
        assert server.ends() == [130, 130], server.lines


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_vanishes_ends_the_other(folder, killed, busy):
    with Processes(folder) as server:
        url = server.url
        complete(url, prompt=PROMPTS[0])

        def ask() -> None:
            body = {"prompt": PROMPTS[0], "max_tokens": 500, "temperature": 1.0, "n": 8}
            with suppress(httpx.HTTPError):
                httpx.post(url + "/v1/completions", json=body, timeout=90)

        asking = threading.Thread(target=ask, daemon=True)
        if busy:
            asking.start()
            time.sleep(0.5)
        began = time.monotonic()
        server.processes[killed].kill()
        codes = server.ends(60)
        assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 1, (codes, server.lines)
        assert time.monotonic() - began < 40
        assert len(server.sentences(1 - killed)) == 1, server.lines


@pytest.mark.slow
def test_what_one_refuses_ends_both(folder):
    with Processes(folder, others=("--max-num-seqs", "4")) as server:
        assert server.ends(90) == [1, 1], server.lines
        assert "--max-num-seqs is 4 here and 2 in the first process" in server.sentences(1)[0]
        assert len(server.sentences(0)) == 1 and json.dumps(server.lines).count("Traceback") == 0, server.lines
