"""generation_config.json: what it recommends, where it is used, and what of it is refused."""

import json

import pytest

from convert.generation import recommended_sampling
from convert.options import SamplingOptions
from domino_jax.errors import DominoError
from domino_jax.sampling import SamplingParams

QWEN = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2], "pad_token_id": 3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (json.dumps(QWEN), {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
        (json.dumps({"do_sample": False, "temperature": 0.6}), {"temperature": 0.0}),
        (json.dumps({"temperature": None, "top_k": 5.0}), {"top_k": 5}),
        ("{}", {}),
        (None, {}),
    ],
)
def test_what_a_folder_recommends(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text)
    assert recommended_sampling(tmp_path) == expected


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "{",
        '{"temperature": "hot"}',
        '{"top_p": true}',
        '{"top_k": -1}',
        '{"repetition_penalty": 0}',
        '{"repetition_penalty": 1e-39}',
    ],
)
def test_what_can_not_be_read_is_refused(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(DominoError, match=r"generation_config\.json"):
        recommended_sampling(tmp_path)


def test_any_option_of_the_command_line_sets_it_aside():
    recommended = {"temperature": 0.6, "top_k": 20}
    assert SamplingOptions().or_else(recommended).params() == SamplingParams(0.6, 20)
    assert SamplingOptions(seed=3).or_else(recommended).params() == SamplingParams(0.6, 20, seed=3)
    off = (
        SamplingOptions(temperature=0.0),
        SamplingOptions(top_k=0),
        SamplingOptions(top_p=1.0),
        SamplingOptions(min_p=0.0),
    )
    for given in off:
        assert given.or_else(recommended).params() == SamplingParams()
