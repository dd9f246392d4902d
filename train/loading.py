"""Which target and drafter a command means."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import DisallowNone, arg

from convert import registry
from convert.options import UNSET, DeviceOptions, DraftingOptions, ModelOptions, resolve
from domino_jax.runtime.command import UsageError


@dataclass(frozen=True)
class PairOptions:
    """A target and its drafter: ModelOptions under the trainer's name for the target, which has no default here."""

    target: Annotated[str | None, DisallowNone, UNSET, arg(aliases=("--model",), help=registry.MODEL_HELP)] = None
    revision: Annotated[str | None, DisallowNone, UNSET, arg(help=registry.REVISION_HELP)] = None
    drafting: DraftingOptions = field(default_factory=DraftingOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)

    def model(self) -> ModelOptions:
        """The same as the options of loading.

        Raises:
            UsageError: there is no target, or the options make no sense.
        """
        if self.target is None:
            raise UsageError(f"give --target: {registry.MODEL_HELP.removeprefix('target: ')}.")
        made = ModelOptions(self.target, self.revision, self.drafting, self.device)
        made.check()
        return made

    def folders(self, console: Console) -> tuple[Path, Path | None]:
        """The folders of target and drafter, fetched where needed; see `convert.options.resolve`."""
        return resolve(self.model(), console, flag="--target")


def notes() -> Console:
    """Standard error, for notes; of several processes only the first one's, so they must have joined."""
    import jax

    return Console(stderr=True, quiet=jax.process_index() > 0)


def find(target: str, flag: str = "--target") -> Path:
    """The folder of a target by a name such as qwen3-4b, a folder, or org/repo on the Hub, fetched where needed.

    Raises:
        DominoError: nothing is found under it, or fetching fails.
    """
    return registry.resolve_folders(target, registry.NO_DRAFT, Console(stderr=True), flag=flag)[0]
