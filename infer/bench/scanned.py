"""Unrolled layers against scanned ones.

python -m infer.bench scan --shapes qwen3-0.6b --layers 8 --tokens 1 8 17
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import DisallowNone

from convert.options import UNSET, Dtype
from domino_jax.runtime.command import UsageError, end_process, run_command


@dataclass(frozen=True)
class Scan:
    """Compare unrolled layers with scanned ones on random weights."""

    shapes: str = "qwen3-0.6b"
    """a public shape, as for python -m infer.bench"""
    layers: Annotated[int | None, DisallowNone, UNSET] = None
    """its first layers; the default is all"""
    tokens: tuple[int, ...] = (1, 8, 17)
    """tokens of a pass"""
    positions: int = 256
    """length of the cache"""
    dtype: Annotated[Dtype | None, DisallowNone, UNSET] = None
    """the default is float32 on CPUs, bfloat16 elsewhere"""


def main(argv: Sequence[str] | None = None, prog: str = "python -m infer.bench.scanned") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Scan, _run, argv, prog=prog)


def _run(options: Scan) -> None:
    if not options.tokens or min(options.tokens) < 1 or options.positions < 2 * max(options.tokens):
        raise UsageError("--tokens must be at least 1, --positions at least twice the most tokens.")
    from infer.bench.layer_scan import run_scan

    run_scan(options)


if __name__ == "__main__":
    end_process(main())
