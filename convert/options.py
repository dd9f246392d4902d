"""The options that several commands share: which model, on which devices, how tokens are chosen, which process.

Each is written once, with its help, and nested by tyro without a prefix. Nothing here imports JAX before it is needed,
so that a command can check its words first.
"""

import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypedDict

from tyro.conf import DisallowNone, FlagCreatePairsOff, arg

from convert import registry
from convert.registry import split_draft
from convert.values import INT_LIMIT, is_number, is_whole, shown
from domino_jax.runtime.command import UsageError, words_at_fault
from domino_jax.runtime.files import output_kind, source_at
from domino_jax.runtime.processes import ProcessConfig, resolve_processes
from domino_jax.runtime.weight_forms import resolve_weights

if TYPE_CHECKING:
    from rich.console import Console

    from convert.loading import LoadedModel
    from domino_jax.sampling import SamplingParams

Dtype = Literal["float32", "bfloat16"]
Weights = Literal["auto", "exact", "int8", "float8", "int4"]
Matrices = Literal["auto", "float32", "bfloat16"]
Attention = Literal["auto", "xla", "cudnn", "pallas"]
Sampler = Literal["rejection", "coupled"]
TreeCorrection = Literal["path", "depth"]

FEW_CANDIDATES = 64  # of a depth: with the public Domino drafters no node worth having is lost (arXiv 2607.08642)
UNSET = arg(help_behavior_hint="")  # the help says in words what an option without a value does
Flag = Annotated[bool, FlagCreatePairsOff, UNSET]
DRAFT_WEIGHTS = arg(name="draft-dtype", aliases=("--draft-weights",))  # the older name; the help puts aliases first
GROUP = arg(name="")  # the fields of a nested dataclass belong to the group around it


def flag(name: str) -> str:
    """An option's name as it is given on the command line."""
    return "--" + name.replace("_", "-")


def check_count(name: str, value: Any, least: int = 1, limit: int = INT_LIMIT) -> None:
    """Refuse what is not a whole number from `least` to `limit` - 1.

    Args:
        name: of the option.

    Raises:
        UsageError: it is not.
    """
    if not is_whole(value):
        raise UsageError(f"{flag(name)} must be a whole number, found {shown(value)}.")
    if not least <= value < limit:
        most = f"from {least} to 2^{limit.bit_length() - 1} - 1"
        rule = f"at least {least}" if value < least and limit == INT_LIMIT else most
        raise UsageError(f"{flag(name)} must be {rule}, found {shown(value)}.")


RANGES: dict[str, Callable[[float], bool]] = {
    "0 or more": lambda x: 0 <= x < math.inf,
    "1 or more": lambda x: 1 <= x < math.inf,
    "above 0": lambda x: 0 < x < math.inf,
    "above 1": lambda x: 1 < x < math.inf,
    "from 0 to 1": lambda x: 0 <= x <= 1,
    "above 0 and at most 1": lambda x: 0 < x <= 1,
    "from 0 to below 1": lambda x: 0 <= x < 1,
}


def check_real(name: str, value: Any, rule: str) -> None:
    """Refuse what is not a finite number of a range.

    Args:
        name: of the option.
        rule: one of RANGES.

    Raises:
        UsageError: it is not.
    """
    if not is_number(value):
        raise UsageError(f"{flag(name)} must be a number, found {shown(value)}.")
    if not RANGES[rule](value) or value > sys.float_info.max:
        raise UsageError(f"{flag(name)} must be {rule}, found {shown(value)}.")


def in_8_bits(weights: Weights) -> bool:
    """Whether a form that was asked for is one of 8 bits."""
    return weights in ("int8", "float8")


def check_topology(name: str, value: str) -> None:
    """Refuse what is not the name of a topology of TPUs; which there are, libtpu knows.

    Args:
        name: of the option.

    Raises:
        UsageError: it is not.
    """
    if not re.fullmatch(r"v\d[a-z]?:\d{1,3}x\d{1,3}(x\d{1,3})?", value):
        raise UsageError(f"{flag(name)} is given as v5e:2x4, v5p:2x2x1 or v6e:2x2, found {shown(value)}.")


