"""What a run settles before it reads data and weights: its drafter."""

import dataclasses
from pathlib import Path

import factory
import pytest

from convert import hf
from domino_jax.errors import DominoError
from train.config import DrafterOptions, TrainConfig
from train.run import settle_drafter

TARGET = dataclasses.replace(factory.TARGET, num_hidden_layers=9)


def settled(out: Path, resume: bool = False, **drafter: object) -> tuple[TrainConfig, dict]:
    options = DrafterOptions(layers=2, mask_token_id=3, **drafter)  # type: ignore[arg-type]
    found, draft = settle_drafter(TrainConfig(out=out, resume=resume, drafter=options), TARGET)
    return found, draft.to_hf()


def test_what_is_chosen_by_default_is_saved_with_the_run(tmp_path):
    """A later version may choose otherwise, and a resumed run must not."""
    found, raw = settled(tmp_path, head=False)
    assert (found.drafter.target_layer_ids, found.drafter.shift_label) == ((1, 6), False)
    assert raw["dflash_config"]["target_layer_ids"] == [1, 6]


def test_a_resumed_run_keeps_the_layers_that_its_drafter_reads(tmp_path):
    _, raw = settled(tmp_path, target_layer_ids=(2, 8))
    hf.write_json(tmp_path / "config.json", raw)
    found, again = settled(tmp_path, resume=True)  # its settings do not say which
    assert found.drafter.target_layer_ids == (2, 8) and again == raw


@pytest.mark.parametrize(
    "change", [{"block_size": 9}, {"shift_label": False}, {"head": False}, {"target_layer_ids": (2, 7)}], ids=str
)
def test_a_resumed_run_whose_drafter_would_be_another_is_refused(tmp_path, change):
    hf.write_json(tmp_path / "config.json", settled(tmp_path, target_layer_ids=(2, 8))[1])
    with pytest.raises(DominoError, match=r"config\.json is of another drafter than .*settings\.toml"):
        settled(tmp_path, resume=True, **change)
