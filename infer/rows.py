"""What a row of prompts says: its conversation or ids, and how much to generate."""

from collections.abc import Mapping
from typing import Any

from convert.messages import LeftOut, Message, conversation_of
from convert.values import INT_LIMIT, is_number, is_whole, shown
from domino_jax.errors import DominoError, first_line

# Keys that a row can't have: they hold for all prompts of a run, and would be ignored without a word.
FLAGS = ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "max_tokens")


def conversation_in_row(row: Mapping[str, Any], where: str) -> tuple[list[Message], list[Any] | None] | None:
    """The messages and tools of a row, as chat templates take them; None for a row of another form.

    Raises:
        DominoError: they are not of a known form, or there is no message.
    """
    try:
        found = conversation_of(row)
    except LeftOut as error:
        raise DominoError(f"{where}: {error.sentence}.") from None
    except ValueError as error:
        raise DominoError(f"{where} has messages that can't be read: {first_line(error)}.") from None
    if found is not None and not found[0]:
        raise DominoError(f"{where} has no message.")
    return found


def max_new_tokens(row: Mapping[str, Any], where: str) -> int | None:
    """A row's own limit of tokens to generate, if it has one.

    Raises:
        DominoError: it is not a whole number of at least 1, or the row has another setting, which no row may have.
    """
    for name in FLAGS:
        if is_number(row.get(name)) or (name == "stop" and row.get(name)):
            flag = "max-new-tokens" if name == "max_tokens" else name.replace("_", "-")
            kept = " (of a row: max_new_tokens)" if name == "max_tokens" else ", which holds for all rows"
            raise DominoError(f"{where} has {name}, which is no setting of a row: give --{flag}{kept}.")
    limit = row.get("max_new_tokens")
    if limit is not None and not (is_whole(limit) and 1 <= limit < INT_LIMIT):
        raise DominoError(
            f"{where} has max_new_tokens {shown(limit)}, expected a whole number of at least 1 and below 2^31."
        )
    return limit
