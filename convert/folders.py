"""A model's folder, whichever of the two forms its weights have."""

import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from convert import hf, orbax
from convert.draft_configs import is_drafter, least_depth, states_depth, with_overrides
from convert.dual_view import holds_both
from convert.packagings import Packaging, copies, packaged, renamed
from convert.quantized import QUANTIZATION
from convert.quantized.writing import GROUP, QuantizingWriter, WrittenForm
from domino_jax.config import CustomDraftConfig, DecoderConfig, DraftConfig, TargetConfig
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.files import check_output, lock_file, lock_folder

PARTIAL = ".partial"
HF, ORBAX, RUN, GGUF = "Hugging Face", "Orbax", "training run", "GGUF"


def read_config(folder: Path, num_target_layers: int | None = None) -> TargetConfig | DraftConfig | CustomDraftConfig:
    """The config of the model in `folder`.

    Raises:
        DominoError: there is no such folder or config.json, or the model is not supported.
    """
    if not folder.is_dir():
        raise DominoError(f"{folder} is not a folder.")
    file = folder / "config.json"
    return hf.parse_config(hf.read_json(file), num_target_layers, file)


def load_weights(
    folder: Path,
    config: DecoderConfig,
    dtype: Any = None,
    progress: hf.Progress | None = None,
    mesh: Mesh | None = None,
    target: Path | None = None,
    form: hf.Form | None = None,
) -> Any:
    """The weights of a folder of any form as a module; see `hf.load_hf` and `orbax.load_orbax`.

    Args:
        target: the folder of a drafter's target.
    """
    if folder_format(folder) in (HF, GGUF):
        return hf.load_hf(folder, config, dtype, progress, mesh, target, form)
    return orbax.load_orbax(folder, config, dtype, progress, mesh, form)


def convert_folder(
    source: Path,
    destination: Path,
    progress: hf.Progress | None = None,
    dtype: Any = None,
    target: Path | None = None,
    form: Packaging | None = None,
    overrides: Mapping[str, Any] | None = None,
    weights: WrittenForm | None = None,
) -> tuple[str, str]:
    """Write the model of `source` in another form: Hugging Face's to Orbax, all others to Hugging Face's.

    Every tensor of the model keeps its values, and its dtype unless another is asked for (a training run's float32
    masters become bfloat16, a GGUF file's blocks and quantized weights float32); config.json and the tokenizer's files
    keep their bytes, but for a quantization_config. (A tied target's second copy of its embeddings is not kept, nor is
    a drafter's of its target's, once they are compared; tensors that others name otherwise come back under today's
    names.) The destination appears when it is whole.

    Args:
        target: the folder of a drafter's target, for drafters with copies of its embeddings or LM head.
        form: of a block drafter, to be Hugging Face's files whatever it was.
        overrides: fields of config.json that take the place of the file's; of a block drafter.
        weights: quantized form of the linear layers, to be Hugging Face's files whatever it was.

    Returns:
        The names of the two forms, from and to.

    Raises:
        DominoError: the source is no whole model, or the destination is in the way or can't be written.
    """
    if not source.is_dir():
        raise DominoError(f"{source} is not a folder.")
    with appearing(destination, [source, *([target] if target else [])]) as partial:
        return _convert(ConvertedModel(source, target, overrides or {}), partial, progress, dtype, form, weights)


@contextmanager
def appearing(destination: Path, sources: Sequence[Path]) -> Iterator[Path]:
    """A new folder to write in; what is in it then is the destination, which appears when it is whole.

    Args:
        sources: what is read meanwhile, and can't be the destination.

    Raises:
        DominoError: the destination is in the way or can't be written.
    """
    destination = destination.absolute()
    check_output(destination, sources=list(sources))
    # An empty folder may be a volume or a link to another disk: what is written goes there, not beside it.
    there = destination.exists()
    with lock_folder(destination) if there else lock_file(destination):
        check_output(destination)  # another conversion may have ended meanwhile
        parent, name = (destination, "") if there else (destination.parent, destination.name)
        partial = parent / f".{name}.{secrets.token_hex(4)}{PARTIAL}"
        earlier = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}{re.escape(PARTIAL)}")
        for left in [file for file in parent.iterdir() if earlier.fullmatch(file.name)]:  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            if partial.parent == destination:
                for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):  # no model without
                    file.replace(destination / file.name)
            else:
                partial.replace(destination)
        except OSError as error:
            raise DominoError(f"{destination} can't be written: {first_line(error)}.") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)


