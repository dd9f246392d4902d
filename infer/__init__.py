"""What a user runs: `from infer import load`, `python -m infer`, and its measurements.

model = load("qwen3-4b")
for text in model.stream("Why is the sky blue?"):
    print(text, end="")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import domino_jax.runtime.module_path  # noqa: F401  (before what a working folder may hold, too)

if TYPE_CHECKING:
    from infer.chat import Chat as Chat
    from infer.model import CompletionOutput as CompletionOutput
    from infer.model import Model as Model
    from infer.model import load as load

__all__ = ["Chat", "CompletionOutput", "Model", "load"]

_HOMES = {"Chat": "infer.chat", "CompletionOutput": "infer.model", "Model": "infer.model", "load": "infer.model"}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for: JAX takes seconds to import."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
