"""Drafters in the form of vLLM's speculators library, as far as they are what is drafted with here."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import factory
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import folders, hf
from convert.check import check_folder
from convert.draft_configs import export_warnings, is_drafter, least_depth, read_draft_config
from convert.packagings import packaged
from domino_jax.config import DraftConfig
from domino_jax.drafters.convolution import Convolution
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.drafters.heads.markov import MarkovHead
from domino_jax.drafters.heads.selector import SelectorHead
from domino_jax.errors import DominoError
from domino_jax.weights import flatten

FILE = Path("models/some/config.json")
DOMINO = factory.draft_config()
PLAIN = factory.draft_config(head=None, shift_label=False)
OF_LAYERS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "hidden_act"),
    *("attention_bias", "layer_types", "model_type"),
]


def theirs(config: DraftConfig, **changes: Any) -> dict[str, Any]:
    """The file that the library would write for a drafter; ... takes a field away."""
    ours = config.to_hf()
    raw: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "block_size": config.block_size,
        "draft_vocab_size": config.vocab_size,
        "dtype": "bfloat16",
        "mask_token_id": config.mask_token_id,
        "max_anchors": 3072,
        "sample_from_anchor": config.shift_label,
        "sliding_window_non_causal": False,
        "speculators_config": proposing(config.num_proposals),
        "speculators_model_type": "domino" if config.head else "dflash",
        "speculators_version": "0.5.0.dev163",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": {name: ours[name] for name in OF_LAYERS},
        "transformers_version": "5.5.3",
    }
    if isinstance(config.head, DominoHead):
        raw |= {"gru_hidden_dim": config.head.gru_hidden_dim, "logits_correction_emb_dim": config.head.emb_dim}
        raw |= {"pure_draft_prefix_len": config.head.pure_draft_prefix_len}
        raw |= {"lambda_base_start": 1.0, "lambda_base_decay_ratio": 0.5}
    return {name: value for name, value in (raw | changes).items() if value is not ...}


def proposing(count: int) -> dict[str, Any]:
    method = {"proposal_type": "greedy", "speculative_tokens": count, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "algorithm": "dflash",
        "default_proposal_method": "greedy",
        "proposal_methods": [method],
        "verifier": {"name_or_path": "Qwen/Qwen3-8B", "architectures": ["Qwen3ForCausalLM"]},
    }


def refused(*words: str) -> Any:
    return pytest.raises(DominoError, match=".*".join(re.escape(word) for word in (str(FILE), *words)))


@pytest.mark.parametrize("config", [DOMINO, PLAIN, dataclasses.replace(DOMINO, windows=(7, None))], ids=str)
def test_a_drafter_is_read_as_the_same_in_the_other_form(config):
    raw = theirs(config)
    if any(config.windows):
        raw["transformer_layer_config"] |= {"sliding_window": 7, "use_sliding_window": True}
    assert is_drafter(raw) and least_depth(raw) == max(config.target_layer_ids) + 1
    assert read_draft_config(raw, config.num_target_layers, FILE) == (config, [])
    assert export_warnings(raw, file=FILE) == []  # the target's depth is not known


def test_what_is_left_out_has_the_librarys_defaults():
    config = factory.draft_config(
        hidden_size=4096, vocab_size=151936, num_attention_heads=32, head_dim=128, block_size=8, rms_norm_eps=1e-6,
        head=DominoHead(1024, 256, 1),
    )  # fmt: skip
    names = ("block_size", "gru_hidden_dim", "logits_correction_emb_dim", "pure_draft_prefix_len")
    raw = theirs(config, **dict.fromkeys(names, ...))
    for name in ("hidden_size", "vocab_size", "num_attention_heads", "head_dim", "rms_norm_eps", "hidden_act"):
        del raw["transformer_layer_config"][name]
    assert read_draft_config(raw, 3, FILE) == (config, [])


@pytest.mark.parametrize("config", [DOMINO, PLAIN], ids=["domino", "dflash"])
@pytest.mark.parametrize(
    ("stated", "count", "shifted"),  # None for the library's default, with a warning
    [
        (True, 5, True),
        (False, 4, False),
        (..., 5, True),
        (..., 4, False),
        (..., ..., None),
        (..., 2, None),
        (True, 4, True),
    ],
)
def test_which_rows_propose_is_what_the_file_says_or_how_many_tokens_it_proposes(config, stated, count, shifted):
    raw = theirs(config, sample_from_anchor=stated, speculators_config=... if count is ... else proposing(count))
    found, warnings = read_draft_config(raw, 3, FILE)
    assert found.shift_label is ((config is DOMINO) if shifted is None else shifted)
    assert len(warnings) == (shifted is None) and all("sample_from_anchor" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speculators_model_type": "eagle3"}, 'speculators_model_type "eagle3"'),
        ({"speculators_model_type": "dflash2"}, "the anchor's own row proposes"),
        ({"speculators_model_type": "peagle"}, 'speculators_model_type "peagle"'),
        ({"speculators_model_type": "jetspec"}, 'speculators_model_type "jetspec"'),
        ({"speculators_model_type": ...}, "speculators_model_type null"),
        ({"aux_hidden_state_layer_ids": ...}, "no aux_hidden_state_layer_ids"),
        ({"aux_hidden_state_layer_ids": [0, 1]}, "aux_hidden_state_layer_ids [0, 1]"),
        ({"aux_hidden_state_layer_ids": [1, 4]}, "must name layers 0 to 2"),
        ({"draft_vocab_size": 90}, "draft_vocab_size 90 must be from 1 to vocab_size, 89"),
        ({"draft_vocab_size": ...}, "draft_vocab_size 32000 must be from 1 to vocab_size, 89"),
        ({"draft_vocab_size": 0}, "draft_vocab_size 0"),
        (
            {"speculators_model_type": "dflash2", "sample_from_anchor": ..., "draft_vocab_size": 32},
            '"dflash2" drafters have the whole vocabulary',
        ),
        ({"sample_from_anchor": False, "speculators_config": proposing(5)}, "speculative_tokens 5"),
        ({"sliding_window_non_causal": "no"}, 'sliding_window_non_causal "no"'),
        ({"target_hidden_size": 64}, "target_hidden_size 64"),
        ({"mask_token_id": ...}, "no mask_token_id"),
        ({"block_size": "5"}, 'block_size "5"'),
        ({"transformer_layer_config": None}, "no transformer_layer_config"),
        ({"dflash_config": {}}, "of two forms"),
        ({"final_logit_softcapping": 20.0}, "final_logit_softcapping 20.0"),
    ],
    ids=str,
)
def test_what_is_not_drafted_with_here_is_refused(changes, words):
    with refused(words):
        read_draft_config(theirs(DOMINO, **changes), 3, FILE)


@pytest.mark.parametrize("change", [{"model_type": "llama"}, {"rope_theta": None}, {"attention_bias": 1}], ids=str)
def test_layers_of_another_kind_are_refused(change):
    raw = theirs(PLAIN)
    raw["transformer_layer_config"] |= change
    with refused(next(iter(change))):
        read_draft_config(raw, 3, FILE)


def test_a_whole_folder_is_read_and_converted(tmp_path):
    """The head's tensors are nested under another name there."""
    (folder := tmp_path / "theirs").mkdir()
    module = factory.random_weights(DOMINO, 3)
    tensors = factory.hf_weights(module, DOMINO)
    head = ("prefix_gru.", "embed_proj.")
    save_file(
        {f"logits_correction.{name}" if name.startswith(head) else name: x for name, x in tensors.items()},
        folder / hf.SINGLE,
    )
    hf.write_json(folder / "config.json", theirs(DOMINO))
    folders.convert_folder(folder, tmp_path / "orbax")
    folders.convert_folder(tmp_path / "orbax", tmp_path / "back")
    for name in ("theirs", "orbax", "back"):
        config = folders.read_config(tmp_path / name, 3)
        assert config == DOMINO
        read = flatten(folders.load_weights(tmp_path / name, config))
        assert all(np.array_equal(read[path], x) for path, x in flatten(module).items())
        report = check_folder(tmp_path / name)
        assert not report.problems and not report.warnings