class ConvertedModel(NamedTuple):
    """What is converted."""

    folder: Path
    target: Path | None  # of a drafter
    overrides: Mapping[str, Any]  # of config.json's fields

    def read(self) -> tuple[Mapping[str, Any], TargetConfig | DraftConfig | CustomDraftConfig]:
        """Its config.json, and the config.

        Raises:
            DominoError: it is of no supported model, or of one that has no overrides.
        """
        file = self.folder / "config.json"
        raw: Mapping[str, Any] = hf.read_json(file)
        if self.overrides:
            if not is_drafter(raw):
                raise DominoError(f"--hf-overrides is for a block drafter's config.json; {file} is of another model.")
            raw = with_overrides(raw, self.overrides)
        depth = None if self.target is None else read_config(self.target).num_hidden_layers
        return raw, hf.parse_config(raw, depth or least_depth(raw), file)


def _convert(
    source: ConvertedModel,
    partial: Path,
    progress: hf.Progress | None,
    dtype: Any,
    form: Packaging | None,
    weights: WrittenForm | None,
) -> tuple[str, str]:
    """See `convert_folder`; `partial` is the folder to write."""
    raw, config = source.read()
    folder, target = source.folder, source.target
    if holds_both(raw, folder):
        raise DominoError(f"{folder} holds a target and a second view of it: give --part base or --part view.")
    was = folder_format(folder)
    now = ORBAX if was == HF and form is None and weights is None else HF
    quantized = raw.get(QUANTIZATION) is not None
    raw = {name: value for name, value in raw.items() if name != QUANTIZATION}  # what is written is not
    if was == RUN and not isinstance(config, CustomDraftConfig):  # none of them is trained here
        raw, dtype = config.to_hf(), dtype or jnp.bfloat16  # in today's names, whatever version began the run
    how: dict[str, Any] = {}
    if form is not None:
        if not isinstance(config, DraftConfig):
            raise DominoError(f"--format is for block drafters; {folder} holds another model.")
        if target is None and not states_depth(raw):
            raise DominoError(f"{folder} does not say how many layers its target has: give --target DIR.")
        stored = {name: raw[name] for name in ("dtype", "torch_dtype") if name in raw}
        raw = packaged(config, form) | stored
        how = {"names": renamed(config, form), "more": copies(config, form, target)}
    writer = QuantizingWriter(weights) if weights else None
    if writer:
        raw = {**raw, QUANTIZATION: writer.settings}
        how["written"] = writer.tensors
    if now == HF and was in (HF, GGUF):
        module = hf.load_hf(folder, config, progress=progress, target=target)
        hf.save_hf(partial, module, config, raw, dtype, **how)
    elif now == HF:
        saved = orbax.Saved(folder, config)
        hf.write_hf(partial, saved.read, config, raw, dtype, progress, **how)
    else:
        orbax.save_orbax(partial, hf.load_hf(folder, config, dtype, progress, target=target))
    if writer and not writer.quantized:
        raise DominoError(f"{folder} has no matrix whose inputs groups of {GROUP} divide: nothing would be quantized.")
    if dtype is None and form is None and not source.overrides and not quantized and not writer:
        shutil.copyfile(folder / "config.json", partial / "config.json")
    else:
        hf.write_json(partial / "config.json", raw if dtype is None else hf.with_dtype(raw, dtype))
    if was != RUN:  # beside a run lie its settings and metrics, which are no part of the drafter
        hf.copy_companions(folder, partial)
    return was, now


def folder_format(folder: Path) -> str:
    """The form of a model's folder: HF, ORBAX, RUN or GGUF."""
    if orbax.is_run(folder):
        return RUN
    if orbax.is_orbax(folder):
        return ORBAX
    return HF if any(folder.glob("*.safetensors")) or not any(folder.glob("*.gguf")) else GGUF
