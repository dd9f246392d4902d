"""What other libraries' exceptions become in our sentences."""

import pytest

from domino_jax.errors import DominoError, first_line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("It broke.\nAnd here is why.", "It broke"),
        ("For 'x':\n    TypeError: expected int\n", "For 'x': TypeError: expected int"),
        ("\n\nOnly:\n", "Only"),
        ("", "ValueError"),
    ],
)
def test_the_first_line_has_the_reason(text, says):
    assert first_line(ValueError(text)) == says


def test_of_the_systems_errors_the_reason_stays():
    assert first_line(FileNotFoundError(2, "No such file or directory", "x")) == "no such file or directory"
    assert first_line(OSError(28, "No space left on device")) == "no space left on device"
    assert first_line(OSError("as it is")) == "as it is"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("\x1b[31mred\x1b[0m\x07", r"\x1b[31mred\x1b[0m\x07"),
        ("tab\there\r", r"tab\there\r"),
        ("\ud800\u2028\x85", r"\ud800\u2028\x85"),
        ("Zoë: 東京 − 🙂", "Zoë: 東京 − 🙂"),
    ],
)
def test_names_of_others_neither_break_the_line_nor_steer_the_terminal(given, shown):
    assert str(DominoError(f"{given} is not a folder.")) == f"{shown} is not a folder."
