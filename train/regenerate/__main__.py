"""`python -m train.regenerate`."""

from domino_jax.runtime.command import end_process, run_module

if __name__ == "__main__":
    end_process(run_module("train.regenerate.command"))
