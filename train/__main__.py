"""Train a Domino drafter for a frozen Qwen3 target.

python -m train --config qwen3-4b --data data.jsonl --out runs/drafter
python -m train --target DIR --data data.jsonl --out runs/drafter
python -m train --resume --out runs/drafter
"""

import sys

from domino_jax.errors import DominoError
from domino_jax.runtime.extras import explain_missing_extra
from domino_jax.runtime.processes import join_processes, resolve_processes
from train.options import parse_options


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        options = parse_options(argv)
        join_processes(resolve_processes(options.coordinator, options.num_processes, options.process_id))
        with explain_missing_extra():
            from train.run import run_training  # brings in JAX, whose devices the processes must have met for

        try:
            run_training(options)
        except OSError as error:
            raise DominoError(f"{error}; the checkpoints in {options.out} are as they were.") from None
    except DominoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
