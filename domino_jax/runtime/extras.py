"""Optional packages: which extra of this project installs each."""

from collections.abc import Iterator
from contextlib import contextmanager

from domino_jax.errors import DominoError

EXTRAS = {
    "datasets": "train",
    "grain": "train",
    "matplotlib": "plots",
    "optax": "train",
    "orbax": "orbax",
    "tensorboardX": "train",
    "tomli_w": "train",
}


@contextmanager
def explain_missing_extra() -> Iterator[None]:
    """Inside, an import of an optional package that is not installed raises a DominoError that names its extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise DominoError(
            f'the package {package} is not installed; install it with: pip install "domino-jax[{EXTRAS[package]}]".'
        ) from None
