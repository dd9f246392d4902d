"""Loading a target, its drafter and its tokenizer from folders."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from convert import hf
from convert.drafters import make_drafter
from convert.options import PlanOptions, TreeSettings
from convert.registry import read_configs
from convert.tokenizer import check_same_tokens, end_tokens, load_tokenizer
from domino_jax import prepare
from domino_jax.attention import Backend, BackendChoice, available_backends
from domino_jax.config import DecoderConfig, DraftConfig, TargetConfig
from domino_jax.decode import DecodeConfig
from domino_jax.drafters.base import Drafter
from domino_jax.drafters.block import BlockDrafter
from domino_jax.drafters.combined import CombinedDrafter
from domino_jax.drafters.dual_view import DualViewConfig
from domino_jax.drafters.tree import TreeDrafter
from domino_jax.errors import DominoError
from domino_jax.moe import resolve_moe_backend
from domino_jax.runtime.autotune import fastest_backend
from domino_jax.runtime.devices import own_devices
from domino_jax.runtime.extras import explain_missing_extra
from domino_jax.runtime.memory import default_mesh_sizes, explain_out_of_memory
from domino_jax.runtime.precision import Matrices, keeps_bfloat16, matmul_precision, resolve_dtype
from domino_jax.runtime.weight_forms import WeightForm, resolve_weights
from domino_jax.sharding import DATA, config_of_device, fit_to_mesh, make_mesh, mesh_context
from domino_jax.weights import Draft, Params


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run."""

    configs: DecodeConfig
    params: Params
    tokenizer: Any  # a transformers tokenizer, or None where the folder has none
    stop_ids: tuple[int, ...]
    dtype: Any  # of the weights and caches, but for narrow matrices
    warnings: tuple[str, ...]
    seconds: float  # what loading took
    mesh: Mesh | None = None  # where weights and caches are spread; None for one device
    folder: Path | None = None  # of the target; None for one that is in no file
    weights: WeightForm = "exact"  # of the target's matrices

    @property
    def narrow(self) -> bool:
        """Whether this is a float32 run with matrices in bfloat16."""
        return self.dtype == jnp.float32 and any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(self.params))

    @property
    def platform(self) -> str:
        """What its programs are compiled for, which is where its weights are: cpu, gpu or tpu."""
        return next(iter(jax.tree.leaves(self.params)[0].sharding.device_set)).platform

    @property
    def has_block_drafter(self) -> bool:
        """Whether a drafter drafts that was trained for this target."""
        return isinstance(self.configs.draft, DraftConfig | DualViewConfig)

    @contextmanager
    def context(self) -> Iterator[None]:
        """What programs of this model are run in: its mesh and the precision of its products."""
        with mesh_context(self.mesh), matmul_precision(self.dtype):
            yield


class LoadPlan(NamedTuple):
    """How a pair will run."""

    configs: DecodeConfig  # as in the files
    fitted: DecodeConfig  # to the mesh
    dtype: Any
    mesh: Mesh | None
    backends: tuple[Backend, ...]  # of attention, of which the fastest here is to be found
    platform: str  # that it is for: cpu, gpu or tpu
    narrow: bool  # matrices stored in bfloat16 stay so
    weights: WeightForm  # of the target's matrices
    draft_weights: WeightForm  # of the drafter's


