"""Which model to run: the table of public names, and how --model and --draft become folders of this machine."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from domino_jax.errors import DominoError, first_line

if TYPE_CHECKING:  # slow to import, and the command line is checked before
    from collections.abc import Callable

    from rich.console import Console

    from convert.hub import Snapshot
    from domino_jax.config import DecoderConfig, TargetConfig

DEMO_FOLDER = Path(__file__).parent / "demo"
NO_DRAFT = "none"
NGRAM = "ngram"  # of --draft: a drafter without weights; "DIR+ngram" is both


class PublicModel(NamedTuple):
    """A target and the drafters published for it: folders, or Hub repositories as "org/repo"."""

    target: str
    domino: str | None = None
    dflash: str | None = None
    shape: tuple[int, int] | None = None  # width and layers of a target with drafters, to recognise it in a folder
    others: tuple[tuple[str, str], ...] = ()  # kinds of more drafters, as their names end, and the best of them first
    dual_view: bool = False  # it has a second view, with which it drafts itself

    @property
    def drafter(self) -> str | None:
        """The one that is taken where none is asked for: its own view, else Domino's, DFlash's, or the first."""
        itself = self.target if self.dual_view else None
        return itself or self.domino or self.dflash or next((place for _, place in self.others), None)


def _deepspec(size: str) -> tuple[tuple[str, str], ...]:
    """DeepSpec's drafters for Qwen3 of a size: DSpark, and its DFlash."""
    kinds = {"dspark": "dspark", "dflash-block7": "dflash"}
    return tuple((name, f"deepseek-ai/{kind}_qwen3_{size}_block7") for name, kind in kinds.items())


TABLE = {
    "demo": PublicModel(str(DEMO_FOLDER / "target"), str(DEMO_FOLDER / "draft")),
    "qwen3-0.6b": PublicModel("Qwen/Qwen3-0.6B"),
    "qwen3-1.7b": PublicModel("Qwen/Qwen3-1.7B"),
    "qwen3-4b": PublicModel(
        "Qwen/Qwen3-4B",
        "Huang2020/Qwen3-4B-Domino-b16",
        "z-lab/Qwen3-4B-DFlash-b16",
        (2560, 36),
        _deepspec("4b"),
    ),
    "qwen3-8b": PublicModel(
        "Qwen/Qwen3-8B",
        "Huang2020/Qwen3-8B-Domino-b16",
        "z-lab/Qwen3-8B-DFlash-b16",
        (4096, 36),
        (
            *_deepspec("8b"),
            ("jetspec", "JetSpec/jetspec-qwen3-8b"),
            ("dflash-jetspec", "JetSpec/dflash-qwen3-8b-epoch6-3e-4-no-gamma"),
        ),
    ),
    "qwen3-14b": PublicModel("Qwen/Qwen3-14B", shape=(5120, 40), others=_deepspec("14b")),
    "qwen3-32b": PublicModel("Qwen/Qwen3-32B"),
    "qwen3-30b-a3b": PublicModel(
        "Qwen/Qwen3-30B-A3B", shape=(2048, 48), others=(("jetspec", "JetSpec/jetspec-qwen3-30b-a3b"),)
    ),
    "llama-3.1-8b": PublicModel(
        "meta-llama/Llama-3.1-8B-Instruct", dflash="z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat"
    ),
    "smollm2-135m": PublicModel("HuggingFaceTB/SmolLM2-135M-Instruct"),
    **{
        f"orthrus-qwen3-{size.lower()}": PublicModel(f"chiennv/Orthrus-Qwen3-{size}", dual_view=True)
        for size in ("1.7B", "4B", "8B")
    },
}
# After --draft a target's name means its drafter, of several Domino's; the others have names of their own.
OTHER_DRAFTERS = {f"{name}-dflash": public.dflash for name, public in TABLE.items() if public.dflash} | {
    f"{name}-{kind}": place for name, public in TABLE.items() for kind, place in public.others
}
DRAFTERS = {name: public.drafter for name, public in TABLE.items() if public.drafter} | OTHER_DRAFTERS
# What --help says, here and in the benchmark.
MODEL_HELP = f"target: {', '.join(TABLE)}, a folder, a GGUF file, or org/repo or org/repo/FILE.gguf on the Hub"
DRAFT_HELP = (
    f"drafter: {', '.join(DRAFTERS)}, a folder or org/repo; a smaller model, such as qwen3-0.6b, as assistant; ngram "
    "for matches in the text, DIR+ngram for both; or none. By default the public one of the model's name or repository"
)
REVISION_HELP = "branch, tag or commit of the target's repository; its main branch when not given"
DRAFT_REVISION_HELP = "branch, tag or commit of the drafter's repository"
REPOSITORY = r"[A-Za-z0-9][\w.-]*/[\w.-]+"
FILE_OF_REPOSITORY = rf"({REPOSITORY})/((?:[\w.-]+/)*[\w.-]+\.gguf)"


