"""Which target a command means."""

from pathlib import Path

from rich.console import Console

from convert import registry


def find(target: str, flag: str = "--target") -> Path:
    """The folder of a target by a name such as qwen3-4b, a folder, or org/repo on the Hub, fetched where needed.

    Raises:
        DominoError: nothing is found under it, or fetching fails.
    """
    return registry.resolve_folders(target, registry.NO_DRAFT, Console(stderr=True), flag=flag)[0]
