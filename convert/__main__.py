"""Convert a model's folder between its two forms.

python -m convert SRC DST      Hugging Face -> Orbax, Orbax -> Hugging Face
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from convert.folders import convert
from domino_jax.errors import DominoError


@dataclass(frozen=True)
class Convert:
    """Convert a target or drafter from Hugging Face files to Orbax, or from Orbax to Hugging Face files."""

    source: tyro.conf.Positional[Path]
    """folder to read; which form it has is recognised"""
    destination: tyro.conf.Positional[Path]
    """folder to write the other form to"""


def main(argv: list[str] | None = None) -> int:
    options = tyro.cli(Convert, args=argv, prog="python -m convert")

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\rreading tensor {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    try:
        was, now = convert(options.source, options.destination, progress)
    except DominoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{options.source} ({was}) -> {options.destination} ({now})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
