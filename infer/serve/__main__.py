"""`python -m infer.serve`: a model behind OpenAI's API."""

import os
from collections.abc import Sequence

from domino_jax.runtime.command import end_process, run_command
from domino_jax.runtime.extras import require
from infer.serve.options import Serve


def main(argv: Sequence[str] | None = None, prog: str = "python -m infer.serve") -> int:
    """Run the command line; returns the exit code."""
    return run_command(Serve, _serve, argv, prog=prog)


def _serve(options: Serve) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        UsageError: the options make no sense.
        DominoError: the model can't be loaded, or the port is taken.
    """
    options.check()
    require("starlette", "uvicorn", "prometheus_client")
    from infer.serve.run import run_server

    run_server(options, os.environ.get("DOMINO_API_KEY") if options.api_key is None else options.api_key)


if __name__ == "__main__":
    end_process(main())
