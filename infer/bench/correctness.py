"""Whether a device computes what it should: forms of attention and of experts, and drafters against plain decoding.

    python -m infer.bench correctness attention --json attention.json
    python -m infer.bench correctness drafters --json drafters.json

`attention`: every form that this device can run, against the plain one in float32 there. `drafters`: the shipped pair
in float32 with every kind of drafter; greedy output must be token for token that of plain decoding. The file is written
anew after every form and drafter, so that a run that is cut off, or ended by a kernel, leaves what it found.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import DisallowNone, Positional

from convert.options import UNSET, Dtype, check_count, check_file
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.command import UsageError, end_process, parse_words, run_command

TRIED: dict[str, list[str]] = {
    "all drafts": [],
    "1, 3 and auto": ["--num-draft-tokens", "1", "3", "auto"],
    "candidates": ["--head-candidates", "64"],
    "int8": ["--draft-weights", "int8"],
    "float8": ["--draft-weights", "float8"],
    "int8 target": ["--weights", "int8", "--draft-weights", "int8"],
    "float8 target": ["--weights", "float8"],
    "tree": ["--tree", "15"],
    "n-grams": ["--draft", "ngram"],
    "n-grams beside": ["--draft", "demo+ngram"],
    "pallas": ["--attention", "pallas"],
}
COMMON = ["--dtype", "float32", "--no-transformers", "--no-phases", "--rounds", "1"]


@dataclass(frozen=True)
class Correctness:
    """Check what this device computes: forms of attention and experts, or every drafter against plain decoding."""

    what: Positional[Literal["attention", "drafters"]]
    """what to check"""
    json: Path
    """file for what is found"""
    shapes: str = "demo"
    """attention: whose heads and blocks, a public shape or the shipped pair's"""
    dtypes: Annotated[tuple[Dtype, ...], UNSET] = ()
    """attention: dtypes of the forms (default: float32 on CPUs, both elsewhere)"""
    num_prompts: int = 4
    """drafters: of the demo's prompts"""
    new_tokens: int = 64
    """drafters: of each answer"""
    only: Annotated[str | None, DisallowNone, UNSET] = None
    """drafters: one of them alone"""


def check_correctness(options: Correctness) -> None:
    """Check the options without JAX.

    Raises:
        UsageError: a value is out of range, or the file can't be written.
    """
    check_count("num_prompts", options.num_prompts)
    check_count("new_tokens", options.new_tokens, least=2)
    if options.only is not None and options.only not in TRIED:
        raise UsageError(f"--only is one of {', '.join(TRIED)}; found {options.only[:80]!r}.")
    check_file("json", options.json)


def run_correctness(options: Correctness) -> None:
    """Check, print a line for each, and write what is found.

    Raises:
        UsageError: the words make no sense.
        DominoError: something differs or fails.
    """
    check_correctness(options)
    from domino_jax.runtime.compile_cache import enable_compile_cache
    from domino_jax.runtime.files import write_text

    enable_compile_cache()
    found: list[dict[str, Any]] = []
    for check in attention_checks(options) if options.what == "attention" else drafter_checks(options):
        if found and found[-1]["status"] == "begun":
            found.pop()
        found.append(check)
        write_text(options.json, json.dumps(found, indent=1) + "\n")
        if check["status"] != "begun":
            print(sentence(check), file=sys.stderr)
    wrong = [check for check in found if check["status"] in ("differs", "failed")]
    if wrong:
        raise DominoError(f"{len(wrong)} of {len(found)} are wrong here, first {sentence(wrong[0])}.")


def sentence(check: dict[str, Any]) -> str:
    """One check in a line."""
    words = " ".join(str(check[key]) for key in ("group", "case", "backend", "dtype") if check.get(key))
    more = check.get("reason") or (
        f"error {check['error']:.1e} of at most {check['bound']:.0e}" if "error" in check else ""
    )
    return f"{words}: {check['status']}" + (f" ({more.rstrip('.')})" if more else "")


def attention_checks(options: Correctness) -> Any:
    """Those of `infer.bench.forms`, in each dtype."""
    from domino_jax.config import DraftConfig
    from domino_jax.runtime.devices import own_devices
    from infer.bench.forms import check_forms
    from infer.bench.probe import pair_of

    pair = pair_of(options.shapes)
    assert isinstance(pair.draft, DraftConfig)
    device = own_devices()[0]
    for dtype in options.dtypes or (("float32",) if device.platform == "cpu" else ("float32", "bfloat16")):
        yield from check_forms(pair.target, pair.draft, dtype, device)


def drafter_checks(options: Correctness) -> Any:
    """Every drafter of TRIED on the shipped pair, by the benchmark's own comparison with plain decoding."""
    from rich.console import Console

    from infer.bench.options import Bench, check_bench
    from infer.bench.run import load_measured
    from infer.bench.sweep import measure_sweep

    console = Console(quiet=True)
    counts = ["--num-prompts", str(options.num_prompts), "--new-tokens", str(options.new_tokens)]
    for case in (options.only,) if options.only else TRIED:
        check = {"group": "drafters", "case": case, "dtype": "float32"}
        yield check | {"status": "begun"}
        try:
            bench = parse_words(Bench, [*COMMON, *counts, *TRIED[case]], prog="python -m infer.bench")
            check_bench(bench)
            loaded, _ = load_measured(bench, console)
        except DominoError as error:
            yield check | {"status": "refused", "reason": first_line(error)}
            continue
        try:
            with loaded.context():
                rows = [row for rows in measure_sweep(bench, loaded, None, console) for row in rows]
        except Exception as error:  # whatever a program that does not compile or run here raises
            yield check | {"status": "failed", "reason": first_line(error)}
            continue
        for row in rows[1:]:
            equal = row["same_tokens_as_lean"]
            drafts = f"{row['drafts']} drafts" if row["drafts"] != "auto" else "auto"
            yield check | {
                "status": "equal" if equal else "differs",
                "backend": f"{row['mode']}, {drafts}",
                "tau": row["tau"],
                **(
                    {}
                    if equal
                    else {"reason": f"other tokens in {row['other_answers']} of {options.num_prompts} answers"}
                ),
            }


def main(argv: Sequence[str] | None = None, prog: str = "python -m infer.bench correctness") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Correctness, run_correctness, argv, prog=prog)


if __name__ == "__main__":
    end_process(main())
