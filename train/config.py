"""A run's settings: dataclasses that flags and TOML files are both read into, and that are saved with the run.

The tables of a file are the groups below, its keys the flags' names with underscores:

    target = "qwen3-4b"
    [data]
    data = ["conversations.jsonl"]
    [objective]
    lambda_schedule = "cosine"

Defaults give way to the file (`--config`), the file to the flags.
"""

import argparse
import dataclasses
import math
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w
import tyro

from domino_jax.config import DraftConfig, HeadConfig, TargetConfig, default_taps
from domino_jax.errors import DominoError
from domino_jax.runtime.files import write_text


@dataclass(frozen=True)
class Data:
    """What is learned from."""

    data: tuple[str, ...] = ()
    """JSONL files (conversations, prompts with completions, texts, ids; see docs/training.md) or a dataset of the Hub;
    best with answers that the target itself has written (train.regenerate)"""
    split: str = "train"
    """of a Hub dataset"""
    length: int = 3072
    """tokens a sequence is cut to"""
    pack: bool = False
    """put several short conversations into one sequence"""
    features: Path | None = None
    """folder that train.capture wrote: the target's features are read and not computed"""
    validation: Path | None = None
    """JSONL of held-out prompts to decode now and then, for the true acceptance length"""


@dataclass(frozen=True)
class Drafter:
    """What is trained."""

    layers: int = 5
    """layers of the drafter"""
    block_size: int = 16
    """M, rows of a block"""
    taps: tuple[int, ...] = ()
    """target layers to read; spread over the depth when not given"""
    intermediate_size: int | None = None
    """MLP width of the drafter; the target's when not given"""
    head: bool = True
    """train the causal head; --no-head is plain DFlash"""
    gru_hidden_dim: int = 1024
    emb_dim: int = 256
    """rank of the head's vocabulary projection"""
    pure_draft_prefix_len: int = 1
    """first proposals that the head leaves alone"""
    shift_label: bool = True
    """the anchor's own row makes the first proposal"""
    mask_token_id: int | None = None
    """the tokenizer's mask token when not given; 151669 is Qwen3's"""
    warm: bool = False
    """begin as the target's last layers instead of at random"""
    begin_as: Path | None = None
    """begin as the drafter of this folder; one without a head (DFlash) gets a head at zero correction"""
    trains: Literal["all", "head"] = "all"
    """head: the backbone stays as it began (with --begin-as)"""


@dataclass(frozen=True)
class Objective:
    """The loss (docs/algorithm.md, section 7): (1 - λ)·final + λ·base."""

    anchors: int = 256
    """A, blocks a sequence"""
    loss: Literal["ce", "kl"] = "ce"
    """cross-entropy to the tokens, or KL divergence to the target's distribution"""
    position_weights: Literal["exponential", "d-pace"] = "exponential"
    """of a block's proposals: exp(-(j - 1)/γ), or by what limits acceptance now (D-PACE, arXiv 2605.18810)"""
    d_pace_alpha: float = 0.5
    """α, how much D-PACE smooths the probabilities"""
    gamma: float = 7.0
    """γ, decay of the exponential weights"""
    lambda_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """how λ falls from its start to 0"""
    lambda_base_start: float = 1.0
    lambda_base_decay_ratio: float = 1.0
    """share of the steps over which λ falls to 0"""
    chunk: int = 1024
    """proposals whose logits exist at a time"""
    block_attention: Literal["auto", "dense", "chunked", "cudnn", "pallas"] = "auto"
    """how the blocks attend to their context: with all scores in memory, some anchors at a time, by cuDNN's kernel
    (NVIDIA, bfloat16), or by a kernel for TPUs (neither is measured yet)"""
    target_attention: Literal["xla", "cudnn"] = "xla"
    """how the frozen target attends, likewise"""


@dataclass(frozen=True)
class Optimizer:
    """How the weights move."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the matrices, with AdamW for the rest"""
    lr: float = 6e-4
    """of AdamW"""
    muon_lr: float = 0.02
    warmup: float = 0.04
    """share of the steps with a rising learning rate"""
    weight_decay: float = 0.01
    clip: float = 1.0
    """largest gradient norm"""
    ema: float = 0.0
    """decay of a running average of the weights, which then is the drafter that is written and validated; 0: none"""


