"""A trace of a run for a profiler's viewer (TensorBoard, XProf), with the phases of a cycle by name."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from domino_jax.errors import DominoError, first_line
from infer.bench.options import check_writable

SCOPES = ("draft", "head", "target", "verify", "context")  # as `domino_jax.decode` names its phases


def traced(folder: Path, run: Callable[[], Any], program: str) -> tuple[str, ...]:
    """Run under the profiler, writing to `folder`.

    Args:
        program: the jitted function whose operations are looked for, such as "speculate".

    Returns:
        Those of a cycle's phases that the trace knows operations of. (On a GPU, command buffers hide from the viewer
        which operation is whose; `XLA_FLAGS=--xla_gpu_enable_command_buffer=` runs without them.)

    Raises:
        DominoError: the folder can't be written.
    """
    check_writable(folder)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every Python call would be most of the file
    try:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
    except OSError as error:
        raise DominoError(f"{folder} can't be written: {first_line(error)}.") from None
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise DominoError(f"the profiler wrote no trace to {folder}.")
    # The file has the programs whole, an operation's scopes as a path: "jit(speculate)/while/body/head/dot_general".
    paths = set(re.findall(rf"jit\({program}\)/([\w/.()-]*)".encode(), files[-1].read_bytes()))
    parts = {part for path in paths for part in path.decode().split("/")}
    return tuple(scope for scope in SCOPES if scope in parts)