def test_a_dspark_drafter_has_the_librarys_defaults():
    config = dataclasses.replace(DOMINO, head=MarkovHead(256, "vanilla", True, True))
    raw = theirs(config, speculators_model_type="dspark")
    assert read_draft_config(raw, 3, FILE) == (config, [])
    raw |= {"markov_rank": 5, "markov_head_type": "rnn", "enable_confidence_head": False}
    assert read_draft_config(raw, 3, FILE)[0].head == MarkovHead(5, "rnn")
    del raw["sample_from_anchor"], raw["speculators_config"]
    found, (warning,) = read_draft_config(raw, 3, FILE)
    assert found.shift_label and "sample_from_anchor" in warning
    assert not read_draft_config(raw | {"speculators_config": proposing(4)}, 3, FILE)[0].shift_label  # as GLM-5.2's


REDUCED = factory.draft_config(head=MarkovHead(7, "rnn", enable_confidence_head=True), draft_vocab_size=30)


@pytest.fixture
def reduced(tmp_path) -> Path:
    """A folder of the library's, whose drafter proposes 30 of 89 tokens."""
    folder, module = tmp_path / "reduced", factory.random_weights(REDUCED, 3)
    hf.save_hf(folder, module, REDUCED, packaged(REDUCED, "speculators"))
    return folder


