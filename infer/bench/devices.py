"""Devices as a command line names them: a kind and a number."""

import re

from domino_jax.errors import DominoError
from domino_jax.runtime.devices import DEVICES, Device


def find_devices(text: str) -> tuple[Device, int]:
    """The kind of device and how many, of a name such as v6e-4, h100 or a100-80-8; one where no number is given.

    Raises:
        DominoError: no such device is known, or the number is not that of whole devices.
    """
    device, number = DEVICES.get(text), 1
    if device is not None:
        return device, number
    found = re.fullmatch(r"(.+)-([1-9][0-9]{0,4})", text, re.ASCII)
    device = DEVICES.get(found[1]) if found else None
    if device is None or found is None:
        names = ", ".join(f"{name}-{4 * one.counted}" if one.platform == "tpu" else name for name, one in _named())
        raise DominoError(f"devices are given by name and number, such as {names}, h100-8; found {text[:80]!r}.")
    if int(found[2]) % device.counted:
        raise DominoError(
            f"the number of {device.name}-{found[2]} counts TensorCores, as Google does, and a chip has "
            f"{device.counted}: {device.name}-{2 * int(found[2])} is {found[2]} chips."
        )
    return device, int(found[2]) // device.counted


def _named() -> list[tuple[str, Device]]:
    return sorted(DEVICES.items(), key=lambda item: (item[1].platform != "tpu", item[1].memory))
