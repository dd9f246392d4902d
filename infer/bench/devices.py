"""Accelerators by name: what one device of each has and gives, as its maker states it.

A stated rate is a peak; what a program reaches is less. A device is what JAX counts as one: a chip of a TPU, one GPU.
"""

import re
from typing import Literal, NamedTuple

from domino_jax.errors import DominoError

GIB, GB, TERA = 2.0**30, 1e9, 1e12


class Device(NamedTuple):
    """One accelerator."""

    name: str
    platform: Literal["tpu", "gpu"]
    memory: float  # bytes
    bandwidth: float  # bytes of that memory a second
    flops: float  # a second, of products in bfloat16 without sparsity
    counted: int = 1  # what the number of a name such as v5p-8 counts, of each device


# Google's pages state GB and mean GiB (docs.cloud.google.com/tpu/docs/tpu7x has the same figures as GiB); NVIDIA's GB
# are taken as 10^9, which is less than what its drivers show.
DEVICES = {
    device.name: device
    for device in (
        # docs.cloud.google.com/tpu/docs/v4. The number of v4-8 and v5p-8 counts TensorCores, of which a chip has two.
        Device("v4", "tpu", 32 * GIB, 1200 * GB, 275 * TERA, counted=2),
        Device("v5e", "tpu", 16 * GIB, 819 * GB, 197 * TERA),  # docs.cloud.google.com/tpu/docs/v5e
        Device("v5p", "tpu", 95 * GIB, 2765 * GB, 459 * TERA, counted=2),  # docs.cloud.google.com/tpu/docs/v5p
        Device("v6e", "tpu", 32 * GIB, 1638 * GB, 918 * TERA),  # docs.cloud.google.com/tpu/docs/v6e
        # NVIDIA's data sheets. A T4 has no bfloat16: the rate is float16's.
        Device("t4", "gpu", 16 * GB, 320 * GB, 65 * TERA),
        Device("l4", "gpu", 24 * GB, 300 * GB, 121 * TERA),
        Device("a10", "gpu", 24 * GB, 600 * GB, 125 * TERA),
        Device("l40s", "gpu", 48 * GB, 864 * GB, 362 * TERA),
        Device("a100-40", "gpu", 40 * GB, 1555 * GB, 312 * TERA),
        Device("a100-80", "gpu", 80 * GB, 2039 * GB, 312 * TERA),  # SXM
        Device("h100", "gpu", 80 * GB, 3350 * GB, 989 * TERA),  # SXM
        Device("h200", "gpu", 141 * GB, 4800 * GB, 989 * TERA),  # SXM
    )
}


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
