"""Convert a model between its forms, or check it.

python -m convert SRC DST                      Hugging Face -> Orbax; Orbax, GGUF, a training run -> Hugging Face
python -m convert DRAFTER DST --format FORM    a drafter for another program: SpecForge's form, DeepSpec's, speculators'
python -m convert SRC DST --weights FORM       quantized, as vLLM reads it: fp8, int8, int4, awq-like
python -m convert ORTHRUS DST --part base|view  a target without its second view, or the second view alone
python -m convert BASE DST --view VIEW         both in one again
python -m convert --check DIR [--target DIR]   what a folder holds, and what is wrong with it
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import DisallowNone, Positional, arg

from convert.options import UNSET, Dtype
from domino_jax.runtime.command import DONE, FAILED, UsageError, end_process, run_command
from domino_jax.runtime.parsing import parse_json

if TYPE_CHECKING:  # JAX is imported once the words are known to be right
    from convert.check import FolderReport


@dataclass(frozen=True)
class Convert:
    """Convert a target or drafter between Hugging Face files and Orbax, or check it."""

    source: Annotated[Positional[Path | None], UNSET, arg(metavar="SRC")] = None
    """what to read: Hugging Face files, Orbax, GGUF, or a training run (the drafter of its newest checkpoint)"""
    destination: Annotated[Positional[Path | None], UNSET, arg(metavar="DST")] = None
    """folder to write: Orbax from Hugging Face files, Hugging Face files from the others"""
    dtype: Annotated[Dtype | None, DisallowNone, UNSET] = None
    """dtype to write (default: as stored, and bfloat16 of a training run)"""
    format: Annotated[Literal["specforge", "deepspec", "speculators"] | None, DisallowNone, UNSET] = None
    """write a block drafter's files in this form; with --target those of the last two have copies of its embeddings"""
    weights: Annotated[Literal["fp8", "int8", "int4", "awq-like"] | None, DisallowNone, UNSET] = None
    """quantize the linear layers, in compressed-tensors' form: 8 bits, or 4 in groups of 128 (awq-like: zero points)"""
    part: Annotated[Literal["base", "view"] | None, DisallowNone, UNSET] = None
    """of a target with a second view (OrthrusLM) write one of the two; tensors keep their bytes"""
    view: Annotated[Path | None, DisallowNone, UNSET] = None
    """a second view, to be written beside the target SRC"""
    hf_overrides: Annotated[str | None, DisallowNone, UNSET, arg(metavar="JSON")] = None
    """fields of a block drafter's config.json that take the place of the file's, as '{"shift_label": true}'"""
    check: Annotated[Path | None, DisallowNone, UNSET] = None
    """report what a model holds and what is wrong with it, and compare a target's logits with transformers'"""
    target: Annotated[Path | None, DisallowNone, UNSET] = None
    """a drafter's target: with --check, to see whether they fit; else to compare the drafter's copies of its weights"""


def check_words(options: Convert) -> None:
    """Raises: UsageError: the options make no sense together."""
    o = options
    if o.check and (o.source or o.dtype or o.format or o.hf_overrides or o.part or o.view or o.weights):
        raise UsageError("--check takes one folder, and --target; it converts nothing.")
    if not o.check and not (o.source and o.destination):
        raise UsageError("give SRC and DST, or --check DIR.")
    if (o.part or o.view) and (o.dtype or o.format or o.hf_overrides or o.target or o.weights or (o.part and o.view)):
        raise UsageError("--part and --view copy tensors as they are: give one of them, and nothing but SRC and DST.")
    if o.weights and o.format:
        raise UsageError("--weights and --format write files for different programs: give one of them.")


def overrides(options: Convert) -> dict[str, Any]:
    """The fields of --hf-overrides.

    Raises:
        UsageError: it is no JSON object.
    """
    if options.hf_overrides is None:
        return {}
    try:
        found = parse_json(options.hf_overrides)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found:
        raise UsageError(
            f"--hf-overrides takes a JSON object of fields, such as '{{\"shift_label\": true}}', found "
            f"{options.hf_overrides!r}."
        )
    return found


def main(argv: Sequence[str] | None = None, prog: str = "python -m convert") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Convert, run_convert, argv, prog=prog)


def run_convert(options: Convert) -> int:
    """Convert or check; returns the exit code.

    Raises:
        UsageError: the options make no sense.
        DominoError: a folder can't be read or written.
    """
    check_words(options)
    changed = overrides(options)
    # Nothing here gains from an accelerator, and one may be serving a model meanwhile.
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax.numpy as jnp

    from convert.check import FolderReport, check_folder
    from convert.drafters import form_of
    from convert.folders import convert_folder
    from convert.gguf import as_folder
    from convert.hf import read_json
    from convert.parts import join_parts, write_part
    from convert.progress import progress_bars

    report = FolderReport()
    try:
        with progress_bars() as progress:
            target = options.target and as_folder(options.target)
            if options.check:
                check_folder(as_folder(options.check), target, progress, report)
            elif options.part or options.view:
                assert options.source and options.destination
                if options.part:
                    was, now = write_part(options.source, options.destination, options.part)
                elif options.view:
                    was, now = join_parts(options.source, options.view, options.destination)
            else:
                assert options.source and options.destination
                dtype = jnp.dtype(options.dtype) if options.dtype else None
                reading = partial(progress, f"reading {options.source}")
                source, form = as_folder(options.source), options.format
                was, now = convert_folder(
                    source, options.destination, reading, dtype, target, form, changed, options.weights
                )
    except KeyboardInterrupt:
        print_report(report)
        known = ", what is known so far is above" if report.lines else ""
        with suppress(OSError):
            print(f"interrupted{known if options.check else '; nothing was written'}", file=sys.stderr)
        raise
    if not options.check:
        assert options.destination
        print(f"{options.source} ({was}) -> {options.destination} ({now})")
        file = options.destination / "config.json"
        raw = read_json(file)
        for warning in form_of(raw).warnings(raw, None, file):
            print(f"warning: {warning}", file=sys.stderr)
        return DONE
    print_report(report)
    with suppress(BrokenPipeError):  # the exit code is the answer too
        print("sound" if not report.problems else f"{len(report.problems)} problems")
    return FAILED if report.problems else DONE


def print_report(report: "FolderReport") -> None:
    """A check's findings, to whoever still reads them."""
    with suppress(BrokenPipeError):
        for what, value in report.lines:
            print(f"{what:12} {value}")
        for warning in report.warnings:
            print(f"{'warning':12} {warning}")
        for found in report.problems:
            print(f"{'problem':12} {found}")


if __name__ == "__main__":
    end_process(main())
