"""A model's folder, whichever of the two forms its weights have."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import hf, orbax
from domino_jax.config import DecoderConfig, DraftConfig, TargetConfig
from domino_jax.errors import DominoError


def read_config(folder: Path, num_target_layers: int | None = None) -> TargetConfig | DraftConfig:
    """The config of the model in `folder`.

    Raises:
        DominoError: there is no such folder or config.json, or the model is not supported.
    """
    if not folder.is_dir():
        raise DominoError(f"{folder} is not a folder.")
    return hf.parse_config(hf.read_json(folder / "config.json"), num_target_layers)


def load(
    folder: Path,
    config: DecoderConfig,
    dtype: Any = None,
    progress: hf.Progress | None = None,
    put: hf.Put = hf.on_device,
) -> Any:
    """The weights of a Hugging Face or Orbax folder as a module; see `hf.load` and `orbax.load`."""
    if orbax.is_orbax(folder):
        return orbax.load(folder, config, dtype, put)
    return hf.load(folder, config, dtype, progress, put)


def convert(source: Path, destination: Path, progress: hf.Progress | None = None) -> tuple[str, str]:
    """Write the model of `source` in the other form: Hugging Face to Orbax, Orbax to Hugging Face.

    Every tensor of the model keeps its values and dtype, config.json and the tokenizer's files their bytes.
    (A tied target's second copy of its embeddings is not kept, and tensors that older drafters name otherwise
    come back under today's names.) The destination appears when it is whole.

    Returns:
        The names of the two forms, from and to.

    Raises:
        DominoError: the source is no whole model, or the destination is in the way or can't be written.
    """
    destination = destination.absolute()
    if not source.is_dir():
        raise DominoError(f"{source} is not a folder.")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise DominoError(f"{destination} exists and is not an empty folder; give another destination.")
    raw: Mapping[str, Any] = hf.read_json(source / "config.json")
    config = hf.parse_config(raw, _depth(raw))
    to_hf = orbax.is_orbax(source)
    module = load(source, config, progress=progress, put=hf.on_host)
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        if to_hf:
            hf.save(partial, module, config, raw)
        else:
            orbax.save(partial, module)
        shutil.copyfile(source / "config.json", partial / "config.json")
        hf.copy_companions(source, partial)
        if destination.exists():
            destination.rmdir()
        partial.replace(destination)
    except OSError as error:
        raise DominoError(f"{destination} can't be written: {error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ("Orbax", "Hugging Face") if to_hf else ("Hugging Face", "Orbax")


def _depth(raw: Mapping[str, Any]) -> int | None:
    """A depth of the target that fits a drafter's taps: its files need not state the true one, nor its weights it."""
    draft = raw.get("dflash_config")
    taps = draft.get("target_layer_ids") if isinstance(draft, Mapping) else None
    if not isinstance(taps, list) or not taps or not all(isinstance(i, int) for i in taps):
        return None
    return max(taps) + 1
