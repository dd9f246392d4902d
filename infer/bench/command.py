"""The command line: words to options, figures to tables and files."""

import json
import sys

import tyro
from rich.console import Console

from domino_jax import sharding
from domino_jax.errors import DominoError
from infer.bench.options import Bench
from infer.bench.report import show
from infer.bench.sweep import measure
from infer.models import load, resolve


def main(argv: list[str] | None = None) -> int:
    options = tyro.cli(Bench, args=argv, prog="python -m infer.bench")
    console = Console(stderr=True)
    try:
        if min(*options.batch_sizes, options.new_tokens - 1, options.rounds, options.prompt_tokens) < 1:
            raise DominoError(
                "--batch-sizes, --rounds and --prompt-tokens must be at least 1, --new-tokens at least 2."
            )
        if max(options.batch_sizes) > options.num_prompts:
            raise DominoError(f"--num-prompts {options.num_prompts} is less than the largest of --batch-sizes.")
        if not 0 <= options.temperature < float("inf") or options.seed < 0:
            raise DominoError("--temperature and --seed must be 0 or more.")
        if options.json and not options.json.absolute().parent.is_dir():
            raise DominoError(f"{options.json.absolute().parent} is not a folder; --json is to be written there.")
        target, drafter = resolve(options.model, options.draft)
        with console.status("loading"):
            mesh = sharding.parse(options.mesh) if options.mesh else None
            loaded = load(target, drafter, options.dtype, mesh=mesh)
        if loaded.mesh and any(batch % loaded.mesh.shape[sharding.DATA] for batch in options.batch_sizes):
            raise DominoError("--batch-sizes must be multiples of the mesh's data axis.")
        if options.drafts and loaded.configs.draft is None:
            raise DominoError("--drafts needs a drafter: give one with --draft DIR.")
        for warning in loaded.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        with loaded.context():
            rows = measure(options, loaded, target, console)
        try:
            show(rows, Console())
        finally:  # neither a full disk nor a closed pipe loses both
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    except (DominoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