def check_file(name: str, path: Path | None, *sources: str | Path | None) -> None:
    """Refuse a file that could not be written when the work for it is done, or would be written over a source.

    Args:
        name: of the option.
        path: None where it is not given.
        sources: what the command reads, as it was given.

    Raises:
        UsageError: its folder is missing, or it is a folder itself; it is a source, lies in one, or is a part of a
            model, a training run or another whole folder.
    """
    if path is None:
        return
    check_not_source(name, path, *sources)
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path.absolute().parent} is not a folder; {flag(name)} is to be written there.")
    if path.is_dir():
        raise UsageError(f"{flag(name)} is to be a file, and {path} is a folder.")
    if path.exists() and (kind := output_kind(path.absolute().parent)) != "other files":
        raise UsageError(f"{flag(name)} {path} would be written over a part of {kind}: give another file.")


def check_not_source(name: str, path: Path, *sources: str | Path | None) -> None:
    """Refuse an output that is what the command reads, or lies in it.

    Args:
        name: of the option.
        sources: as they were given.

    Raises:
        UsageError: it is.
    """
    source = source_at(path, local_sources(*sources))
    if source is not None:
        raise UsageError(f"{flag(name)} {path} is to be written, and {source} there is read: give another place.")


def local_sources(*given: str | Path | None) -> list[Path]:
    """What of the values of options for models and data names a file or folder, and not a public model or dataset."""
    public = registry.TABLE.keys() | registry.DRAFTERS.keys() | {registry.NO_DRAFT}
    found = (one for one in given if one is not None and one not in public)
    return [Path(one) for one in found if os.path.exists(one)]  # noqa: PTH110 (Path's raises for what can be no name)


def absolute(given: str | Path | None) -> str | None:
    """The value of an option for a model, data or a recipe, as it is kept: a file or folder from any working folder."""
    return str(local_sources(given)[0].absolute()) if local_sources(given) else None if given is None else str(given)


class TreeSettings(NamedTuple):
    """A tree of drafts: fields of `domino_jax.drafters.tree.TreeDrafter`, which describes them.

    `candidates` of None are as many as the drafter's config says.
    """

    nodes: int
    lanes: int | None = None
    candidates: int | Literal["all"] | None = None
    correction: TreeCorrection = "path"


class PlanOptions(TypedDict, total=False):
    """How a pair runs: keywords of `loading.plan_load`, which describes them."""

    drafts: int | None
    ngram: bool
    prompt_lookup_max: int | None
    prompt_lookup_min: int | None
    mesh: tuple[int, int] | None
    attention: Attention
    candidates: int | None
    weights: Weights
    draft_weights: Weights
    matrices: Matrices
    tree: TreeSettings | None
    confidence_threshold: float | None


@dataclass(frozen=True)
class DraftingOptions:
    """The drafter."""

    draft: Annotated[str | None, DisallowNone, UNSET, arg(help=registry.DRAFT_HELP)] = None
    draft_revision: Annotated[str | None, DisallowNone, UNSET, arg(help=registry.DRAFT_REVISION_HELP)] = None
    head_candidates: int | Literal["all"] = "all"
    """vocabulary entries that the causal head scores: the highest base logits, or all"""
    draft_weights: Annotated[Weights, DRAFT_WEIGHTS] = "auto"
    """form of the drafter's matrices and its LM head, as --weights; the drafts change, the output does not"""
    prompt_lookup_max: Annotated[int | None, DisallowNone, UNSET] = None
    """n-grams: tokens of the longest match that is looked for (default: 5; 8 beside another drafter)"""
    prompt_lookup_min: Annotated[int | None, DisallowNone, UNSET] = None
    """n-grams: tokens of the shortest match that counts (default: 2; 4 beside another drafter)"""
    tree: Annotated[int | None, DisallowNone, UNSET] = None
    """verify a tree of so many drafts a cycle, the likeliest ones; other drafters than a block's can't make one"""
    tree_lanes: Annotated[int | None, DisallowNone, UNSET] = None
    """--tree: paths followed from depth to depth; fewer are cheaper (default: as many as drafts, the best tree)"""
    tree_candidates: Annotated[int | Literal["all"] | None, DisallowNone, UNSET] = None
    """--tree: highest base logits that drafts are made of, or all (default: 64 for the public Domino
    drafters, else what the drafter's config.json says, else all)"""
    tree_correction: TreeCorrection = "path"
    """--tree: what the head goes by: each node's own path, or one path that all nodes of a depth share"""
    confidence_threshold: Annotated[float | None, DisallowNone, UNSET] = None
    """end a chain before the first draft that a block drafter is less sure of, from 0 to 1: by its confidence head, or
    by its likeliest token's probability; see `python -m train calibrate`"""

    @property
    def tree_flags(self) -> list[str]:
        """The flags given that say how a tree is made."""
        given = {
            "--tree-lanes": self.tree_lanes is not None,
            "--tree-candidates": self.tree_candidates is not None,
            "--tree-correction": self.tree_correction != "path",
        }
        return [name for name, there in given.items() if there]


