"""Which model to run: names, folders and Hub repositories, and loading target, drafter and tokenizer."""

import dataclasses
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from convert import hf
from convert.precision import settle
from convert.tokenizer import first_line, load_tokenizer
from domino_jax import prepare
from domino_jax.attention import Choice, choose
from domino_jax.config import DecoderConfig, DraftConfig, TargetConfig, check_pair
from domino_jax.decode import Configs, Params
from domino_jax.errors import DominoError
from domino_jax.sharding import default_sizes, fit, make_mesh
from infer.memory import enough_memory

DEMO = Path(__file__).parent / "demo"


class Pair(NamedTuple):
    """A target and the drafter trained for it: folders, or Hub repositories as "org/repo"."""

    target: str
    draft: str


TABLE = {
    "demo": Pair(str(DEMO / "target"), str(DEMO / "draft")),
    "qwen3-4b": Pair("Qwen/Qwen3-4B", "Huang2020/Qwen3-4B-Domino-b16"),
    "qwen3-8b": Pair("Qwen/Qwen3-8B", "Huang2020/Qwen3-8B-Domino-b16"),
}
NO_DRAFT = "none"

# What a model folder needs. Pickles and code are never fetched: either could run on this machine.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer*", "*.model"]
NEVER = ["*.bin", "*.py", "*.pt", "*.pth", "*.pkl"]


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run."""

    configs: Configs
    params: Params
    tokenizer: Any  # a transformers tokenizer, or None where the folder has none
    stop_ids: tuple[int, ...]
    dtype: Any  # of the weights and caches
    warnings: tuple[str, ...]
    seconds: float  # what loading took
    mesh: Mesh | None = None  # where weights and caches are spread; None for one device

    def context(self) -> AbstractContextManager[Any]:
        """What programs of this model are run in."""
        return jax.set_mesh(self.mesh) if self.mesh else nullcontext()


def resolve(model: str, draft: str | None = None) -> tuple[Path, Path | None]:
    """The folders of a target and its drafter, fetched from the Hub where needed.

    Args:
        model: a name of the table, a folder, or "org/repo" on the Hub.
        draft: likewise; "none" for no drafter; None for the one that the table has for `model`.

    Raises:
        DominoError: nothing is found under one of them.
    """
    if draft is None:
        # A folder of this name would be taken by its path, "./demo": the table comes first.
        draft = TABLE[model].draft if model in TABLE else NO_DRAFT
    target = _folder(TABLE[model].target if model in TABLE else model, model, "--model")
    if draft == NO_DRAFT:
        return target, None
    return target, _folder(TABLE[draft].draft if draft in TABLE else draft, draft, "--draft")


def _folder(place: str, asked: str, flag: str) -> Path:
    """The folder `place`, or the Hub repository of that name; `asked` is what the user wrote."""
    try:
        if Path(place).is_dir():
            return Path(place)
    except OSError as error:
        raise DominoError(f"{place} can't be read: {error}.") from None
    if place.startswith(str(DEMO)):
        raise DominoError(f"the shipped model is not in this installation ({place}); give a folder with {flag} DIR.")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", place):
        raise DominoError(
            f"{asked!r} is neither a name ({', '.join(TABLE)}) nor a folder here nor org/repo on the Hub; "
            f"give a folder with {flag} DIR."
        )
    from huggingface_hub import snapshot_download  # slow to import, and most runs do without

    try:
        return Path(snapshot_download(place, allow_patterns=PATTERNS, ignore_patterns=NEVER))
    except Exception as error:  # the Hub's own, and whatever its HTTP library raises
        raise DominoError(
            f"{place} is no folder here and could not be fetched from the Hugging Face Hub ({first_line(error)}); "
            f"check the name and the network, or give a folder with {flag} DIR."
        ) from None


def load(
    target: Path,
    draft: Path | None = None,
    dtype: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    drafts: int | None = None,
    mesh: tuple[int, int] | None = None,
    attention: Choice = "auto",
    candidates: int | None = None,
    draft_dtype: str | None = None,
    fuse: bool = False,
    weights: Callable[[DecoderConfig, Any, Mesh | None], Any] | None = None,
) -> Loaded:
    """Load a target and its drafter; both configs are checked before any weight is read.

    Args:
        target, draft: folders.
        dtype: "float32" or "bfloat16"; by default float32 on CPU (where bfloat16 is slow), else bfloat16.
        progress: called with what is loaded, bytes done, bytes in all.
        drafts: proposals a cycle verifies; all that the drafter makes when None.
        mesh: sizes of its axes data and model; for the devices found when None.
        attention: its form, or what `attention.choose` makes of "auto".
        candidates: tokens that the causal head scores; the whole vocabulary when None.
        draft_dtype: "int8" or "float8" for the drafter's matrices; `dtype` when None.
        fuse: one product where several have the same input (see `prepare.fuse`).
        weights: makes each model's weights from its config, dtype and mesh; the folders' are read when None.

    Raises:
        DominoError: a folder is not a whole supported model, the two do not fit, or `attention` can't run here.
    """
    began = time.perf_counter()
    raw = hf.read_json(target / "config.json")
    config = hf.parse_config(raw)
    if not isinstance(config, TargetConfig):
        raise DominoError(f"{target} holds a drafter; give its target with --model and this folder with --draft.")
    configs, warnings = Configs(config), []
    if draft:
        draft_config = hf.parse_config(hf.read_json(draft / "config.json"), config.num_hidden_layers)
        if not isinstance(draft_config, DraftConfig):
            raise DominoError(f"{draft} is not a drafter (its config.json has no dflash_config); see --draft.")
        warnings = check_pair(config, draft_config)
        configs = Configs(config, draft_config, drafts, candidates)
    elif candidates is not None or draft_dtype is not None:
        raise DominoError("head candidates and an 8-bit drafter need a drafter: give one with --draft DIR.")
    kind = settle(dtype)
    models = [c for c in (configs.target, configs.draft) if c]
    sizes = mesh or default_sizes(models)
    spread = make_mesh(*sizes) if sizes != (1, 1) else None
    fitted = dataclasses.replace(  # refuses before anything is read
        configs,
        target=fit(configs.target, sizes[1]),
        draft=fit(configs.draft, sizes[1]) if configs.draft else None,
        attention=choose(attention, [c.head_dim for c in models], kind),
    )

    def read(folder: Path, config: Any, what: str) -> Any:
        if weights:
            return weights(config, kind, spread)
        bar = partial(progress, f"loading {what}") if progress else None
        return _weights(folder, config, kind, bar, spread)

    with enough_memory(f"the device has too little memory for the weights in {kind.name}."):
        whole = read(target, configs.target, "target"), read(draft, configs.draft, "drafter") if draft else None
        params = Params(*whole)
        del whole  # what is made ready below is then held once
        with jax.set_mesh(spread) if spread else nullcontext():
            if draft_dtype is not None and fitted.draft:
                params = prepare.quantize(params, fitted.draft, draft_dtype)
            if fuse:
                for module in filter(None, params[:2]):
                    prepare.fuse(module)
        jax.block_until_ready(params)
    tokenizer = load_tokenizer(target)
    return Loaded(
        fitted, params, tokenizer, _stop_ids(target, raw), kind, tuple(warnings), time.perf_counter() - began, spread
    )


def _weights(folder: Path, config: Any, dtype: Any, progress: hf.Progress | None, mesh: Mesh | None) -> Any:
    """The one place where a folder's weights are read, in either of their two forms."""
    if (folder / "weights").is_dir():
        from convert import folders  # brings in Orbax, which is slow to import

        return folders.load(folder, config, dtype, progress, mesh)
    return hf.load(folder, config, dtype, progress, mesh)


def _stop_ids(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    """The ids that end a sequence, by generation_config.json, else by config.json `raw`."""
    generation = folder / "generation_config.json"
    ids = hf.read_json(generation).get("eos_token_id") if generation.exists() else None
    ids = raw.get("eos_token_id") if ids is None else ids
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(i, int) for i in ids):
        raise DominoError(f"{folder} has eos_token_id {ids}, expected an id or a list of ids.")
    return tuple(ids)
