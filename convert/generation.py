"""How a checkpoint says that it should be sampled: generation_config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.values import is_number, shown
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.parsing import parse_json
from domino_jax.sampling import LEAST_PENALTY

NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def recommended_sampling(folder: Path) -> dict[str, float]:
    """Sampling parameters of a folder's generation_config.json, by their names; nothing where there is no such file.

    Where it says that nothing is to be sampled, the temperature is 0.

    Raises:
        DominoError: the file can't be read, or one of them is no number.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DominoError(f"{path} can't be read: {first_line(error)}.") from None
    if not isinstance(found, Mapping):
        raise DominoError(f"{path} must be a JSON object.")
    given: dict[str, Any] = {name: found[name] for name in NAMES if found.get(name) is not None}
    for name, value in given.items():
        least = LEAST_PENALTY if name == "repetition_penalty" else 0
        if not is_number(value) or value < least:
            raise DominoError(f"{path} has {name} {shown(value)}, expected a number of at least {least:g}.")
    if "top_k" in given:
        given["top_k"] = int(given["top_k"])
    return given | ({"temperature": 0.0} if found.get("do_sample") is False else {})
