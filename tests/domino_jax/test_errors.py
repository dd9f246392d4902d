"""What other libraries' exceptions become in our sentences."""

import pytest

from domino_jax.errors import first_line


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