@dataclass(frozen=True)
class Run:
    """How long, on what, and what is kept."""

    steps: int | None = None
    """as many as --epochs take when not given"""
    epochs: float = 6.0
    """passes over the data"""
    batch: int = 8
    """sequences a step, on all devices together"""
    accumulate: int = 1
    """parts that a step's batch is computed in, one after another: memory for time, the same gradient"""
    mesh: str | None = None
    """devices, such as data=1,fsdp=4,model=2; all of them on fsdp when not given (one on a CPU)"""
    remat: bool = False
    """compute the drafter's layers again in the backward pass: less memory, more time"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """of the computation (masters are float32): float32 on a CPU and bfloat16 elsewhere when not given"""
    seed: int = 0
    log_every: int = 10
    save_every: int = 200
    keep: int = 3
    """newest checkpoints that stay, besides the one with the best validation"""
    validate_every: int = 0
    """steps between validations, at each of which a checkpoint is saved too; as save_every when 0"""
    validation_tokens: int = 64
    """new tokens for each prompt"""
    validation_prompts: int = 32
    """of the file, the first so many"""
    explosion: float = 1000.0
    """stop at a step whose gradient norm is so many times the usual one"""
    tensorboard: bool = True
    """write events for TensorBoard"""


@dataclass(frozen=True)
class Train:
    """Train a Domino drafter for a frozen Qwen3 target (base-anchored curriculum)."""

    target: str | None = None
    """the frozen target: a name such as qwen3-4b, a folder, or org/repo on the Hub"""
    out: Path = Path("runs/drafter")
    """folder of the run"""
    config: str | None = None
    """TOML file of settings, or a shipped recipe: demo, qwen3-4b, qwen3-8b"""
    resume: bool = False
    """continue the run in --out, with its own settings"""
    coordinator: str | None = None
    """with several processes: HOST:PORT of the first one"""
    num_processes: int | None = None
    process_id: int | None = None
    data: Data = field(default_factory=Data)
    drafter: Drafter = field(default_factory=Drafter)
    objective: Objective = field(default_factory=Objective)
    optimizer: Optimizer = field(default_factory=Optimizer)
    run: Run = field(default_factory=Run)


GROUPS: dict[str, Any] = {
    "data": Data,
    "drafter": Drafter,
    "objective": Objective,
    "optimizer": Optimizer,
    "run": Run,
}
# Words about one start of a run, which are no settings of it.
HERE = ("out", "config", "resume", "coordinator", "num_processes", "process_id")

# What a resumed run may change: where things are, the devices, what is kept and shown, and gentler rates for a run that
# diverged. The steps are not among them: the schedules depend on them.
CHANGEABLE = {
    *("target", "data", "features", "validation"),
    *("mesh", "accumulate", "remat", "block_attention", "target_attention", "chunk"),
    *("lr", "muon_lr", "clip", "explosion"),
    *("log_every", "save_every", "keep", "validate_every", "validation_tokens", "validation_prompts", "tensorboard"),
}

SETTINGS = "settings.toml"


def parse_options(argv: Sequence[str] | None = None) -> Train:
    """The settings that the words of a command line give, with those of --config or of the run that is resumed.

    Raises:
        DominoError: a file can't be read, names a setting that does not exist, or a value makes no sense.
        SystemExit: the words are wrong, or ask for help.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--out", type=Path, default=Train.out)
    early.add_argument("--resume", action="store_true")
    words, _ = early.parse_known_args(argv)
    saved = words.out / SETTINGS
    if words.resume:
        if words.config:
            raise DominoError("a resumed run has its own settings: leave out --config.")
        if not saved.exists():
            raise DominoError(f"there is no run to resume in {words.out}: {saved} does not exist.")
        default = read_recipe(saved)
    else:
        default = read_recipe(recipe_path(words.config)) if words.config else Train()
    options = tyro.cli(Train, args=argv, default=default, prog="python -m train", config=(tyro.conf.OmitArgPrefixes,))
    if words.resume:
        before, now = flat(default), flat(options)
        kept = [name for name in now if now[name] != before[name] and name not in CHANGEABLE]
        if kept:
            raise DominoError(f"a resumed run keeps its settings; leave out {', '.join(map(flag, kept))}.")
    elif saved.exists():
        raise DominoError(f"{options.out} already holds a run; continue it with --resume, or give another --out.")
    return check_options(options)


def flag(name: str) -> str:
    """A setting's name as it is given on the command line."""
    return "--" + name.replace("_", "-")


def flat(options: Train) -> dict[str, Any]:
    """All settings by name, whatever their group: no name is in two."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in (*HERE, *GROUPS)}
    for group in GROUPS:
        values |= {f.name: getattr(getattr(options, group), f.name) for f in dataclasses.fields(GROUPS[group])}
    return values


def recipe_path(name: str) -> Path:
    """A TOML file by its path or, for those that are shipped, by name.

    Raises:
        DominoError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    folder = Path(str(resources.files("train"))) / "recipes"
    shipped = folder / f"{name}.toml"
    if not shipped.is_file():
        names = ", ".join(sorted(file.stem for file in folder.glob("*.toml")))
        raise DominoError(f"--config {name} is neither a file nor a shipped recipe ({names}).")
    return shipped


