"""Devices by name."""

import pytest

from domino_jax.errors import DominoError
from infer.bench.devices import DEVICES, find_devices


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("v5e-1", "v5e", 1),
        ("v6e", "v6e", 1),
        ("v6e-16", "v6e", 16),
        ("v5p-8", "v5p", 4),  # TensorCores
        ("v4-4096", "v4", 2048),
        ("h100", "h100", 1),
        ("a100-80", "a100-80", 1),
        ("a100-40-8", "a100-40", 8),
    ],
)
def test_devices_are_found_by_name_and_number(text, name, count):
    device, found = find_devices(text)
    assert (device.name, found) == (name, count) and device is DEVICES[name]


@pytest.mark.parametrize(
    "text", ["", "v6e-0", "v6e--4", "a100", "h100-", "-4", "v9-4", "h100-1.5", "h100-٣", "v6e-999999"]
)
def test_what_names_no_devices_is_refused_in_one_sentence(text):
    with pytest.raises(DominoError, match=r"^devices are given by name and number, such as .*v5p-8.*h200"):
        find_devices(text)


def test_half_a_chip_is_none():
    with pytest.raises(DominoError, match=r"counts TensorCores, .* v5p-6 is 3 chips"):
        find_devices("v5p-3")
