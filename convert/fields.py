"""A model's JSON files as objects; `domino_jax.fields` reads their values."""

from pathlib import Path
from typing import Any

from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.parsing import parse_json, read_text


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        DominoError: the file is missing, or is not a JSON object.
    """
    try:
        value = parse_json(read_text(path))
    except FileNotFoundError:
        raise DominoError(f"{path} does not exist; a model folder needs a {path.name}.") from None
    except (OSError, ValueError) as error:
        raise DominoError(f"{path} can't be read as JSON: {first_line(error)}.") from None
    if not isinstance(value, dict):
        raise DominoError(f"{path} holds a {type(value).__name__}, expected a JSON object.")
    return value
