"""A target and its drafter, read from folders and ready to decode."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from convert import folders, hf, orbax, public
from convert.memory import enough_memory
from convert.precision import settle
from convert.tokenizer import load_tokenizer
from domino_jax.attention import choose
from domino_jax.config import DraftConfig, TargetConfig, check_pair
from domino_jax.decode import Configs, Params
from domino_jax.errors import DominoError
from domino_jax.sharding import default_sizes, fit, make_mesh, parse
from domino_jax.weights import flatten, unflatten

Progress = Callable[[str, int, int], None]  # what is loaded, bytes done, bytes in all

SAMPLES, SAMPLE_BYTES = 64, 1 << 16  # of each file, for `identity`


@dataclass(frozen=True)
class Pair:
    """A target, and a drafter or none."""

    configs: Configs  # fitted to the mesh
    params: Params
    tokenizer: Any  # a transformers tokenizer, or None where the folder has none
    stop_ids: tuple[int, ...]
    dtype: Any  # of weights and caches
    mesh: Mesh | None

    def context(self) -> AbstractContextManager[Any]:
        """What programs of this pair are run in."""
        return jax.set_mesh(self.mesh) if self.mesh else nullcontext()


def find(target: str, flag: str = "--target") -> Path:
    """The folder of a target by a name such as qwen3-4b, a folder, or org/repo on the Hub, fetched where needed.

    Raises:
        DominoError: nothing is found under it, or fetching fails.
    """
    return public.resolve(target, public.NO_DRAFT, Console(stderr=True), flag=flag)[0]


def read_configs(target: Path, draft: Path | None) -> tuple[TargetConfig, DraftConfig | None, list[str]]:
    """The configs of a pair, and warnings.

    Raises:
        DominoError: one of them is not of a supported model, or the two do not fit.
    """
    config = folders.read_config(target)
    if not isinstance(config, TargetConfig):
        raise DominoError(f"{target} is a drafter; --target takes the target model.")
    if draft is None:
        return config, None, []
    draft_config = folders.read_config(draft, config.num_hidden_layers)
    if not isinstance(draft_config, DraftConfig):
        raise DominoError(f"{draft} is not a drafter (its config.json has no dflash_config).")
    return config, draft_config, check_pair(config, draft_config)


def load(
    target: Path,
    draft: Path | None = None,
    dtype: str | None = None,
    mesh: str | None = None,
    progress: Progress | None = None,
) -> Pair:
    """Load a target and its drafter; both configs are checked before any weight is read.

    Args:
        target: a folder, Hugging Face's or Orbax'.
        draft: the same, or a training run's, of which the newest checkpoint is read; no drafter when None.
        dtype: "float32" or "bfloat16"; by default float32 on a CPU, else bfloat16.
        mesh: "data=2,model=4"; for the devices found when None.

    Raises:
        DominoError: a folder is not a whole supported model, or the two do not fit each other or the mesh.
    """
    config, draft_config, _ = read_configs(target, draft)
    kind = settle(dtype)
    models = [c for c in (config, draft_config) if c]
    sizes = parse(mesh) if mesh is not None else default_sizes(models)
    spread = make_mesh(*sizes) if sizes != (1, 1) else None
    fitted = Configs(
        fit(config, sizes[1]),
        fit(draft_config, sizes[1]) if draft_config else None,
        attention=choose("auto", [c.head_dim for c in models], kind),
    )

    def read(folder: Path, config: Any, what: str) -> Any:
        bar = partial(progress, f"loading {what}") if progress else None
        source = orbax if orbax.is_run(folder) else folders
        return source.load(folder, config, kind, bar, spread)

    with enough_memory(f"the device has too little memory for the weights in {kind.name}: give more with --mesh."):
        params = Params(
            read(target, config, "target"), read(draft, draft_config, "drafter") if draft is not None else None
        )
    stop_ids = hf.stop_ids(target, hf.read_json(target / "config.json"))
    return Pair(fitted, params, load_tokenizer(target), stop_ids, kind, spread)


def without_head(configs: Configs, params: Params) -> tuple[Configs, Params]:
    """The pair with the causal head off: the drafter's base logits alone, as plain DFlash proposes."""
    assert configs.draft is not None and params.draft is not None
    draft = replace(configs.draft, head=None)
    return replace(configs, draft=draft), params._replace(draft=unflatten(draft, flatten(params.draft)))


def identity(folder: Path) -> str:
    """A digest by which a model is known again: names and sizes of its files, and blocks from all over each.

    Blocks, since reading all of a large model takes longer than starting a run should. Files that decide neither what
    the model says nor what it is asked (a card, a licence) do not count.
    """
    digest = hashlib.sha256()
    kinds = {".safetensors", ".json", ".jinja", ".txt", ".model"}
    inner = [folder / orbax.WEIGHTS, folder / orbax.CHECKPOINTS]
    try:
        files = [file for file in folder.iterdir() if file.is_file() and file.suffix in kinds]
        files += [file for place in inner if place.is_dir() for file in place.rglob("*") if file.is_file()]
        for file in sorted(files):
            size = file.stat().st_size
            digest.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
            step = max(SAMPLE_BYTES, size // SAMPLES)
            with file.open("rb") as data:
                for offset in (*range(0, size, step), max(0, size - SAMPLE_BYTES)):
                    data.seek(offset)
                    digest.update(data.read(SAMPLE_BYTES))
    except OSError as error:
        raise DominoError(f"{folder} can't be read: {error}.") from None
    return digest.hexdigest()
