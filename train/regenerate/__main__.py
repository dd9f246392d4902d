"""`python -m train.regenerate`."""

import sys

from domino_jax.runtime.command import run_module

if __name__ == "__main__":
    sys.exit(run_module("train.regenerate.command"))