@dataclass(frozen=True)
class DeviceOptions:
    """Devices and precision."""

    dtype: Annotated[Dtype | None, DisallowNone, UNSET] = None
    """dtype of weights and caches (default: float32 on CPUs, bfloat16 elsewhere)"""
    weights: Weights = "auto"
    """form of the target's matrices: exact, which auto is too, or int8 and float8, which are another model near it;
    int4 runs nowhere yet"""
    matrices: Matrices = "auto"
    """float32 runs only: bfloat16 keeps stored bfloat16 weights, at the same precision (auto: on CPUs with AMX)"""
    attention: Attention = "auto"
    """attention backend: xla (any device), cudnn (NVIDIA, bfloat16) or pallas (TPU, NVIDIA); auto takes the
    fastest"""
    mesh: Annotated[str | None, DisallowNone, UNSET] = None
    """devices to spread over, such as data=2,model=4 (default: one, or more where the model does not fit on it)"""

    def mesh_sizes(self) -> tuple[int, int] | None:
        """The sizes (data, model) that --mesh gives, None without it.

        Raises:
            UsageError: it is not of the form data=2,model=4.
        """
        if self.mesh is None:
            return None
        from domino_jax.sharding import parse_mesh

        with words_at_fault():
            return parse_mesh(self.mesh)


