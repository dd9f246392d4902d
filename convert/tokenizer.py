"""The tokenizer of a model's folder."""

import os
from pathlib import Path
from typing import Any

from domino_jax.errors import DominoError, first_line

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, None if it has no tokenizer files; nothing is fetched, no code is run."""
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    # Without PyTorch, which only its models would need, transformers gives advice on standard error.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its errors are of many kinds, and all mean the same here
        raise DominoError(f"the tokenizer in {folder} can't be loaded: {first_line(error)}.") from None
