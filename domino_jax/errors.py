"""The one exception whose message is written for the person at the terminal."""


class DominoError(Exception):
    """Something the user can act on, in one sentence: what was expected, found, and what to do.

    The command lines print it without a traceback and exit with status 1. Names from files and from users are part of
    it: what in them would break the line or steer a terminal is written as an escape.
    """

    def __init__(self, message: object):
        super().__init__(one_line(str(message)))


def one_line(text: str) -> str:
    """Text with line breaks, control characters and lone surrogates as escapes such as \\n."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def first_line(error: BaseException) -> str:
    """What an exception says, in one line without a full stop: its first, and the next where that ends with a colon.

    Of an error of the system, the reason alone: its number means nothing to a reader, and the file is named around it.
    """
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror[0].lower()}{error.strerror[1:]}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".:")
