"""A run's settings from flags and TOML files, and as the file that is saved with the run.

The tables of a file are the groups of `TrainConfig`, its keys the flags' names with underscores:

    target = "qwen3-4b"
    [data]
    data = ["conversations.jsonl"]
    [objective]
    lambda_schedule = "cosine"

A flag wins over the file (`--config`), and the file over the defaults.
"""

import argparse
import dataclasses
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from convert.options import ProcessOptions, absolute, flag, local_sources
from convert.values import shown, shown_key
from domino_jax.errors import DominoError, first_line
from domino_jax.runtime.command import UsageError, parse_words
from domino_jax.runtime.files import check_output, write_text
from domino_jax.runtime.parsing import read_text
from train.config import GROUPS, HERE, TrainConfig, check_options, flat

# What a resumed run may change: where things are, the devices, what is kept and shown, and gentler rates for a run that
# diverged. The steps are not among them: the schedules depend on them.
CHANGEABLE = {
    *("target", "data", "features", "validation"),
    *("mesh", "accumulate", "remat", "block_attention", "target_attention", "chunk"),
    *("lr", "muon_lr", "clip", "max_grad_norm_ratio"),
    *("log_every", "save_every", "keep", "validate_every", "validation_tokens", "validation_prompts", "tensorboard"),
}

SETTINGS = "settings.toml"

# Names that settings had before; flags, files and saved runs may still use them.
RENAMED = {"taps": "target_layer_ids", "begin_as": "init_from", "explosion": "max_grad_norm_ratio"}
# Settings that became a value of another one: the old name and value -> the new name and value.
REPLACED: dict[tuple[str, Any], tuple[str, Any]] = {
    ("warm", True): ("init", "target-layers"),
    ("warm", False): ("init", "random"),
    ("trains", "head"): ("freeze_backbone", True),
    ("trains", "all"): ("freeze_backbone", False),
    ("head", True): ("head", "domino"),
    ("head", False): ("head", "none"),
}
MOVED = {("run", "remat"): "objective"}  # a setting's earlier group -> its group


def parse_options(argv: Sequence[str] | None = None, prog: str = "python -m train", epilog: str = "") -> TrainConfig:
    """The settings that the words of a command line give, with those of --config or of the run that is resumed.

    Args:
        argv: the words; the process's own when None.
        prog: the command as the user types it, for the help.
        epilog: text of the help after its first sentence.

    Raises:
        UsageError: a word is unknown, or a value makes no sense.
        DominoError: a file can't be read, or a setting in it is wrong.
        SystemExit: the help was asked for, and was printed.
    """
    argv = current_flags(sys.argv[1:] if argv is None else argv)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--config")
    early.add_argument("--out", type=Path, default=TrainConfig.out)
    early.add_argument("--resume", action="store_true")
    try:
        words, _ = early.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}; see {prog} --help.") from None
    file = settings_file(words.config, words.out, words.resume)
    default = read_recipe(file) if file else TrainConfig()
    return check_change(default, parse_words(TrainConfig, argv, prog=prog, default=default, epilog=epilog), file)


def configure(options: TrainConfig | None, settings: Mapping[str, Any]) -> TrainConfig:
    """The settings of a call from Python, checked as those of a command line are.

    Args:
        options: when None, the defaults, or those of the recipe or the run that the settings name.
        settings: fields of the groups by name, of `TrainConfig` itself, or whole groups.

    Raises:
        DominoError: a name is unknown, or a value of another type or without sense.
    """
    file = None
    if options is None:
        kinds = {f.name: f.type for f in dataclasses.fields(TrainConfig)}
        early = {
            name: typed(kinds[name], settings.get(name, getattr(TrainConfig, name)), f"{name} is set to")
            for name in ("config", "out", "resume")
        }
        file = settings_file(early["config"], early["out"], early["resume"])
        options = read_recipe(file) if file else TrainConfig()
    default = options
    made: dict[str, dict[str, Any]] = {}
    whole: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, GROUPS.get(name, ())) or (name == "processes" and isinstance(value, ProcessOptions)):
            whole[name] = value
            continue
        groups = {**GROUPS, "": TrainConfig}
        group, kind = next(
            (
                (group, f.type)
                for group, form in groups.items()
                for f in dataclasses.fields(form)
                if f.name == name and (group or name not in GROUPS)
            ),
            (None, None),
        )
        if group is None:
            known = ", ".join(["out", "config", "resume", *flat(options)])
            raise UsageError(f"{name} is no setting of a training; those are {known}.")
        made.setdefault(group, {})[name] = typed(kind, value, f"{name} is set to")
    options = dataclasses.replace(options, **whole, **made.pop("", {}))
    changed: dict[str, Any] = {
        group: dataclasses.replace(getattr(options, group), **values) for group, values in made.items()
    }
    options = dataclasses.replace(options, **changed)
    if options.resume and (saved := settings_file(None, options.out, True)):
        return check_change(read_recipe(saved), options, saved)
    return check_change(default, options, file)


