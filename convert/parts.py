"""A target and its second view, apart and together: tensors are copied as they are, one after another."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert import hf
from convert.configs import read_target_config
from convert.drafters import DUAL_VIEW
from convert.dual_view import holds_both
from convert.folders import HF, appearing, folder_format
from convert.tensors import account_tensors, compare_derived, open_tensors, some
from domino_jax.config import ARCHITECTURES, DecoderConfig, check_pair
from domino_jax.drafters.dual_view import MARK, DualViewConfig
from domino_jax.errors import DominoError

Part = Literal["base", "view"]
BASE, VIEW = "base", "view"
OF_VIEW = (  # fields of config.json
    *("block_size", "mask_token_id", "r", "lora_alpha"),
    *("projector_type", "gru_hidden_dim", "emb_dim", "pure_draft_prefix_len"),
)


def write_part(source: Path, destination: Path, part: Part) -> tuple[str, str]:
    """Write a target without its second view, or the second view alone.

    Returns:
        What was read and what was written, in words.

    Raises:
        DominoError: the source does not hold both, or the destination is in the way or can't be written.
    """
    raw = _config_file(source)
    if not holds_both(raw, source):
        raise DominoError(f"--part is for a target with a second view (OrthrusLM), and {source} holds no such pair.")
    file = source / "config.json"
    target = read_target_config(raw, file)
    config = target if part == BASE else DUAL_VIEW.read(raw, None, file)[0]
    tensors = {n: read for n, read in _tensors(source, config).items() if (MARK in n) == (part == VIEW)}
    kept = {name: value for name, value in raw.items() if part == VIEW or name not in OF_VIEW}
    architecture = DualViewConfig.alone if part == VIEW else ARCHITECTURES[target.family]
    with appearing(destination, [source]) as partial:
        _write(partial, tensors, kept | {"architectures": [architecture]})
        if part == BASE:
            hf.copy_companions(source, partial)
    return "a target with a second view", f"its {part}"


def join_parts(base: Path, view: Path, destination: Path) -> tuple[str, str]:
    """Write a target and a second view of it as one model, as the public ones are.

    Args and errors: see `write_part`; the two must fit.
    """
    ours, theirs = _config_file(base), _config_file(view)
    if holds_both(ours, base) or not DUAL_VIEW.holds(theirs):
        raise DominoError(f"a target and a second view are joined; found {base} and, as --view, {view}.")
    target = read_target_config(ours, base / "config.json")
    config, _ = DUAL_VIEW.read(theirs, None, view / "config.json")
    check_pair(target, config)
    own = {name: read for name, read in _tensors(view, config).items() if MARK in name}
    raw = ours | {name: theirs[name] for name in OF_VIEW if name in theirs}
    with appearing(destination, [base, view]) as partial:
        _write(partial, _tensors(base, target) | own, raw | {"architectures": [DualViewConfig.architecture]})
        hf.copy_companions(base, partial)
    return "a target and its second view", "both in one"


Tensors = Mapping[str, Callable[[], np.ndarray]]


def _config_file(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise DominoError(f"{folder} is not a folder.")
    if folder_format(folder) != HF:
        raise DominoError(f"{folder} holds {folder_format(folder)} files; parts are of Hugging Face's safetensors.")
    return hf.read_json(folder / "config.json")


def _tensors(folder: Path, config: DecoderConfig) -> dict[str, Callable[[], np.ndarray]]:
    """All tensors of a folder, by the names in its files, once those of a model are found whole."""
    files = open_tensors(folder)
    account = account_tensors(config, files.stored)
    problems = account.problems or compare_derived(config, account, files)
    if problems:
        raise DominoError(f"{folder} does not hold the model of its config.json: {some(problems)}.")
    return {name: lambda stored=stored: files.read(stored) for name, stored in files.stored.items()}


def _write(folder: Path, tensors: Tensors, raw: Mapping[str, Any]) -> None:
    hf.write_tensors(folder, ((name, read()) for name, read in tensors.items()), raw)
