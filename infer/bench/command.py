"""The command line of the benchmarks; nothing here imports JAX before the words are checked."""

from collections.abc import Sequence

from domino_jax.runtime.command import Subcommand, exit_code, find_subcommand, list_subcommands, parse_words
from infer.bench.options import Bench, check_bench

SUBCOMMANDS = {
    "device": Subcommand("infer.bench.device", "all that a new device is to show, within minutes: one page"),
    "correctness": Subcommand("infer.bench.correctness", "does this device compute what it should"),
    "scan": Subcommand("infer.bench.scanned", "unrolled layers against scanned ones"),
    "mixed": Subcommand("infer.bench.mixed", "requests of mixed lengths: slots against closed batches"),
    "samplers": Subcommand("infer.bench.samplers", "ways of drafting at a temperature: acceptance and speed"),
    "shares": Subcommand("infer.bench.shares", "rows that share drafts: equally, by acceptance, by confidence"),
    "compile": Subcommand("infer.bench.compile", "programs for TPUs that are not here: copies, memory, estimated cost"),
    "products": Subcommand("infer.bench.products", "what compiled programs make of 8-bit matrices, here and on TPUs"),
    "serve": Subcommand("infer.bench.serve", "servers of OpenAI's API under load, several in turn"),
    "plan": Subcommand("infer.bench.plan", "what fits on devices that need not be here: weights, caches, streams"),
    "checkpoints": Subcommand("infer.bench.checkpoints", "a checkpoint through all its forms: memory and rate"),
    "spread": Subcommand("infer.bench.spread", "the spread of figures over several runs, as Markdown"),
}
EPILOG = f"Subcommands, as the first word:\n{list_subcommands(SUBCOMMANDS)}"


def main(argv: Sequence[str] | None = None, prog: str = "python -m infer.bench") -> int:
    """Run the command line; returns the exit code."""
    subcommand = find_subcommand(SUBCOMMANDS, argv, prog)
    if subcommand:
        return subcommand()

    def bench() -> int:
        options = parse_words(Bench, argv, prog=prog, epilog=EPILOG)
        check_bench(options)
        from infer.bench.run import run_bench

        return run_bench(options)

    return exit_code(bench)
