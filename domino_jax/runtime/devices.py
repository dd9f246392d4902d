"""This process's devices; and accelerators by name: what one of each has and gives, as its maker states it.

A stated rate is a peak; what a program reaches is less. A device is what JAX counts as one: a chip of a TPU, one GPU.
"""

from typing import Any, Literal, NamedTuple

GIB, GB, TERA = 2.0**30, 1e9, 1e12


class Device(NamedTuple):
    """One accelerator."""

    name: str
    platform: Literal["tpu", "gpu"]
    memory: float  # bytes
    bandwidth: float  # bytes of that memory a second
    flops: float  # a second, of products in bfloat16 without sparsity
    counted: int = 1  # what the number of a name such as v5p-8 counts, of each device
    gigahertz: float = 0.0  # of a TPU's cores, in whose cycles its compiler estimates


# Google's pages state GB and mean GiB (docs.cloud.google.com/tpu/docs/tpu7x has the same figures as GiB); NVIDIA's GB
# are taken as 10^9, which is less than what its drivers show. A TPU's clock is what its rate comes to with the matrix
# units that it has: four of 256 x 256 in a v6e, four of 128 x 128 in each core of the others.
DEVICES = {
    device.name: device
    for device in (
        # docs.cloud.google.com/tpu/docs/v4. The number of v4-8 and v5p-8 counts TensorCores, of which a chip has two.
        Device("v4", "tpu", 32 * GIB, 1200 * GB, 275 * TERA, counted=2, gigahertz=1.05),
        Device("v5e", "tpu", 16 * GIB, 819 * GB, 197 * TERA, gigahertz=1.5),  # docs.cloud.google.com/tpu/docs/v5e
        # docs.cloud.google.com/tpu/docs/v5p
        Device("v5p", "tpu", 95 * GIB, 2765 * GB, 459 * TERA, counted=2, gigahertz=1.75),
        Device("v6e", "tpu", 32 * GIB, 1638 * GB, 918 * TERA, gigahertz=1.75),  # docs.cloud.google.com/tpu/docs/v6e
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
# What JAX calls them (`jax.Device.device_kind`), where that is known.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def own_devices() -> list[Any]:
    """The devices that this process's own programs run on, which need not be those that it compiles for.

    Whoever decides what is to run asks once, and tells the rest by an argument `device`, `devices` or `platform`.
    """
    import jax  # what makers state is read without it

    return jax.devices()


def device_of_kind(kind: str) -> Device | None:
    """The device that JAX calls so; None where that is not known."""
    return DEVICES.get(KINDS.get(kind, ""))
