"""Rows of figures that are kept whatever ends the measuring, and the prompts that small benchmarks answer."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import DisallowNone

from convert.options import GROUP, UNSET, ModelOptions, check_count, check_file, check_real
from domino_jax.runtime.command import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from convert.loading import LoadedModel
    from infer.bench.options import Bench


@dataclass(frozen=True)
class AnswerOptions:
    """Which model answers which prompts, and at which temperatures; a benchmark has defaults of its own."""

    model: Annotated[ModelOptions, GROUP] = field(default_factory=ModelOptions)
    temperatures: tuple[float, ...] = (0.0,)
    """each in turn; 0 is greedy"""
    batch_size: int = 8
    """sequences that run together"""
    num_prompts: int = 64
    """prompts of a round"""
    prompt_tokens: int = 48
    """of each prompt; longer ones are cut, shorter ones left out"""
    new_tokens: int = 64
    """of each answer"""
    prompts: Annotated[Path | None, DisallowNone, UNSET] = None
    """JSONL as for python -m infer.bench; the default are the demo's own prompts"""
    json: Annotated[Path | None, DisallowNone, UNSET] = None
    """file for the figures: a list of objects, one for each line of each temperature"""

    def check_answers(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UsageError: one does not.
        """
        self.model.check()
        for name in ("batch_size", "num_prompts", "prompt_tokens"):
            check_count(name, getattr(self, name))
        check_count("new_tokens", self.new_tokens, least=2)
        if not self.temperatures:
            raise UsageError("--temperatures needs at least one.")
        for temperature in self.temperatures:
            check_real("temperatures", temperature, "0 or more")
        check_file("json", self.json, self.prompts, self.model.model, self.model.draft)

    def about(self, *more: str) -> dict[str, Any]:
        """The options that each row of figures has, some `more` of a benchmark's own among them."""
        names = (*more, "batch_size", "num_prompts", "prompt_tokens", "new_tokens")
        return {"model": self.model.model} | {name: getattr(self, name) for name in names}


def load_answering(options: AnswerOptions, console: "Console") -> "tuple[LoadedModel, list[list[int]], Bench]":
    """The model, whose answers go on to their last token; the prompts; and both as the benchmark's own options.

    Raises:
        DominoError: a model or file is wrong, or the file has too few prompts.
    """
    from convert.options import load_pair
    from infer.bench.options import Bench
    from infer.bench.prompts import collect_prompts
    from infer.engine import Engine

    o = options
    loaded = replace(load_pair(o.model, console), stop_ids=(), tokenizer=None)
    bench = Bench(
        o.model, prompts=o.prompts, prompt_tokens=o.prompt_tokens, num_prompts=o.num_prompts, new_tokens=o.new_tokens
    )
    return loaded, collect_prompts(bench, loaded, Engine(loaded)).prompts, bench


def keep_rows(
    measured: Iterable[dict[str, Any]], path: Path | None, table: Callable[[Sequence[dict[str, Any]]], str]
) -> list[dict[str, Any]]:
    """Measure, write the figures as they come, and print them in the end, whatever that is.

    Args:
        path: of the figures; none are written when None.
        table: the figures for people.
    """
    from domino_jax.runtime.files import write_text

    rows: list[dict[str, Any]] = []
    try:
        for row in measured:
            rows.append(row)
            if path:
                write_text(path, json.dumps(rows, indent=1) + "\n")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise
    finally:
        if rows:
            print(table(rows))
    return rows
