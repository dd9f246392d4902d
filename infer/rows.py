"""What a row of prompts says: its messages, and how much to generate."""

from collections.abc import Mapping
from typing import Any

from convert.messages import LeftOut, Message, parse_messages
from domino_jax.errors import DominoError


def messages_of_row(row: Mapping[str, Any], where: str) -> list[Message]:
    """The messages of a row that has them, as chat templates take them.

    Raises:
        DominoError: they are not of a known form.
    """
    try:
        return parse_messages(row["messages"])
    except LeftOut as error:
        raise DominoError(f"{where}: {error.sentence}.") from None
    except ValueError as error:
        raise DominoError(f"{where} has messages that can't be read: {error}.") from None


def max_new_tokens(row: Mapping[str, Any], where: str) -> int | None:
    """A row's own limit of tokens to generate, if it has one.

    Raises:
        DominoError: it is not a whole number of at least 1.
    """
    limit = row.get("max_new_tokens")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise DominoError(f"{where} has max_new_tokens {limit!r}, expected an integer of at least 1.")
    return limit
