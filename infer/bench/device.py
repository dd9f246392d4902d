"""Everything that waits for a device, in one command that ends in time and keeps what it has.

    python -m infer.bench device --json DIR

First whether the device computes what it should, then what it costs: plain step, cycle, phases, sweeps of batch sizes
and contexts, 8-bit drafters, a training step. Each part is a command of its own, in a process of its own, since a
kernel may end it and a TPU serves one process at a time; each writes DIR/PART.json as it goes. After every part
DIR/device.json and DIR/report.md are written anew. This process leaves the devices alone.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from tyro.conf import DisallowNone

from convert.options import UNSET, DeviceOptions, check_count
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.command import UsageError, end_process, own_command, own_environment, run_command
from domino_jax.runtime.files import check_output, write_text
from domino_jax.runtime.interrupts import exit_on_sigterm
from domino_jax.runtime.parsing import parse_json, read_text
from infer.bench.device_report import DEMO, MAIN, REPORT, write_page

TAU = "5"  # stated, so that cycles commit several tokens whatever the weights are
GRACE = 10.0  # seconds that a part has to end by itself when its time is over
RESERVE = 5.0  # of all, for the report
LEAST = 20.0  # that a part gets, or is not begun
PartName = Literal[
    "attention",
    "drafters",
    "speed",
    "phases",
    "batches",
    "contexts",
    "int8",
    "float8",
    "target-int8",
    "products",
    "training",
]


@dataclass(frozen=True)
class DeviceBench:
    """Check and measure this device: correctness first, then step, cycle, sweeps and training; one page at the end."""

    json: Path
    """folder for the figures of each part (PART.json) and the page (report.md): a new one, or an empty one"""
    shapes: Annotated[str | None, DisallowNone, UNSET] = None
    """a public shape such as qwen3-8b with random weights, or demo (default: the largest up to qwen3-8b that fits the
    devices; on a CPU demo)"""
    mesh: Annotated[str | None, DisallowNone, UNSET] = None
    """devices to spread over, such as data=2,model=4 (default: model over all)"""
    seconds: int = 480
    """all of it ends within this time; what is not done then is left out, and said"""
    parts: Annotated[tuple[PartName, ...], UNSET] = ()
    """some of the parts alone, in this order of theirs (default: all)"""


class DevicePart(NamedTuple):
    """A command whose figures are a part of the whole."""

    name: str
    share: float  # of the time that is left when it begins: the most that it may take
    words: list[str]  # after `python -m`, without the file
    flag: str = "--json"  # of the file


def list_parts(found: Mapping[str, Any]) -> list[DevicePart]:
    """The parts, the most important first.

    Args:
        found: what `infer.bench.probe` has found.
    """
    shapes, demo = found["shapes"], found["shapes"] == DEMO
    speed = ["infer.bench", *(["--model", DEMO] if demo else ["--shapes", shapes, "--random-weights"])]
    speed += ["--mesh", found["mesh"]] if found["mesh"] else []
    speed += ["--simulate-tau", TAU, "--no-transformers"]
    quick = ["--no-head-off", "--no-phases", "--rounds", "2"]
    contexts = ["128", "384"] if demo else ["512", "2048", "8192"]  # the shipped pair has 512 positions
    training = ["train", "bench", "--shapes", shapes, "--batch", str(max(2, found["used"])), "--no-phases"]
    training += ["--mesh", found["training_mesh"]] if found["training_mesh"] else []
    training += ["--length", "256", "--steps", "2"] if demo else []

    def rows(*sizes: int) -> list[str]:
        """Batch sizes, of each part of a mesh that has rows of its own, and as many prompts."""
        batches = [size * found["data"] for size in sizes]
        return ["--batch-sizes", *map(str, batches), "--num-prompts", str(max(batches))]

    return [
        DevicePart("attention", 0.3, ["infer.bench", "correctness", "attention", "--shapes", shapes]),
        DevicePart("drafters", 0.3, ["infer.bench", "correctness", "drafters"]),
        DevicePart("speed", 0.6, [*speed, *rows(1), "--no-phases"]),
        DevicePart("phases", 0.5, [*speed, *rows(1), "--no-head-off", "--roofline", "--rounds", "1"]),
        DevicePart("batches", 0.4, [*speed, *rows(4, 16), *quick]),
        DevicePart("contexts", 0.4, [*speed, *rows(1), "--contexts", *contexts, *quick]),
        DevicePart("int8", 0.4, [*speed, *rows(1), "--draft-weights", "int8", *quick]),
        DevicePart("float8", 0.4, [*speed, *rows(1), "--draft-weights", "float8", *quick]),
        DevicePart("target-int8", 0.4, [*speed, *rows(1), "--weights", "int8", "--draft-weights", "int8", *quick]),
        DevicePart("products", 0.4, ["infer.bench", "products"]),
        DevicePart("training", 1.0, training, "--out"),
    ]


def run_device(options: DeviceBench) -> int:
    """Run the parts, one after another; returns the exit code.

    Raises:
        UsageError: the words make no sense.
        DominoError: the folder is not to be had, or no device is.
        KeyboardInterrupt, SystemExit: a signal came; what was found is written.
    """
    check_device(options)
    exit_on_sigterm()
    folder, began = options.json, time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DominoError(f"{folder} can't be made: {first_line(error)}.") from None
    whole: dict[str, Any] = {"seconds": options.seconds, "parts": []}

    def left() -> float:
        return options.seconds - RESERVE - (time.monotonic() - began)

    def keep() -> None:
        whole["took_seconds"] = time.monotonic() - began
        write_text(folder / MAIN, json.dumps(whole, indent=1) + "\n")
        write_page(folder)

    asked = [
        *(["--shapes", options.shapes] if options.shapes else []),
        *(["--mesh", options.mesh] if options.mesh else []),
    ]
    first = DevicePart("probe", 1.0, ["infer.bench.probe", *asked])
    try:
        done = run_part(first, folder, left())
        if done["status"] != "done":
            raise DominoError(f"no device can be used: {done['reason']}")
        whole["found"] = parse_json(read_text(folder / "probe.json"))
        (folder / "probe.json").unlink()
        parts = [part for part in list_parts(whole["found"]) if not options.parts or part.name in options.parts]
        whole["parts"] = [{"name": part.name, "status": "not begun", "command": command_of(part)} for part in parts]
        for number, part in enumerate(parts):
            keep()
            if left() < LEAST:
                break
            print(f"{part.name}: {command_of(part)}", file=sys.stderr, flush=True)
            last = number == len(parts) - 1
            whole["parts"][number]["status"] = "cut off"
            whole["parts"][number] |= run_part(part, folder, max(LEAST, left() * (1.0 if last else part.share)))
    finally:
        keep()
    print(folder / REPORT)
    failed = [part["name"] for part in whole["parts"] if part["status"] == "failed"]
    if failed:
        raise DominoError(f"{', '.join(failed)} failed; {folder / REPORT} says why.")
    return 0


def run_part(part: DevicePart, folder: Path, seconds: float) -> dict[str, Any]:
    """Run a part's command: its status, seconds, and the reason where it failed.

    Its output goes to DIR/PART.log. What is over its time is asked to end, and ended when it does not.
    """
    began = time.monotonic()
    log = folder / f"{part.name}.log"
    words = own_command([*part.words, part.flag, str(folder.absolute() / f"{part.name}.json")])
    with log.open("wb") as said:
        with signals_waiting() as came:
            # A session of its own: Ctrl-C comes to this process alone, which passes it on.
            process = subprocess.Popen(
                words, env=own_environment(), stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )
        try:
            for number in came:
                signal.raise_signal(number)
            code = process.wait(max(1.0, seconds - GRACE))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process, min(GRACE, max(1.0, seconds / 4)))
    figures = {"seconds": time.monotonic() - began}
    if code == 0:
        return {"status": "done", **figures}
    if code is None:
        return {"status": "cut off", **figures}
    return {"status": "failed", "reason": last_words(log) or f"exit code {code}", **figures}


@contextmanager
def signals_waiting() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM that come inside, for whoever knows by then what has been started."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heard = [number for number, handler in before.items() if callable(handler)]
    for number in heard:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        for number in heard:
            signal.signal(number, before[number])


def stop(process: "subprocess.Popen[bytes]", grace: float) -> None:
    """End a process and what it has started: with Ctrl-C, after `grace` seconds at once."""
    if process.poll() is None:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    if process.poll() is None:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_words(log: Path) -> str:
    """The last line that a process has written, without "error: "."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip().removeprefix("error: ")[:500] if lines else ""


def command_of(part: DevicePart) -> str:
    """The command of a part, to run by hand."""
    return shlex.join(["python", "-m", *part.words])


def check_device(options: DeviceBench) -> None:
    """Check the options without JAX.

    Raises:
        UsageError: a mesh is no mesh, or a value is out of range.
        DominoError: the folder holds something.
    """
    check_count("seconds", options.seconds, least=30)
    DeviceOptions(mesh=options.mesh).mesh_sizes()
    if options.shapes == "":
        raise UsageError("--shapes is empty: name a shape, such as qwen3-8b.")
    if options.json.exists() and not options.json.is_dir():
        raise UsageError(f"--json is to be a folder, and {options.json} is a file.")
    check_output(options.json, "other files")
    if options.json.is_dir() and any(options.json.iterdir()):
        raise DominoError(f"{options.json} holds files already: give a new folder, so that no figures are mixed.")


def main(argv: Sequence[str] | None = None, prog: str = "python -m infer.bench device") -> int:
    """Run the command line; returns the exit code."""
    return run_command(DeviceBench, run_device, argv, prog=prog)


if __name__ == "__main__":
    end_process(main())
