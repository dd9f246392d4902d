"""Text that any machine has: the Python standard library's own sources, or a folder of the user's.

Files are split into training and held-out by a hash of their relative path, so that every command
that is given the same folder agrees on which text nobody has trained on.
"""

import hashlib
import sysconfig
from pathlib import Path

from domino_jax.errors import DominoError

# Tables, generated text and test suites, which read like nothing a person writes.
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "__pycache__",
}
HELD_OUT_SHARE = 20  # one file in this many


def standard_library() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def read_texts(folder: Path | None, suffix: str = ".py") -> tuple[list[str], list[str]]:
    """All files under `folder` (the standard library when None): training texts, held-out texts.

    Raises:
        DominoError: the folder is missing or holds no such file.
    """
    folder = folder or standard_library()
    train, held_out = [], []
    for file in sorted(folder.rglob(f"*{suffix}")):
        name = file.relative_to(folder)
        if SKIPPED_FOLDERS & set(name.parts) or not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        (held_out if digest[0] % HELD_OUT_SHARE == 0 else train).append(text)
    if not train or not held_out:
        raise DominoError(f"{folder} has too few {suffix} files to train on and hold some out.")
    return train, held_out