def read_recipe(path: Path) -> Train:
    """The settings of a TOML file over the defaults.

    Raises:
        DominoError: it can't be read, or a name or a value in it is wrong.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DominoError(f"{path} can't be read as TOML: {error}.") from None
    groups = {name: _fill(GROUPS[name], tables.pop(name), path, name) for name in GROUPS if name in tables}
    wrong = [name for name in tables if name in HERE]
    if wrong:
        raise DominoError(f"{path} sets {wrong[0]}, which belongs on the command line.")
    return dataclasses.replace(_fill(Train, tables, path, None), **groups)


def _fill(form: Any, values: Any, path: Path, group: str | None) -> Any:
    """A dataclass from a table of TOML, each value of its field's type."""
    where = f"[{group}] of {path}" if group else str(path)
    if not isinstance(values, Mapping):
        raise DominoError(f"{where} is no table: settings of a group stand under [{group}].")
    fields = {f.name: f for f in dataclasses.fields(form) if group or f.name not in GROUPS}
    unknown = [name for name in values if name not in fields]
    if unknown:
        raise DominoError(f"{where} sets {unknown[0]}, which is no setting there; those are {', '.join(fields)}.")
    made = {}
    for name, value in values.items():
        try:
            made[name] = _typed(fields[name].type, value)
        except (TypeError, ValueError):
            raise DominoError(f"{where} sets {name} to {value!r}; expected {_words(fields[name].type)}.") from None
    return form(**made)


def _typed(kind: Any, value: Any) -> Any:
    """A value of TOML as a field of that type holds it."""
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise ValueError
    if get_origin(kind) is tuple:
        values = [value] if isinstance(value, str) else list(value)
        return tuple(_typed(get_args(kind)[0], one) for one in values)
    options = get_args(kind)
    if options:  # a type or None, and TOML knows no None
        return _typed(next(one for one in options if one is not type(None)), value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (bool, int, float, str) and type(value) is kind:
        return value
    raise TypeError


def _words(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


def dump(options: Train) -> str:
    """The settings as TOML that `read_recipe` reads back; what is None is left out."""

    def plain(values: dict[str, Any]) -> dict[str, Any]:
        return {n: str(v) if isinstance(v, Path) else v for n, v in values.items() if v is not None}

    top = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in (*HERE, *GROUPS)}
    groups = {name: plain(dataclasses.asdict(getattr(options, name))) for name in GROUPS}
    return tomli_w.dumps(plain(top) | groups)


def check_options(options: Train) -> Train:
    """The options, if their values make sense.

    Raises:
        DominoError: one does not, or what is needed was not given.
    """
    values = flat(options)
    if options.target is None or not options.data.data:
        raise DominoError(
            "give --target (a model's name or folder) and --data (JSONL files, or a Hub dataset), or --resume with "
            "--out."
        )
    counts = "batch length anchors chunk layers accumulate log_every save_every keep validation_tokens"
    rules: dict[str, Callable[[Any], bool]] = dict.fromkeys(counts.split(), lambda x: x >= 1)
    rules["validation_prompts"] = rules["batch"]
    rules |= dict.fromkeys(("lr", "muon_lr", "clip", "gamma"), lambda x: 0 < x < math.inf)
    rules |= dict.fromkeys(("warmup", "lambda_base_start", "d_pace_alpha"), lambda x: 0 <= x <= 1)
    rules |= dict.fromkeys(("weight_decay", "lambda_base_decay_ratio"), lambda x: 0 <= x < math.inf)
    rules |= {
        "intermediate_size": lambda x: x is None or x >= 1,
        "steps": lambda x: x is None or x >= 1,
        "epochs": lambda x: 0 < x < math.inf,
        "ema": lambda x: 0 <= x < 1,
        "explosion": lambda x: x > 1,
        "validate_every": lambda x: x >= 0,
    }
    for name, holds in rules.items():
        if not holds(values[name]):
            raise DominoError(f"{flag(name)} can't be {values[name]}.")
    if options.run.batch % options.run.accumulate:
        raise DominoError(f"--accumulate {options.run.accumulate} does not divide --batch {options.run.batch}.")
    if options.drafter.warm and options.drafter.begin_as:
        raise DominoError("a drafter begins in one way: give --warm or --begin-as, not both.")
    if options.drafter.trains == "head" and not options.drafter.head:
        raise DominoError("--trains head needs a head: leave out --no-head.")
    if options.drafter.trains == "head" and not (options.drafter.begin_as or options.drafter.warm):
        raise DominoError(
            "--trains head leaves the backbone as it began, which is at random: give --begin-as a drafter."
        )
    return options


def draft_config(options: Drafter, target: TargetConfig) -> DraftConfig:
    """The drafter's config, once its mask token is known: its layers have the target's geometry."""
    assert options.mask_token_id is not None
    return DraftConfig(
        **target.geometry(
            num_hidden_layers=options.layers,
            intermediate_size=options.intermediate_size or target.intermediate_size,
        ),
        block_size=options.block_size,
        mask_token_id=options.mask_token_id,
        target_layer_ids=options.taps or default_taps(target.num_hidden_layers, options.layers),
        num_target_layers=target.num_hidden_layers,
        shift_label=options.shift_label,
        head=HeadConfig(options.gru_hidden_dim, options.emb_dim, options.pure_draft_prefix_len)
        if options.head
        else None,
    )


def write_recipe(options: Train, folder: Path) -> None:
    """Save the settings with the run, whole or not at all."""
    write_text(folder / SETTINGS, dump(options))
