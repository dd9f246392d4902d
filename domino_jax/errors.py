"""The one exception whose message is written for the person at the terminal."""


class DominoError(Exception):
    """Something the user can act on, in one sentence: what was expected, found, and what to do.

    The command lines print it without a traceback and exit with status 1.
    """