def locate(model: str, draft: str | None = None) -> tuple[str, str | None]:
    """Where a target and its drafter are: folders or Hub repositories, by the values of --model and --draft.

    Args:
        model: a name of the table, a folder, or "org/repo" on the Hub.
        draft: likewise; "none" for no drafter; None for the public one of `model`, by either of its names, or for a
            folder's own second view.

    Raises:
        DominoError: `model` is a drafter's name, or `draft` that of a target without one.
    """
    if model in OTHER_DRAFTERS:
        raise DominoError(f"{model} is a drafter: give it with --draft, and its target with --model.")
    # The table comes first; a folder of the same name is given as "./demo".
    target = TABLE[model].target if model in TABLE else model
    if draft is None:
        # A folder has no public drafter, even if its path reads like a repository's name.
        public = model in TABLE or not _is_folder(target)
        if not public and drafts_itself(Path(target)):
            return target, target
        return target, next((p.drafter for p in TABLE.values() if public and p.target == target), None)
    if draft == NO_DRAFT:
        return target, None
    if draft in TABLE and draft not in DRAFTERS:  # a model as assistant
        if TABLE[draft].target == target:
            raise DominoError(
                f"no drafter is public for {draft}: give a folder with --draft DIR, or one of {', '.join(DRAFTERS)}."
            )
        return target, TABLE[draft].target
    return target, DRAFTERS.get(draft, draft)


def is_public_domino(model: str, draft: str | None) -> bool:
    """Whether the values of --model and --draft name a Domino drafter that is published for its target."""
    return locate(model, draft)[1] in {public.domino for public in TABLE.values() if public.domino and public.dflash}


def split_draft(draft: str | None) -> tuple[str | None, bool]:
    """What --draft says of a drafter with weights, and whether it asks for n-grams; (None, True) is n-grams alone.

    Raises:
        DominoError: there is nothing before "+ngram".
    """
    if draft == NGRAM:
        return None, True
    if draft is None or not draft.endswith(f"+{NGRAM}"):
        return draft, False
    other = draft.removesuffix(f"+{NGRAM}")
    if other in ("", NGRAM, "none"):
        raise DominoError(f"--draft {draft}: +{NGRAM} adds to another drafter; --draft {NGRAM} is n-grams alone.")
    return other, True


def check_revisions(model: str, draft: str | None, revision: str | None, draft_revision: str | None) -> None:
    """Refuse a revision of what has none.

    Raises:
        DominoError: it is a folder, or there is no drafter.
    """
    flags = ("--revision", "--draft-revision")
    for flag, given, place in zip(flags, (revision, draft_revision), locate(model, draft), strict=True):
        if given is None:
            continue
        if place is None:
            raise DominoError(f"{flag} needs a drafter on the Hub, and there is no drafter: give one with --draft.")
        if _is_folder(place):
            raise DominoError(f"{flag} chooses a revision of a Hub repository, and {place} is a folder.")


def resolve_folders(
    model: str,
    draft: str | None,
    console: "Console",
    revision: str | None = None,
    draft_revision: str | None = None,
    check: "Callable[[TargetConfig, DecoderConfig | None], object] | None" = None,
    flag: str = "--model",
    weights: bool = True,
) -> tuple[Path, Path | None]:
    """The folders of a target and its drafter, fetched from the Hub where needed.

    Both config.json files come first: a pair that does not fit is refused before any weight is fetched.

    Args:
        model, draft: see `locate`.
        console: standard error, for notes and progress.
        revision, draft_revision: branch, tag or commit of a Hub repository; its main branch when None.
        check: raises if the pair can't run as asked; called before weights are fetched.
        flag: of the command line for the target, for errors.
        weights: fetch those too; else only what is needed to read the configs.

    Raises:
        DominoError: nothing is found under one of them, the two do not fit, or fetching fails.
    """
    check_revisions(model, draft, revision, draft_revision)
    places = locate(model, draft)
    found = [
        open_place(place, asked or model, flag, which, console)
        for place, asked, flag, which in zip(
            places, (model, draft), (flag, "--draft"), (revision, draft_revision), strict=True
        )
        if place is not None
    ]
    folders = [place if isinstance(place, Path) else place.configure(console) for place in found]
    target, drafter = folders[0], folders[1] if len(folders) > 1 else None
    if draft is None and drafter is None and drafts_itself(target):
        drafter = target
    remote = [place for place in found[: 1 if drafter == target else 2] if not isinstance(place, Path)]
    if remote:
        from convert import hub

        _, config, draft_config, _ = read_configs(target, drafter, flag)
        if check:
            check(config, draft_config)
        if weights:
            hub.download(remote, console)
    if drafter is None and draft is None:
        console.print(_plainly(model, target), markup=False, highlight=False, soft_wrap=True)
    return target, drafter


