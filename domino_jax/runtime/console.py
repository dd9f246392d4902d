"""The console script `domino`: one command in front of all others, which are loaded by name."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from domino_jax.runtime.command import Subcommand, UsageError, end_process, exit_code, find_subcommand, list_subcommands

SUBCOMMANDS = {
    "generate": Subcommand("infer.__main__", "generate text; as python -m infer"),
    "chat": Subcommand("infer.__main__", "talk to a model", "main_chat"),
    "serve": Subcommand("infer.serve.__main__", "serve OpenAI's API; as python -m infer.serve"),
    "bench": Subcommand("infer.bench.command", "measure decoding; as python -m infer.bench"),
    "convert": Subcommand("convert.__main__", "convert or check a checkpoint; as python -m convert"),
    "train": Subcommand("train.__main__", "train a drafter; as python -m train"),
}
HELP = f"""usage: domino COMMAND [OPTIONS]

Domino in JAX: lossless speculative decoding with a parallel drafter.

{list_subcommands(SUBCOMMANDS)}

domino COMMAND --help has the options of a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    subcommand = find_subcommand(SUBCOMMANDS, words, "domino")
    return subcommand() if subcommand else exit_code(lambda: _help(words))


def _help(words: list[str]) -> None:
    if words and words[0] not in ("-h", "--help"):
        raise UsageError(f"domino has no command {words[0]}; see domino --help.")
    print(HELP)


def run() -> NoReturn:
    """The console script."""
    end_process(main())


if __name__ == "__main__":
    run()
