"""Convert a model's folder between its two forms, or look whether it is sound.

python -m convert SRC DST                      Hugging Face -> Orbax; Orbax, or a training run's drafter -> Hugging Face
python -m convert --check DIR [--target DIR]   what a folder holds, and what is wrong with it
"""

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional

from domino_jax.errors import DominoError
from domino_jax.runtime.command import exit_code

DONE, FAILED, WRONG_WORDS, CANCELLED = 0, 1, 2, 130


@dataclass(frozen=True)
class Convert:
    """Convert a target or drafter from Hugging Face files to Orbax, or from Orbax to Hugging Face files."""

    source: Positional[Path | None] = None
    """folder to read; which form it has is recognised. A training run (the folder of python -m train --out) gives the
    drafter of its newest checkpoint"""
    destination: Positional[Path | None] = None
    """folder to write the other form to"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """convert the weights; as stored when not given, of a training run bfloat16"""
    check: Path | None = None
    """instead: report what this folder holds (sizes, dtypes, missing, unexpected and misshapen tensors, values that
    are not finite), and how far a target's logits are from transformers' own, where PyTorch is installed"""
    target: Path | None = None
    """with --check of a drafter: its target, to see whether they fit"""


def wrong(options: Convert) -> str | None:
    """What is wrong with the words of the command line, None if nothing is."""
    o = options
    if o.check:
        if o.source or o.dtype:
            return "--check takes one folder, and --target; it converts nothing"
        return None
    if o.target:
        return "--target goes with --check"
    return None if o.source and o.destination else "give SRC and DST, or --check DIR"


def main(argv: list[str] | None = None) -> int:
    options = tyro.cli(Convert, args=argv, prog="python -m convert")
    problem = wrong(options)
    if problem:
        print(f"error: {problem}.", file=sys.stderr)
        return WRONG_WORDS
    # Nothing here gains from an accelerator, and one may be serving a model meanwhile.
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax.numpy as jnp

    from convert.check import check_folder
    from convert.folders import convert_folder
    from convert.progress import progress_bars

    try:
        with progress_bars() as progress:
            if options.check:
                report = check_folder(options.check, options.target, progress)
            else:
                assert options.source and options.destination
                dtype = jnp.dtype(options.dtype) if options.dtype else None
                reading = partial(progress, f"reading {options.source}")
                was, now = convert_folder(options.source, options.destination, reading, dtype)
    except DominoError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted" if options.check else "interrupted; nothing was written", file=sys.stderr)
        return CANCELLED
    if not options.check:
        print(f"{options.source} ({was}) -> {options.destination} ({now})")
        return DONE
    for what, value in report.lines:
        print(f"{what:12} {value}")
    for warning in report.warnings:
        print(f"{'warning':12} {warning}")
    for found in report.problems:
        print(f"{'problem':12} {found}")
    print("sound" if not report.problems else f"{len(report.problems)} problems")
    return FAILED if report.problems else DONE


if __name__ == "__main__":
    sys.exit(exit_code(main))
