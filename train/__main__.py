"""Train a Domino drafter for a frozen Qwen3 target.

python -m train --config qwen3-4b --data data.jsonl --out runs/drafter
python -m train --target DIR --data data.jsonl --out runs/drafter
python -m train --resume --out runs/drafter
"""

import sys

from domino_jax.errors import DominoError
from domino_jax.runtime.processes import join, settle
from train.config import parse


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        options = parse(argv)
        join(settle(options.coordinator, options.num_processes, options.process_id))
        from train.run import run  # brings in JAX, whose devices the processes must have met for

        try:
            run(options)
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