def test_a_reduced_vocabulary_is_read_and_comes_back_bit_by_bit(reduced, tmp_path):
    """heads.md 5.3: d2t are offsets in 64 bits, t2d says which tokens there are; W1 has all tokens, W2 the drafts'."""
    before = load_file(reduced / hf.SINGLE)
    assert len(before) == len(factory.hf_weights(factory.random_weights(REDUCED, 3), REDUCED)) + 1
    ids = np.arange(30) + before["d2t"]
    assert before["d2t"].dtype == np.int64 and before["t2d"].dtype == bool and before["t2d"].shape == (89,)
    assert before["t2d"].sum() == 30 and before["t2d"][ids].all()
    assert before["lm_head.weight"].shape == (30, 32)
    assert before["markov_head.markov_w1.weight"].shape == (89, 7)
    assert before["markov_head.markov_w2.weight"].shape == (30, 7)
    assert read_draft_config(hf.read_json(reduced / "config.json"), file=FILE) == (REDUCED, [])
    folders.convert_folder(reduced, tmp_path / "orbax")
    folders.convert_folder(tmp_path / "orbax", tmp_path / "back")
    after = load_file(tmp_path / "back" / hf.SINGLE)
    assert after.keys() == before.keys()
    assert all(after[name].tobytes() == x.tobytes() and after[name].dtype == x.dtype for name, x in before.items())
    folders.convert_folder(reduced, tmp_path / "narrow", dtype=jnp.bfloat16, form="speculators")
    narrow = load_file(tmp_path / "narrow" / hf.SINGLE)
    assert narrow["d2t"].tobytes() == before["d2t"].tobytes() and narrow["fc.weight"].dtype == jnp.bfloat16
    for folder in (reduced, tmp_path / "orbax", tmp_path / "narrow"):
        assert folders.read_config(folder) == REDUCED
        weights = folders.load_weights(folder, REDUCED, jnp.bfloat16)
        assert np.array_equal(weights.d2t, before["d2t"]) and weights.lm_head.dtype == jnp.bfloat16
        report = check_folder(folder)
        assert not report.problems and not report.warnings
    assert "of which it proposes 30" in dict(report.lines)["what"]


def shifted(d2t: np.ndarray, place: int, by: int) -> np.ndarray:
    return d2t + by * (np.arange(len(d2t)) == place)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("d2t"), ["missing d2t"]),
        (lambda t: t.pop("lm_head.weight"), ["missing lm_head.weight"]),
        (lambda t: t.update(d2t=shifted(t["d2t"], 4, 1000)), ["d2t names token", "the target's vocabulary of 89"]),
        (lambda t: t.update(d2t=shifted(t["d2t"], 4, -1000)), ["d2t names token -", "outside"]),
        (lambda t: t.update(d2t=t["d2t"][0] - np.arange(30)), ["d2t names 29 tokens twice"]),
        (lambda t: t.update(d2t=t["d2t"].astype(np.float32)), ["d2t holds F32, expected I64"]),
        (lambda t: t.update(d2t=t["d2t"][:20]), ["d2t has shape [20], expected [30]"]),
        (lambda t: t.update(t2d=~t["t2d"]), ["t2d does not name the tokens that d2t does"]),
        (lambda t: t.update(t2d=t["t2d"][:50]), ["t2d does not name", "BOOL of [89]"]),
        (lambda t: t.update(t2d=t["t2d"].astype(np.int64)), ["t2d does not name"]),
        (lambda t: t.update({"lm_head.weight": np.zeros((89, 32), np.float32)}), ["lm_head.weight has shape [89, 32]"]),
        (lambda t: t.update({"markov_head.markov_w2.weight": np.zeros((89, 7), np.float32)}), ["markov_w2", "[30, 7]"]),
    ],
)  # fmt: skip
def test_tables_of_a_reduced_vocabulary_that_make_no_sense_are_refused(reduced, change, words):
    tensors = load_file(reduced / hf.SINGLE)
    change(tensors)
    save_file(tensors, reduced / hf.SINGLE)
    with pytest.raises(DominoError, match=".*".join(map(re.escape, words))):
        folders.load_weights(reduced, REDUCED)
    assert check_folder(reduced).problems


def test_without_its_second_table_a_reduced_vocabulary_is_whole(reduced):
    tensors = load_file(reduced / hf.SINGLE)
    del tensors["t2d"]
    save_file(tensors, reduced / hf.SINGLE)
    assert folders.load_weights(reduced, REDUCED).d2t.shape == (30,)


def test_a_dflash2_drafter_has_the_librarys_defaults():
    config = dataclasses.replace(PLAIN, head=SelectorHead(256, 16), convolution=Convolution(2, 16))
    raw = theirs(config, speculators_model_type="dflash2", sample_from_anchor=...)
    assert read_draft_config(raw, 3, FILE) == (config, [])
    assert read_draft_config(raw | {"speculators_config": None}, 3, FILE) == (config, [])
    raw |= {"conv_kernel_size": 3, "conv_group_size": 8, "selector_rank": 5, "selector_top_k": 4}
    raw |= {"sliding_window_non_causal": True}
    raw["transformer_layer_config"] |= {"layer_types": ["sliding_attention"] * 2, "sliding_window": 7}
    expected = dataclasses.replace(config, head=SelectorHead(5, 4), convolution=Convolution(3, 8), windows=(7, 7))
    expected = dataclasses.replace(expected, sliding_window_non_causal=True)
    assert read_draft_config(raw, 3, FILE) == (expected, [])


def test_an_unknown_field_is_named():
    raw = theirs(PLAIN, new_field=1)
    raw["transformer_layer_config"]["other_field"] = 2
    _, (warning,) = read_draft_config(raw, 3, FILE)
    assert "new_field" in warning and "other_field" in warning