def plan_load(
    config: TargetConfig,
    draft_config: DecoderConfig | None,
    dtype: str | None = None,
    *,
    drafts: int | None = None,
    ngram: bool = False,
    prompt_lookup_max: int | None = None,
    prompt_lookup_min: int | None = None,
    mesh: tuple[int, int] | None = None,
    attention: BackendChoice = "auto",
    candidates: int | None = None,
    weights: str = "auto",
    draft_weights: str = "auto",
    matrices: Matrices = "auto",
    devices: Sequence[Any] | None = None,
    tree: TreeSettings | None = None,
    confidence_threshold: float | None = None,
) -> LoadPlan:
    """How a pair will run here, from its configs alone: what can't is refused before a weight is fetched or read.

    Args:
        draft_config: of the drafter's weights, of one of `drafters.FORMS`.
        dtype: "float32" or "bfloat16"; by default float32 on CPU (where bfloat16 is slow), else bfloat16.
        drafts: proposals a cycle verifies; all that the drafter makes when None.
        ngram, prompt_lookup_max, prompt_lookup_min: see `convert.drafters.make_drafter`.
        mesh: sizes of its axes data and model; when None one device if the models fit (`memory.default_mesh_sizes`).
        attention: its backend; "auto" chooses among those that are tested on this kind of device.
        candidates: tokens that the causal head scores; the whole vocabulary when None.
        weights, draft_weights: the form of the target's and the drafter's matrices, see `precision.resolve_weights`.
        matrices: how a float32 run holds exact ones that are stored in bfloat16 (see `prepare.prepare_for_cpu`).
        devices: of a topology that is compiled for, which need not be here; `mesh` is then given. This process's when
            None.
        tree: of drafts; a chain when None.
        confidence_threshold: see `drafters.block.BlockDrafter`.

    Raises:
        DominoError: a setting does not fit the pair or these devices.
    """
    there = own_devices() if devices is None else devices
    platform = there[0].platform
    config = resolve_moe_backend(config, platform)
    drafter = make_drafter(
        draft_config,
        ngram=ngram,
        num_draft_tokens=drafts,
        candidates=candidates,
        prompt_lookup_max=prompt_lookup_max,
        prompt_lookup_min=prompt_lookup_min,
        tree=tree,
        confidence_threshold=confidence_threshold,
    )
    form, draft_form = resolve_weights(weights), resolve_weights(draft_weights, "--draft-weights")
    if draft_form != "exact" and not isinstance(draft_config, DraftConfig):
        raise DominoError("--draft-weights is for a drafter of the target's blocks: give one with --draft DIR.")
    configs = DecodeConfig(config, drafter, drafts if drafter else None)
    kind = resolve_dtype(dtype, platform)
    models = [c for c in (configs.target, configs.draft) if c]
    sizes = mesh or default_mesh_sizes(models, kind, there, form)
    spread = make_mesh(*sizes, devices=devices) if sizes != (1, 1) else None
    fitted = dataclasses.replace(
        configs,
        target=fit_to_mesh(configs.target, sizes[1]),
        drafter=_fitted(configs.drafter, sizes[1]),
    )
    backends = available_backends(attention, [c.head_dim for c in models], kind, there[0], configs.branching)
    narrow = keeps_bfloat16(matrices, kind, platform)
    return LoadPlan(configs, fitted, kind, spread, backends, platform, narrow, form, draft_form)


