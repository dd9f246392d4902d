"""The one exception whose message is written for the person at the terminal."""


class DominoError(Exception):
    """Something the user can act on, in one sentence: what was expected, found, and what to do.

    The command lines print it without a traceback and exit with status 1.
    """


def first_line(error: BaseException) -> str:
    """What an exception says, in one line without a full stop: its first, and the next where that ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".:")
