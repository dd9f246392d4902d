"""What the user types in a chat."""

from collections.abc import Iterator
from contextlib import suppress

from infer.output import say


def lines() -> Iterator[str]:
    """The lines typed at the terminal, without empty ones, until Ctrl-D, or Ctrl-C instead of a line."""
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing for input())
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError as error:
            say(f"error: that line is not text: {error}.")
            continue
        if line:
            yield line
