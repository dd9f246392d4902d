"""Rows of JSON lines files, each with its place for errors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from domino_jax.errors import DominoError


def read_jsonl(path: Path, what: str) -> Iterator[tuple[Any, str]]:
    """Each row of a file that is not blank, parsed as it is reached, and where it stands ("FILE, line 3").

    Args:
        what: the file should hold, for the error of an empty one ("prompts").

    Raises:
        DominoError: the file can't be read or is empty, or a row is not JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise DominoError(f"{path} can't be read: {error}.") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DominoError(f"{path} has no {what}.")
    for number, line in numbered:
        where = f"{path}, line {number}"
        try:
            yield json.loads(line), where
        except ValueError as error:
            raise DominoError(f"{where} is not JSON: {error}.") from None


def max_new_tokens(row: dict[str, Any], where: str) -> int | None:
    """A row's own limit of tokens to generate, if it has one.

    Raises:
        DominoError: it is not a whole number of at least 1.
    """
    limit = row.get("max_new_tokens")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise DominoError(f"{where} has max_new_tokens {limit!r}, expected an integer of at least 1.")
    return limit
