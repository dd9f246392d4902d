"""`python -m infer.bench`."""

from domino_jax.runtime.command import end_process
from infer.bench import main

if __name__ == "__main__":
    end_process(main())