def settings_file(recipe: str | None, out: Path, resume: bool) -> Path | None:
    """Where the settings stand that flags or keywords change: the resumed run's own, a recipe's; None for the defaults.

    Raises:
        DominoError: there is no such run or recipe.
    """
    if not resume:
        return recipe_path(recipe) if recipe else None
    if recipe:
        raise UsageError("a resumed run has its own settings: leave out --config.")
    saved = out / SETTINGS
    if not saved.exists():
        raise DominoError(f"there is no run to resume in {out}: {saved} does not exist.")
    return saved


def check_change(default: TrainConfig, options: TrainConfig, file: Path | None = None) -> TrainConfig:
    """The options, if the run may begin, or go on, with them.

    Args:
        default: what they were before flags or keywords changed them.
        file: where those stand.

    Raises:
        UsageError: a value makes no sense, or a resumed run would become another.
        DominoError: --out holds a run already, or something else, or is read.
    """
    if options.resume:
        before, now = flat(with_absolute_paths(default)), flat(with_absolute_paths(options))
        kept = [name for name in now if now[name] != before[name] and name not in CHANGEABLE]
        if kept:
            raise UsageError(f"a resumed run keeps its settings; leave out {', '.join(map(flag, kept))}.")
    elif (options.out / SETTINGS).exists():
        raise DominoError(f"{options.out} already holds a run; continue it with --resume, or give another --out.")
    try:
        check_options(options)
    except UsageError as error:
        if file is not None and _is_the_files_fault(str(error), default, options):
            raise DominoError(f"{file}: {error}") from None
        raise
    if not options.resume:
        check_output(options.out, "a training run", read_places(options))
    return options


def _is_the_files_fault(error: str, default: TrainConfig, options: TrainConfig) -> bool:
    """Whether the settings that an error names are those of the file, and no word of the command line is to blame."""
    if options.target is None or not options.data.data:  # a recipe may leave these to the command line
        return False
    usual, given, now = flat(TrainConfig()), flat(default), flat(options)
    named = [name for name in now if re.search(rf"{flag(name)}(?![\w-])", error)]
    # By what they look like: NaN is not equal to itself.
    return all(repr(now[name]) == repr(given[name]) for name in named) and any(
        given[name] != usual[name] for name in named
    )


def with_absolute_paths(options: TrainConfig) -> TrainConfig:
    """The options with files and folders named as they are found from any working folder."""
    data, drafter = options.data, options.drafter
    paths = {
        name: path and path.absolute() for name, path in (("features", data.features), ("validation", data.validation))
    }
    return dataclasses.replace(
        options,
        target=absolute(options.target),
        data=dataclasses.replace(data, data=tuple(str(absolute(one)) for one in data.data), **paths),
        drafter=dataclasses.replace(drafter, init_from=drafter.init_from and drafter.init_from.absolute()),
    )


def read_places(options: TrainConfig) -> list[Path]:
    """The files and folders that a run reads."""
    data, drafter = options.data, options.drafter
    return local_sources(options.target, *data.data, data.features, data.validation, drafter.init_from)


def current_flags(argv: Sequence[str]) -> list[str]:
    """The words of a command line, with today's flags in the place of earlier ones."""
    made, words = [], iter(argv)
    for word in words:
        given, equals, value = word.partition("=")
        name = given.removeprefix("--").replace("-", "_")
        if not given.startswith("--"):
            made.append(word)
        elif name in RENAMED:
            made.append(flag(RENAMED[name]) + equals + value)
        elif name in ("warm", "no_warm"):
            made += ["--init", REPLACED["warm", name == "warm"][1]]
        elif name == "no_head":
            made += ["--head", REPLACED["head", False][1]]
        elif name == "trains":
            value = value if equals else next(words, "")
            if ("trains", value) not in REPLACED:
                raise UsageError(f"--trains can't be {value!r}; give --freeze-backbone to train the head alone.")
            made.append("--freeze-backbone" if REPLACED["trains", value][1] else "--no-freeze-backbone")
        else:
            made.append(word)
    return made


