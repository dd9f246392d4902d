"""The files that belong to a model beside its config.json and weights: what conversion copies and the Hub is asked for.

Pickles and Python files are not among them: they could run code.
"""

from pathlib import Path, PurePosixPath

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "tokenizer.model",
)  # one of them at least
TEMPLATES = "additional_chat_templates"  # a folder of .jinja files
# What decides what a model is asked and where it stops.
TEXT_FILES = (
    "generation_config.json",
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
CARDS = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt", "USE_POLICY.md")


def is_text_file(name: str) -> bool:
    """Whether a file of a model, by its path within the folder, is among those that decide what it is asked."""
    path = PurePosixPath(name)
    return name in TEXT_FILES or (path.parent == PurePosixPath(TEMPLATES) and path.suffix == ".jinja")


def text_files(folder: Path) -> list[Path]:
    """Those files of a folder, by name."""
    found = (*folder.iterdir(), *(folder / TEMPLATES).glob("*.jinja"))
    return sorted(file for file in found if file.is_file() and is_text_file(file.relative_to(folder).as_posix()))


def companions(folder: Path) -> list[Path]:
    """All that belongs to the model in a folder beside its config.json and weights, its card and licence too."""
    return [*text_files(folder), *(folder / name for name in CARDS if (folder / name).is_file())]