@dataclass(frozen=True)
class ModelOptions:
    """Which target and drafter to load, and how.

    Example:
        >>> ModelOptions("qwen3-4b", drafting=DraftingOptions(head_candidates=64)).check()
    """

    model: Annotated[str, arg(help=registry.MODEL_HELP)] = "demo"
    revision: Annotated[str | None, DisallowNone, UNSET, arg(help=registry.REVISION_HELP)] = None
    drafting: DraftingOptions = field(default_factory=DraftingOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)

    @property
    def draft(self) -> str | None:
        """What --draft names besides n-grams: a name, a folder, "none"; None for the public drafter of the model."""
        name, ngram = split_draft(self.drafting.draft)
        return registry.NO_DRAFT if ngram and name is None else name

    @property
    def ngram(self) -> bool:
        """Whether --draft asks for n-gram drafting, alone or beside a drafter."""
        return split_draft(self.drafting.draft)[1]

    @property
    def plain(self) -> bool:
        """Whether --draft asks for no drafter."""
        return self.drafting.draft == registry.NO_DRAFT

    @property
    def head_candidates(self) -> int | None:
        """Tokens that the causal head scores; None for the whole vocabulary."""
        return None if self.drafting.head_candidates == "all" else self.drafting.head_candidates

    @property
    def tree(self) -> TreeSettings | None:
        """The tree that --tree asks for; None without it."""
        o = self.drafting
        if o.tree is None:
            return None
        candidates = o.tree_candidates
        if o.tree_candidates is None and registry.is_public_domino(self.model, self.draft):
            candidates = FEW_CANDIDATES
        return TreeSettings(o.tree, o.tree_lanes, candidates, o.tree_correction)

    def plan(self, num_draft_tokens: int | None = None) -> PlanOptions:
        """The options as `loading.plan_load` and `loading.load_model` take them.

        Args:
            num_draft_tokens: draft tokens that a cycle verifies; all of a block when None.

        Raises:
            UsageError: --mesh is malformed.
        """
        return {
            "drafts": num_draft_tokens,
            "ngram": self.ngram,
            "prompt_lookup_max": self.drafting.prompt_lookup_max,
            "prompt_lookup_min": self.drafting.prompt_lookup_min,
            "mesh": self.device.mesh_sizes(),
            "attention": self.device.attention,
            "candidates": self.head_candidates,
            "weights": self.device.weights,
            "draft_weights": self.drafting.draft_weights,
            "matrices": self.device.matrices,
            "tree": self.tree,
            "confidence_threshold": self.drafting.confidence_threshold,
        }

    def check(self) -> None:
        """Check the options without JAX, the network or a file.

        Raises:
            UsageError: they contradict each other, or a value is out of range.
        """
        drafting = self.drafting
        with words_at_fault():
            resolve_weights(self.device.weights)
            resolve_weights(drafting.draft_weights, "--draft-weights")
        if self.head_candidates is not None:
            check_count("head_candidates", self.head_candidates)
        with words_at_fault():
            split_draft(drafting.draft)
        if self.plain or (self.ngram and self.draft == registry.NO_DRAFT):
            used = {
                "--head-candidates": self.head_candidates,
                "--draft-weights": drafting.draft_weights if in_8_bits(drafting.draft_weights) else None,
                "--tree": drafting.tree,
                "--confidence-threshold": drafting.confidence_threshold,
            }
            for flag in (flag for flag, value in used.items() if value is not None):
                raise UsageError(f"{flag} needs a drafter with weights, and --draft {drafting.draft} has none.")
        for name in ("prompt_lookup_max", "prompt_lookup_min"):
            value = getattr(drafting, name)
            if value is not None:
                check_count(name, value)
                if not self.ngram:
                    raise UsageError(f"--{name.replace('_', '-')} is for n-gram drafting: add --draft ngram.")
        self._check_tree()
        if drafting.confidence_threshold is not None:
            check_real("confidence_threshold", drafting.confidence_threshold, "from 0 to 1")
            if self.ngram or drafting.tree is not None:
                raise UsageError("--confidence-threshold is for chains of a block drafter alone.")
        longest, shortest = drafting.prompt_lookup_max, drafting.prompt_lookup_min
        if longest is not None and shortest is not None and shortest > longest:
            raise UsageError(f"--prompt-lookup-min {shortest} is above --prompt-lookup-max {longest}.")
        if self.revision is not None or drafting.draft_revision is not None:
            with words_at_fault():
                registry.check_revisions(self.model, self.draft, self.revision, drafting.draft_revision)
        self.device.mesh_sizes()

    def _check_tree(self) -> None:
        """Raises: UsageError: what is said of a tree makes no sense."""
        drafting = self.drafting
        for name in ("tree", "tree_lanes", "tree_candidates"):
            value = getattr(drafting, name)
            if value not in (None, "all"):
                check_count(name, value)
        if drafting.tree is None:
            for given in drafting.tree_flags:
                raise UsageError(f"{given} says how a tree of drafts is made: add --tree N.")
            return
        if self.ngram:
            raise UsageError(f"--tree needs a block drafter alone, and --draft {drafting.draft} has n-grams.")
        if drafting.head_candidates != "all":
            raise UsageError("--head-candidates is for chains of drafts: with --tree give --tree-candidates.")
        if drafting.tree_lanes is not None and drafting.tree_lanes > drafting.tree:
            raise UsageError(f"--tree-lanes {drafting.tree_lanes} is more than the {drafting.tree} nodes of --tree.")


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen."""

    temperature: Annotated[float | None, DisallowNone, UNSET] = None
    """0, the default, is greedy, and so is anything below 1e-5"""
    top_k: Annotated[int | None, DisallowNone, UNSET] = None
    """sample from the k likeliest tokens; 0, the default, is off"""
    top_p: Annotated[float | None, DisallowNone, UNSET] = None
    """sample from the likeliest tokens that together have this probability; 1, the default, is off"""
    min_p: Annotated[float | None, DisallowNone, UNSET] = None
    """drop tokens below this share of the likeliest token's probability; 0, the default, is off"""
    seed: Annotated[int | None, DisallowNone, UNSET] = None
    """seed of the random keys (default 0); naming one makes --sampler coupled the default"""
    sampler: Annotated[Sampler | None, DisallowNone, UNSET] = None
    """rejection accepts more drafts; a coupled sample depends on the seed alone, not on drafts or the batch"""

    def check(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: a value is out of its range.
        """
        ranges = {"temperature": "0 or more", "top_p": "above 0 and at most 1", "min_p": "from 0 to 1"}
        for name, rule in ranges.items():
            if getattr(self, name) is not None:
                check_real(name, getattr(self, name), rule)
        if self.top_k is not None:
            check_count("top_k", self.top_k, least=0)
        if self.seed is not None:
            check_count("seed", self.seed, least=0, limit=2**32)
        if self.sampler not in (None, "rejection", "coupled"):
            raise UsageError(f"{flag('sampler')} must be rejection or coupled, found {shown(self.sampler)}.")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken: at a temperature below `sampling.GREEDY_BELOW`."""
        return self.params().temperature == 0

    def or_else(self, recommended: Mapping[str, float]) -> "SamplingOptions":
        """The same, with a checkpoint's recommendation where none of temperature and filters is given."""
        names = ("temperature", "top_k", "top_p", "min_p")
        if any(getattr(self, name) is not None for name in names):
            return self
        given: dict[str, Any] = {name: recommended[name] for name in names if name in recommended}
        return replace(self, **given)

    def params(self) -> "SamplingParams":
        """The parameters as decoding takes them."""
        from domino_jax.sampling import SamplingParams

        filters = self.temperature or 0.0, self.top_k or 0, 1.0 if self.top_p is None else self.top_p, self.min_p or 0.0
        return SamplingParams(*filters, seed=self.seed, sampler=self.sampler)


@dataclass(frozen=True)
class ProcessOptions:
    """Several processes that run one model; on a TPU pod they find each other."""

    coordinator: Annotated[str | None, DisallowNone, UNSET] = None
    """host:port of process 0"""
    num_processes: Annotated[int | None, DisallowNone, UNSET] = None
    """number of processes"""
    process_id: Annotated[int | None, DisallowNone, UNSET] = None
    """number of this process, from 0"""

    def resolve(self) -> ProcessConfig | None:
        """What the flags say, and the environment where they are silent; None for a process on its own.

        Raises:
            UsageError: only a part is given, or it makes no sense.
        """
        with words_at_fault():
            return resolve_processes(self.coordinator, self.num_processes, self.process_id)


def load_pair(
    options: ModelOptions,
    console: "Console",
    *,
    num_draft_tokens: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> "LoadedModel":
    """Find the folders that the options name, fetch what is missing, and load the weights.

    Args:
        console: standard error, for notes and download bars.
        num_draft_tokens: draft tokens that a cycle verifies; all of a block when None.
        progress: called with what is loaded, bytes done and bytes in all.

    Raises:
        UsageError: the options make no sense.
        DominoError: a folder is not a whole supported model, the two do not fit, or can't run here.
    """
    from convert import loading

    target, draft = resolve(options, console, num_draft_tokens)
    device, how = options.device, options.plan(num_draft_tokens)
    return loading.load_model(target, draft, device.dtype, progress, **how)


def resolve(
    options: ModelOptions, console: "Console", num_draft_tokens: int | None = None, flag: str = "--model"
) -> tuple[Path, Path | None]:
    """The folders of target and drafter that the options name; what is missing is fetched.

    A pair that does not fit, or can't run here, is refused before a weight is fetched or read.

    Args and errors: see `load_pair`; `flag` is the command line's for the target, for errors.
    """
    from convert import loading

    options.check()
    dtype, how = options.device.dtype, options.plan(num_draft_tokens)
    return registry.resolve_folders(
        options.model,
        options.draft,
        console,
        options.revision,
        options.drafting.draft_revision,
        lambda config, draft_config: loading.plan_load(config, draft_config, dtype, **how),
        flag,
    )
