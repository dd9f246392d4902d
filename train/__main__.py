"""Train a Domino drafter for a frozen target; what belongs to a training is a subcommand.

python -m train --config qwen3-4b --data data.jsonl --out runs/drafter
python -m train --target DIR --data data.jsonl --out runs/drafter
python -m train --resume --out runs/drafter
python -m train regenerate --help
"""

from collections.abc import Sequence

from domino_jax.errors import DominoError
from domino_jax.runtime.command import Subcommand, end_process, exit_code, find_subcommand, list_subcommands
from domino_jax.runtime.processes import join_processes
from train.options import parse_options

SUBCOMMANDS = {
    "regenerate": Subcommand("train.regenerate.command", "let the target write the answers of your data"),
    "instructions": Subcommand("train.regenerate.instructions", "let the target ask itself questions"),
    "capture": Subcommand("train.features.capture", "store the target's features for a corpus"),
    "validate": Subcommand("train.evaluate.validate", "measure a drafter's acceptance length"),
    "calibrate": Subcommand("train.evaluate.calibrate", "make a drafter's confidences true"),
    "ablation": Subcommand("train.evaluate.ablation", "compare with and without head and curriculum"),
    "bench": Subcommand("train.bench.command", "time a training step"),
    "demo": Subcommand("train.demo.command", "make the shipped pair from nothing"),
    "pretrain": Subcommand("train.demo.pretrain", "pre-train a small target from text"),
    "prompts": Subcommand("train.demo.prompts", "cut prompts out of text"),
}


def main(argv: Sequence[str] | None = None, prog: str = "python -m train") -> int:
    """Run the command line; returns the exit code."""
    subcommand = find_subcommand(SUBCOMMANDS, argv, prog)
    return exit_code(subcommand or (lambda: _train(argv, prog)))


def _train(argv: Sequence[str] | None, prog: str) -> None:
    options = parse_options(argv, prog, f"Subcommands ({prog} NAME --help):\n{list_subcommands(SUBCOMMANDS)}")
    join_processes(options.processes.resolve(), saves=True)
    from domino_jax.runtime.compile_cache import enable_compile_cache
    from train.run import run_training  # brings in JAX, whose devices the processes must have met for

    enable_compile_cache()
    try:
        run_training(options)
    except OSError as error:
        raise DominoError(f"{error}; the checkpoints in {options.out} are as they were.") from None


if __name__ == "__main__":
    end_process(main())
