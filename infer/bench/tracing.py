"""A trace of a run for a profiler's viewer (TensorBoard, XProf), with the phases of a cycle by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from domino_jax.errors import DominoError

SCOPES = ("draft", "head", "target", "verify", "context")  # as `domino_jax.decode` names its phases


def traced(folder: Path, run: Callable[[], Any]) -> tuple[str, ...]:
    """Run under the profiler, writing to `folder`.

    Returns:
        Those of a cycle's phases that the trace knows operations of.

    Raises:
        DominoError: the folder can't be written.
    """
    writable(folder)
    try:
        with jax.profiler.trace(folder):
            run()
    except OSError as error:
        raise DominoError(f"{folder} can't be written: {error}.") from None
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise DominoError(f"the profiler wrote no trace to {folder}.")
    # The programs are in the file whole, an operation's scopes as a path: "jit(speculate)/while/body/head/dot_general".
    held = files[-1].read_bytes()
    return tuple(scope for scope in SCOPES if f"/{scope}/".encode() in held)


def writable(folder: Path) -> None:
    """Make a folder, and make sure that it takes files.

    Raises:
        DominoError: it can't be made, or takes none.
    """
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DominoError(f"{folder} can't be written: {error}.") from None