def read_configs(
    target: Path, draft: Path | None, flag: str = "--model"
) -> "tuple[dict[str, Any], TargetConfig, DecoderConfig | None, list[str]]":
    """The config.json files of a pair: the target's as it is and parsed, the drafter's parsed, and warnings.

    The drafter's is of one of `drafters.FORMS`: a TargetConfig where an ordinary model is to be an assistant.

    Args:
        flag: of the command line for the target, for errors.

    Raises:
        DominoError: one of them is not of a supported model, or the two do not fit.
    """
    from convert import hf
    from convert.configs import read_target_config
    from convert.drafters import form_of
    from convert.dual_view import holds_both
    from domino_jax.config import TargetConfig, check_pair

    file = target / "config.json"
    raw = hf.read_json(file)
    if form_of(raw).config is not TargetConfig and not holds_both(raw, target):
        raise DominoError(f"{target} holds a drafter; {flag} takes the target that it is a drafter of.")
    config = read_target_config(raw, file)
    if draft is None:
        return raw, config, None, []
    file = draft / "config.json"
    raw_draft = hf.read_json(file)
    form = form_of(raw_draft, draft)
    if form.config is TargetConfig:
        if draft.resolve() == target.resolve():
            raise DominoError(f"{draft} is the target itself; --draft takes its drafter, or a smaller model.")
        assistant = read_target_config(raw_draft, file)
        if assistant.vocab_size != config.vocab_size:
            raise DominoError(
                f"{draft} can't be an assistant: its vocabulary has {assistant.vocab_size} tokens, the target's "
                f"{config.vocab_size}; they must be the same."
            )
        return raw, config, assistant, []
    draft_config, warnings = form.read(raw_draft, config.num_hidden_layers, file)
    return raw, config, draft_config, [*warnings, *check_pair(config, draft_config)]


def drafts_itself(target: Path) -> bool:
    """Whether a target's folder holds a second view of it."""
    from convert.dual_view import holds_both
    from convert.fields import read_json

    try:
        return holds_both(read_json(target / "config.json"), target)
    except DominoError:
        return False  # who reads it says what is wrong


def _is_folder(place: str) -> bool:
    """Whether it is a folder of this machine, or a file that takes a folder's place."""
    try:
        return Path(place).is_dir() or (place.endswith(".gguf") and Path(place).is_file())
    except OSError as error:
        raise DominoError(f"{place} can't be read: {first_line(error)}.") from None


def open_place(place: str, asked: str, flag: str, revision: str | None, console: "Console") -> "Path | Snapshot":
    """The folder `place`, or the Hub's repository or GGUF file of that name; `asked` is what the user wrote.

    Raises:
        DominoError: it is neither, or the Hub does not have it.
    """
    if _is_folder(place):
        return _readable(Path(place))
    if place.startswith(str(DEMO_FOLDER)):
        raise DominoError(f"the shipped model is not in this installation ({place}); give a folder with {flag} DIR.")
    file = re.fullmatch(FILE_OF_REPOSITORY, place)
    if not file and not re.fullmatch(REPOSITORY, place):
        known = DRAFTERS if flag == "--draft" else TABLE
        raise DominoError(
            f"{asked!r} is neither a name ({', '.join(known)}) nor a folder or GGUF file here nor org/repo on the Hub; "
            f"give a folder with {flag} DIR."
        )
    from convert import hub

    if file:
        return hub.open_snapshot(file[1], revision, flag, console, file[2])
    return hub.open_snapshot(place, revision, flag, console)


def _readable(place: Path) -> Path:
    """The folder to read a model from: the place itself, or one that is made of a GGUF file."""
    from convert.gguf import as_folder

    return as_folder(place)


def _plainly(model: str, target: Path) -> str:
    """Why there is no drafter, and how to give one."""
    _, config, _, _ = read_configs(target, None)
    shape = config.hidden_size, config.num_hidden_layers
    fitting = next((name for name, public in TABLE.items() if public.shape == shape), None)
    known = any(model in (name, public.target) for name, public in TABLE.items())
    return f"no drafter{f' is public for {model}' if known else ''}: decoding plainly; give one with --draft DIR" + (
        f", or {fitting}'s, made for a target of this shape, with --draft {fitting}." if fitting else "."
    )
