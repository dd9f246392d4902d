"""What a row of prompts says besides its prompt."""

from collections.abc import Mapping
from typing import Any

from domino_jax.errors import DominoError


def max_new_tokens(row: Mapping[str, Any], where: str) -> int | None:
    """A row's own limit of tokens to generate, if it has one.

    Raises:
        DominoError: it is not a whole number of at least 1.
    """
    limit = row.get("max_new_tokens")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise DominoError(f"{where} has max_new_tokens {limit!r}, expected an integer of at least 1.")
    return limit