def load_model(
    target: Path,
    draft: Path | None = None,
    dtype: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    plain: bool = False,
    make_weights: Callable[[DecoderConfig, Any, Mesh | None, hf.Form | None], Any] | None = None,
    **how: Unpack[PlanOptions],
) -> LoadedModel:
    """Load a target and its drafter; both configs are checked before any weight is read.

    Args:
        target, draft: folders.
        dtype: see `plan_load`.
        progress: called with what is loaded, bytes done, bytes in all.
        plain: leave the weights in the form of `weights.axes`, which is what trains; none is made ready for decoding.
        make_weights: makes each model's weights from its config, dtype and mesh, and what is kept of each
            (`hf.load_hf`); the folders' are read when None.
        how: what else `plan_load` takes.

    Raises:
        DominoError: a folder is not a whole supported model, the two do not fit, or something of `how` can't run here.
    """
    began = time.perf_counter()
    raw, config, draft_config, warnings = read_configs(target, draft)
    chosen = plan_load(config, draft_config, dtype, **how)
    tokenizer = load_tokenizer(target)  # what is wrong there costs no weights
    if draft and isinstance(draft_config, TargetConfig):
        check_same_tokens(tokenizer, load_tokenizer(draft), draft)
    stop_ids, more = end_tokens(target, raw, tokenizer)
    kind, mesh = chosen.dtype, chosen.mesh
    narrow = chosen.narrow and not plain
    on_cpu = narrow or (kind == jnp.float32 and chosen.platform == "cpu" and not plain)

    def read(folder: Path, config: Any, what: str, asked: WeightForm) -> Any:
        """The weights of a model; a drafter that is to be in 8 bits is read whole, for its head says what stays."""
        exact = asked == "exact"
        stored = narrow and exact
        form = prepare.target_form(config, asked) if what == "target" else None
        if make_weights:
            module = make_weights(config, jnp.bfloat16 if stored else kind, mesh, form)
        else:
            bar = partial(progress, f"loading {what}") if progress else None
            with mesh_context(mesh):
                module = _weights(folder, config, None if stored else kind, bar, mesh, target, form)
        if on_cpu and exact:
            with mesh_context(mesh):
                prepare.prepare_for_cpu(module, config)
        return module

    with explain_out_of_memory(f"the device has too little memory for the weights in {kind.name}."):
        modules = (
            read(target, chosen.configs.target, "target", chosen.weights),
            read(draft, chosen.configs.draft, "drafter", chosen.draft_weights) if draft else None,
        )
        params = Params(*modules)
        del modules  # what is made ready below is then held once
        with mesh_context(mesh):
            if chosen.draft_weights != "exact" and chosen.fitted.draft:
                params = prepare.quantize_drafter(params, chosen.fitted.draft, chosen.draft_weights)
            if on_cpu:
                params = prepare.quantized_for_cpu(params)
            if not plain:
                # On a mesh its rows would be on all devices.
                prepare.tabulate_head(params, chosen.fitted.draft, 0 if mesh else prepare.LARGEST_TABLE)
        if not plain and chosen.platform == "tpu":
            groups = mesh.shape[DATA] if mesh else 1
            with mesh_context(mesh):
                params = prepare.prepare_for_tpu(params, chosen.fitted.target, chosen.fitted.draft, groups)
        jax.block_until_ready(params)
    with matmul_precision(kind):
        backend, notes = fastest_backend(
            chosen.backends, config_of_device(chosen.fitted.target, mesh), kind, chosen.fitted.proposals + 1
        )
    configs = dataclasses.replace(chosen.fitted, attention=backend)
    seconds = time.perf_counter() - began
    said = (*warnings, *more, *notes)
    return LoadedModel(configs, params, tokenizer, stop_ids, kind, said, seconds, mesh, target, chosen.weights)


def _fitted(drafter: Drafter | None, model_devices: int) -> Drafter | None:
    """The drafter with weights that so many devices can share."""
    if drafter is None or drafter.config is None:
        return drafter
    if isinstance(drafter, CombinedDrafter):
        model = _fitted(drafter.model, model_devices)
        assert model is not None
        return dataclasses.replace(drafter, model=model)
    return dataclasses.replace(drafter, config=fit_to_mesh(drafter.config, model_devices))  # type: ignore[type-var]


def without_head(configs: DecodeConfig, params: Params) -> tuple[DecodeConfig, Params]:
    """The pair without the drafter's head: the drafter's base logits alone, as plain DFlash proposes.

    A tree stays one, of the same number of nodes.
    """
    assert isinstance(configs.drafter, BlockDrafter)
    drafter: Draft = jax.tree.map(lambda x: x, params.draft)  # another module of the same arrays
    drafter.head = nnx.data(None)
    changes: dict[str, Any] = {"confidence_threshold": None, "candidates": None}
    # Temperatures are of what the head made sure of, and few candidates are enough for what it chooses.
    nothing = {"head": None, "confidence_temperatures": (), "tree_candidates": None}
    changes["config"] = dataclasses.replace(configs.drafter.config, **nothing)
    if isinstance(configs.drafter, TreeDrafter):
        changes["correction"] = "path"
    plain = dataclasses.replace(configs.drafter, **changes)
    return dataclasses.replace(configs, drafter=plain), params._replace(draft=drafter)


def _weights(
    folder: Path,
    config: Any,
    dtype: Any,
    progress: hf.Progress | None,
    mesh: Mesh | None,
    target: Path,
    form: hf.Form | None,
) -> Any:
    """The one place where a folder's weights are read, in any of their forms."""
    if (folder / "weights").is_dir() or (folder / "checkpoints").is_dir():
        with explain_missing_extra():
            from convert import folders  # brings in Orbax, which is slow to import and an extra

        return folders.load_weights(folder, config, dtype, progress, mesh, target, form)
    return hf.load_hf(folder, config, dtype, progress, mesh, target, form)
