"""Text that any machine with this project has: transformers' own model code, or a folder of the user's.

A folder is split into training and held-out by a hash of the first part of each file's relative path (for transformers:
the model family), so that every command that is given the same folder agrees on which text nobody has trained on.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path

from domino_jax.errors import DominoError

HELD_OUT_SHARE = 20  # one first-level folder (or file) in this many


def model_code() -> Path:
    """The folder of the installed transformers' model implementations (Apache-2.0), found without importing it."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        raise DominoError("transformers is not installed; --text takes a folder of text files.")
    return Path(spec.origin).parent / "models"


def read_texts(folder: Path | None, files: str = "modeling_*.py") -> tuple[list[str], list[str]]:
    """All files under `folder` (transformers' models when None) whose name matches the pattern `files`.

    Returns:
        The training texts and the held-out texts, each in the order of their paths.

    Raises:
        DominoError: the folder is missing, or holds too few such files.
    """
    folder = folder or model_code()
    train, held_out = [], []
    for file in sorted(folder.rglob(files)):
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (UnicodeDecodeError, OSError):
            continue
        digest = hashlib.sha256(file.relative_to(folder).parts[0].encode()).digest()
        (held_out if digest[0] % HELD_OUT_SHARE == 0 else train).append(text)
    if not train or not held_out:
        raise DominoError(f"{folder} has too few files named {files} to train on and hold some out.")
    return train, held_out
