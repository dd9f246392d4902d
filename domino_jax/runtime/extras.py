"""Optional packages: which extra of this project installs each."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from domino_jax.errors import DominoError

EXTRAS = {
    "datasets": "train",
    "grain": "train",
    "httpx": "serve",
    "libtpu": "aot",
    "llguidance": "serve",
    "matplotlib": "plots",
    "optax": "train",
    "orbax": "orbax",
    "prometheus_client": "serve",
    "ray": "ray",
    "starlette": "serve",
    "tensorboardX": "train",
    "tomli_w": "train",
    "uvicorn": "serve",
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
        raise _missing(package) from None


def require(*packages: str) -> None:
    """Make sure, before long work begins, that what will be imported at its end is installed.

    Raises:
        DominoError: a package is not, with its extra.
    """
    for package in packages:
        if not is_installed(package):
            raise _missing(package)


def is_installed(package: str) -> bool:
    """Whether an optional package can be imported."""
    return find_spec(package) is not None


def _missing(package: str) -> DominoError:
    return DominoError(
        f'the package {package} is not installed; install it with: pip install "domino-jax[{EXTRAS[package]}]".'
    )
