"""What a device says when its memory is exhausted, in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from domino_jax.errors import DominoError


@contextmanager
def explain_out_of_memory(otherwise: str) -> Iterator[None]:
    """Turn the device's error into a DominoError that says `otherwise`; others pass."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DominoError(otherwise) from None
