"""Orthrus's checkpoints: whether a folder holds a target's second view, alone or beside the target."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.gguf import gguf_files
from convert.tensors import SINGLE, open_tensors, tensor_index
from domino_jax.config import ARCHITECTURES
from domino_jax.drafters.dual_view import MARK, DualViewConfig
from domino_jax.errors import DominoError


def holds_view(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json says that there is a second view; its model_type, which is a Qwen3's, says nothing."""
    return bool({DualViewConfig.architecture, DualViewConfig.alone} & _architectures(raw))


def holds_both(raw: Mapping[str, Any], folder: Path | None = None) -> bool:
    """Whether a config.json is of a target with its second view in the same folder.

    Args:
        folder: where the tensors are, which tell it too, by their names; None to go by the config.json alone.
    """
    if holds_view(raw) or folder is None or raw.get("model_type") not in list(ARCHITECTURES):
        return DualViewConfig.architecture in _architectures(raw)
    names = _names(folder)
    return any(MARK in name for name in names) and not all(MARK in name for name in names)


def _architectures(raw: Mapping[str, Any]) -> set[str]:
    names = raw.get("architectures")
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _names(folder: Path) -> list[str]:
    """The tensors of a folder, by its index where there is one; none where they can't be read."""
    try:
        if not (folder / SINGLE).exists() and gguf_files(folder):
            return []
        return list(tensor_index(folder) or open_tensors(folder).stored)
    except DominoError:
        return []  # not fetched yet, in another form, or damaged: who reads them says so
