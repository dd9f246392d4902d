"""What an output was begun with, kept beside it, so that nothing else goes on with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import hf
from domino_jax.errors import DominoError


def keep_settings(
    file: Path, output: Path, settings: Mapping[str, Any], places: Mapping[str, Any] | None = None
) -> None:
    """Write what decides an output to a JSON file, or compare it with what the output was begun with.

    Args:
        file: read where it is there.
        output: for the error.
        settings: values of JSON; a name that was not known when the output was begun counts as another value.
        places: of what was read, kept beside the settings for people, since folders may move.

    Raises:
        DominoError: the output was begun with other settings.
        OSError: the file can't be written.
    """
    if file.exists():
        before = hf.read_json(file)
        other = [name for name in settings if before.get(name) != settings[name]]
        if other:
            raise DominoError(
                f"{output} was begun with other settings: "
                + ", ".join(f"{name} was {before.get(name)!r} and is {settings[name]!r}" for name in other)
                + f"; give what {file.name} says to go on, or another --out."
            )
    hf.write_json(file, {**(places or {}), **settings})