def recipe_path(name: str) -> Path:
    """A TOML file by its path or, for those that are shipped, by name.

    Raises:
        UsageError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    folder = Path(str(resources.files("train"))) / "recipes"
    shipped = folder / f"{name}.toml"
    if not shipped.is_file():
        names = ", ".join(sorted(file.stem for file in folder.glob("*.toml")))
        raise UsageError(f"--config {name} is neither a file nor a shipped recipe ({names}).")
    return shipped


def read_recipe(path: Path) -> TrainConfig:
    """The settings of a TOML file over the defaults.

    Raises:
        DominoError: it can't be read, or a name or a value in it is wrong.
    """
    try:
        tables = tomllib.loads(read_text(path))
    except RecursionError:
        raise DominoError(f"{path} can't be read as TOML: it is nested too deep.") from None
    except (OSError, ValueError) as error:
        raise DominoError(f"{path} can't be read as TOML: {first_line(error)}.") from None
    wrong = [name for name in tables if name in HERE]
    if wrong:
        raise DominoError(f"{path} sets {wrong[0]}, which belongs on the command line.")
    for name in GROUPS:
        if not isinstance(tables.get(name, {}), Mapping):
            raise DominoError(f"[{name}] of {path} is no table: settings of a group stand under [{name}].")
    for (group, name), now in MOVED.items():
        if name in tables.get(group, {}):
            tables.setdefault(now, {}).setdefault(name, tables[group].pop(name))
    groups = {name: _fill(GROUPS[name], tables.pop(name), f"[{name}] of {path}") for name in GROUPS if name in tables}
    return dataclasses.replace(_fill(TrainConfig, tables, str(path)), **groups)


def _fill(form: Any, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass from a table of TOML, each value of its field's type."""
    named = {f.name: f for f in dataclasses.fields(form) if f.name not in GROUPS or form is not TrainConfig}
    made = {}
    for given, value in values.items():
        name = RENAMED.get(given, given)
        if isinstance(value, bool | str):
            name, value = REPLACED.get((name, value), (name, value))
        if name not in named:
            raise DominoError(
                f"{where} sets {shown_key(given)}, which is no setting there; those are {', '.join(named)}."
            )
        made[name] = typed(named[name].type, value, f"{where} sets {given} to")
    return form(**made)


def typed(kind: Any, value: Any, said: str) -> Any:
    """A value of TOML, or of a keyword, as a field of that type holds it.

    Args:
        said: how an error begins.

    Raises:
        DominoError: it is of another type.
    """
    try:
        return _typed(kind, value)
    except (TypeError, ValueError, OverflowError):
        raise DominoError(f"{said} {shown(value)}; expected {_words(kind)}.") from None


def _typed(kind: Any, value: Any) -> Any:
    if get_origin(kind) is Annotated:
        return _typed(get_args(kind)[0], value)
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise ValueError
    if get_origin(kind) is tuple:
        values = [value] if isinstance(value, str | Path) else list(value)
        if isinstance(value, Mapping):
            raise TypeError
        return tuple(_typed(get_args(kind)[0], one) for one in values)
    choices = get_args(kind)
    if choices:  # a type or None, and TOML knows no None
        return None if value is None else _typed(next(one for one in choices if one is not type(None)), value)
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind is str and isinstance(value, Path):
        return str(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (bool, int, float, str) and type(value) is kind:
        return value
    raise TypeError


def _words(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) is Annotated:
        return _words(get_args(kind)[0])
    if type(None) in get_args(kind):
        return " or ".join(_words(one) for one in get_args(kind) if one is not type(None))
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list, each {_words(get_args(kind)[0])}"
    return kind.__name__


def dump(options: TrainConfig) -> str:
    """The settings as TOML that `read_recipe` reads back; what is None is left out."""
    import tomli_w  # of an extra, and the command line is checked without it

    def plain(values: dict[str, Any]) -> dict[str, Any]:
        return {n: str(v) if isinstance(v, Path) else v for n, v in values.items() if v is not None}

    top = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in (*HERE, *GROUPS)}
    groups = {name: plain(dataclasses.asdict(getattr(options, name))) for name in GROUPS}
    return tomli_w.dumps(plain(top) | groups)


def write_recipe(options: TrainConfig, folder: Path) -> None:
    """Save the settings with the run, whole or not at all; the run may go on from another working folder."""
    write_text(folder / SETTINGS, dump(with_absolute_paths(options)))
