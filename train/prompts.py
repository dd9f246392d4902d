"""`python -m train.prompts`."""

from domino_jax.runtime.command import end_process, run_module

if __name__ == "__main__":
    end_process(run_module("train.demo.prompts"))
