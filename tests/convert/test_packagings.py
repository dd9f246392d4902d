"""Block drafters in the forms of DeepSpec, SpecForge, Model-Optimizer and speculators: told apart, read, written."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import factory
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from factory import BYTE_DRAFT, make_draft, make_target
from gguf.constants import GGMLQuantizationType
from gguf_files import F32, write_gguf
from safetensors.numpy import load_file, save_file

from convert import check, folders, hf
from convert.__main__ import main
from convert.check import check_folder
from convert.draft_configs import read_draft_config, with_overrides
from convert.packagings import Packaging, packaged, packaging_of, renamed
from convert.registry import DRAFTERS, TABLE, locate
from domino_jax.config import DraftConfig, Yarn
from domino_jax.drafters.convolution import Convolution
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.drafters.heads.markov import MarkovHead
from domino_jax.drafters.heads.selector import SelectorHead
from domino_jax.errors import DominoError
from domino_jax.weights import flatten

FILE = Path("models/some/config.json")
DOMINO = factory.draft_config()
PLAIN = factory.draft_config(head=None, shift_label=False)
MARKOV = factory.draft_config(head=MarkovHead(7, enable_confidence_head=True))
DFLASH2 = dataclasses.replace(
    PLAIN, head=SelectorHead(7, 6), convolution=Convolution(2, 4), windows=(9, 9), sliding_window_non_causal=True
)
CONFIGS: dict[str, DraftConfig] = {
    "Domino": DOMINO,
    "DFlash": PLAIN,
    "DeepSpec's DFlash": factory.draft_config(head=None),
    "DSpark": MARKOV,
    "gated": factory.draft_config(head=MarkovHead(7, "gated")),
    "rnn, fill-in": factory.draft_config(head=MarkovHead(7, "rnn", True, False), shift_label=False),
    "windows": dataclasses.replace(MARKOV, windows=(7, None)),
    "YaRN": dataclasses.replace(MARKOV, rope_scaling=Yarn(4.0, 128, 1.1)),
    "JetSpec": dataclasses.replace(PLAIN, causal=True),
    "DFlash 2": DFLASH2,
    "DFlash 2, no selector": dataclasses.replace(DFLASH2, head=None),
    "DFlash 2, selector alone": dataclasses.replace(DFLASH2, convolution=None, windows=(None, None)),
    "reduced": dataclasses.replace(PLAIN, draft_vocab_size=30),
    "reduced Domino": dataclasses.replace(DOMINO, draft_vocab_size=30),
    "reduced DSpark": dataclasses.replace(MARKOV, draft_vocab_size=30),
    "windows both ways": dataclasses.replace(MARKOV, windows=(7, None), sliding_window_non_causal=True),
    "causal Domino": dataclasses.replace(DOMINO, causal=True, windows=(None, 4)),
    "calibrated": dataclasses.replace(MARKOV, confidence_temperatures=(0.5, 1.0, 1.25, 3.0, 8.0), tree_candidates=64),
}
FORMS: tuple[Packaging, ...] = ("specforge", "deepspec", "speculators")
NONE = {("deepspec", "Domino"): "no Domino drafters", ("deepspec", "causal Domino"): "no Domino drafters"}
NONE |= {("deepspec", name): "no DFlash 2 drafters" for name in CONFIGS if name.startswith("DFlash 2")}
NONE |= {("speculators", name): "both convolutions and selector" for name in CONFIGS if name.startswith("DFlash 2, ")}
NONE |= {(form, name): "no reduced" for form in FORMS[:2] for name in CONFIGS if name.startswith("reduced")}
NONE |= {("speculators", name): "no causal blocks" for name in ("JetSpec", "causal Domino")}


def refused(*words: str) -> Any:
    return pytest.raises(DominoError, match=".*".join(re.escape(word) for word in words))


def parse(raw: dict[str, Any]) -> Any:
    return read_draft_config(json.loads(json.dumps(raw)), file=FILE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_drafter_is_the_same_in_every_form_that_has_it(name, form):
    config = CONFIGS[name]
    if (form, name) in NONE:
        with refused(NONE[form, name]):
            packaged(config, form)
        return
    assert parse(packaged(config, form)) == (config, [])


@pytest.mark.parametrize(
    "name",
    [
        "Domino",
        "DSpark",
        "DFlash 2",
        "reduced DSpark",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("rnn, fill-in", "DeepSpec's DFlash", "reduced", "reduced Domino")
        ),
    ],
)
def test_a_folder_keeps_its_bits_from_form_to_form(tmp_path, name):
    """Through every form that has it, with copies of the target's matrices, and back."""
    changes = {
        field: getattr(CONFIGS[name], field) for field in ("head", "shift_label", "convolution", "draft_vocab_size")
    }
    make_target(tmp_path / "target")
    config = make_draft(tmp_path / "ours", **changes)
    if config.draft_vocab_size:
        module = factory.random_weights(config, 5)
        hf.save_hf(tmp_path / "ours", module, config, packaged(config, "speculators"))
    before, at = load_file(tmp_path / "ours" / hf.SINGLE), tmp_path / "ours"
    forms: list[Packaging] = [form for form in (FORMS[2], *FORMS, FORMS[0]) if (form, name) not in NONE]
    if len(forms) == 2:  # no other form has it
        forms.append("speculators")
    for number, form in enumerate(forms):
        folder = tmp_path / f"{number}"
        assert main([str(at), str(folder), "--format", form, "--target", str(tmp_path / "target")]) == 0
        found = load_file(folder / hf.SINGLE)
        extra = {"embed_tokens.weight", "lm_head.weight"} - before.keys() if form != "specforge" else set()
        assert found.keys() == {renamed(config, form)(tensor) for tensor in before} | extra
        for tensor, x in before.items():
            assert found[renamed(config, form)(tensor)].tobytes() == x.tobytes(), (form, tensor)
        assert folders.read_config(folder) == config
        at = folder
    report = check_folder(tmp_path / "0", tmp_path / "target")
    assert not report.problems and dict(report.lines)["packaging"] == "speculators'"


# --- What others write ----------------------------------------------------------------------------------------------

# A DeepSpec file: a copy of the target's config.json with fields of its own (heads.md, 1.1).
LAYERS = {
    name: value for name, value in MARKOV.to_hf().items()
    if name in DraftConfig.__dataclass_fields__ and name not in ("rope_scaling", "rope_theta")
}  # fmt: skip
DEEPSPEC = LAYERS | {
    "architectures": ["Qwen3DSparkModel"], "model_type": "qwen3", "block_size": 5, "mask_token_id": 88,
    "target_layer_ids": [1, 0], "num_target_layers": 3, "tie_word_embeddings": False, "markov_rank": 7,
    "markov_head_type": "vanilla", "enable_confidence_head": True, "confidence_head_with_markov": True,
    "num_anchors": 512, "bos_token_id": 3, "eos_token_id": 4, "_attn_implementation": "flex_attention",
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "dtype": "bfloat16", "layer_types": None,
    "use_cache": True, "max_window_layers": 36, "use_sliding_window": False, "sliding_window": None,
}  # fmt: skip
OURS_AT_TOP = ("mask_token_id", "target_layer_ids", "markov_rank", "markov_head_type")
SPECFORGE = {name: value for name, value in DEEPSPEC.items() if name not in (*OURS_AT_TOP, "enable_confidence_head")}
SPECFORGE |= {
    "architectures": ["DSparkDraftModel"], "auto_map": {"AutoModel": "dspark.DSparkDraftModel"},
    "dflash_config": {"mask_token_id": 88, "target_layer_ids": [1, 0], "projector_type": "dspark", "markov_rank": 7,
                      "markov_head_type": "vanilla", "confidence_head_alpha": 1.0, "attention_mode": "gqa"},
}  # fmt: skip
MODELOPT = SPECFORGE | {
    "architectures": ["DFlashDraftModel"], "auto_map": None,
    "dflash_config": {"mask_token_id": 88, "target_layer_ids": [1, 0], "projector_type": "dspark", "markov_rank": 7,
                      "markov_head_type": "vanilla", "use_confidence_head": True},
}  # fmt: skip
EXPORTED = DEEPSPEC | {"dflash_config": SPECFORGE["dflash_config"], "mask_token_id": None, "target_layer_ids": None}
FILL_IN = dataclasses.replace(MARKOV, shift_label=False)
# z-lab's file for Muse Glimmer, but for its sizes and its target's scales (heads.md, 2.1).
MUSE = LAYERS | {
    "architectures": ["DFlash2DraftModel"], "model_type": "qwen3", "is_causal": False, "num_target_layers": 3,
    "dflash_config": {"block_size": 5, "conv_kernel_size": 2, "conv_group_size": 4, "selector_rank": 7,
                      "selector_top_k": 6, "mask_token_id": 88, "target_layer_ids": [1, 0]},
    "layer_types": ["sliding_attention"] * 2, "sliding_window": 9, "use_sliding_window": True,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "tie_word_embeddings": False,
}  # fmt: skip
for field in ("block_size", "mask_token_id", "target_layer_ids", "shift_label", "windows"):
    MUSE.pop(field, None)


def muse(top: Any = (), **nested: Any) -> dict[str, Any]:
    """The same with other fields; ... takes one away from dflash_config."""
    inside = {name: value for name, value in (MUSE["dflash_config"] | nested).items() if value is not ...}
    return MUSE | dict(top) | {"dflash_config": inside}


FILES: dict[str, tuple[dict[str, Any], DraftConfig, str]] = {
    "DeepSpec's DSpark": (DEEPSPEC, MARKOV, "DeepSpec's"),
    "DeepSpec's DFlash": (
        DEEPSPEC | {"markov_rank": 0, "enable_confidence_head": False}, CONFIGS["DeepSpec's DFlash"], "DeepSpec's"),
    "SpecForge's, as trained": (SPECFORGE, MARKOV, "SpecForge's"),
    "SpecForge's, with its own model_type": (SPECFORGE | {"model_type": "dspark"}, MARKOV, "SpecForge's"),
    "SpecForge's, as exported": (EXPORTED, MARKOV, "SpecForge's"),
    "Model-Optimizer's": (MODELOPT, MARKOV, "Model-Optimizer's"),
    "Model-Optimizer's, as it says": (
        MODELOPT | {"dflash_config": MODELOPT["dflash_config"] | {"shift_label": False}}, FILL_IN, "Model-Optimizer's"),
    "Nemotron's": (DEEPSPEC | {"sample_from_anchor": False, "dspark_bonus_anchor": True}, FILL_IN, "DeepSpec's"),
    "with the bonus's name alone": (DEEPSPEC | {"dspark_bonus_anchor": True}, FILL_IN, "DeepSpec's"),
    "MiniCPM5's": (DEEPSPEC | {"projector_type": "dspark", "draft_vocab_size": 89}, MARKOV, "DeepSpec's"),
    "Avesed's, that says it": (
        DEEPSPEC | {"architectures": ["DFlashDraftModel"], "shift_label": True}, MARKOV, "z-lab's"),
    "z-lab's": (PLAIN.to_hf(), PLAIN, "z-lab's"),
    "JetSpec's": (
        PLAIN.to_hf() | {"dflash_config": PLAIN.to_hf()["dflash_config"] | {"causal_head": True}},
        CONFIGS["JetSpec"], "JetSpec's"),
    "JetSpec's other": (
        PLAIN.to_hf() | {"dflash_config": PLAIN.to_hf()["dflash_config"] | {"causal_head": False}}, PLAIN, "JetSpec's"),
    "vLLM's causal": (PLAIN.to_hf() | {"is_causal": True}, CONFIGS["JetSpec"], "z-lab's"),
    "Domino's": (DOMINO.to_hf(), DOMINO, "SpecForge's"),
    "DFlash 2's": (MUSE, DFLASH2, "z-lab's"),
    "DFlash 2's, by the older name": (muse({"architectures": ["DFlashDraftModel"]}), DFLASH2, "z-lab's"),
    "DFlash 2's, with windows that see back": (
        muse({"is_causal": True}), dataclasses.replace(DFLASH2, sliding_window_non_causal=False), "z-lab's"),
    "DFlash 2's, with the target's neutral scales": (
        muse({"input_embedding_scale": 1}, final_logit_softcapping=None, output_multiplier=1.0), DFLASH2, "z-lab's"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_the_files_of_others_are_told_apart(name):
    raw, config, packaging = FILES[name]
    assert parse(raw) == (config, [])
    assert packaging_of(raw) == packaging


UNDETERMINED = DEEPSPEC | {"architectures": ["DFlashDraftModel"]}  # Hikari07jp's and Avesed's


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (UNDETERMINED, ["neither shift_label nor projector_type", "--hf-overrides"]),
        ({"markov_rank": None}, ["no markov_rank"]),
        ({"markov_rank": "7"}, ['markov_rank "7"']),
        ({"markov_head_type": "gru"}, ['markov_head_type "gru"', '"vanilla" or "gated" or "rnn"']),
        ({"projector_type": "domino"}, ['projector_type "domino" and markov_rank 7', "leave one of them out"]),
        ({"projector_type": "dflash"}, ['projector_type "dflash" and markov_rank 7']),
        ({"projector_type": "domino", "markov_rank": 0}, ["Qwen3DSparkModel", "leave one of them out"]),
        ({"dspark_bonus_anchor": True, "shift_label": True}, ["shift_label true and dspark_bonus_anchor true"]),
        ({"dspark_bonus_anchor": False, "sample_from_anchor": False}, ["sample_from_anchor false", "false"]),
        ({"is_causal": True, "causal_head": False}, ["is_causal true and causal_head false", "one setting"]),
        ({"dspark_block_size": 5}, ["dspark_block_size 5"]),
        ({"architectures": ["DFlash2DraftModel"]}, ["DFlash2DraftModel", 'the head "dspark"', "leave one of them out"]),
        ({"architectures": ["Lfm2DSparkDraftModel"]}, ["for targets of the LFM2 family"]),
        ({"architectures": ["Qwen35DSparkModel"]}, ["Qwen3.5's layers"]),
        ({"architectures": ["Gemma4DSparkModel"]}, ["Gemma 4's layers"]),
        ({"model_type": "gemma4_text"}, ['model_type "gemma4_text"']),
        ({"rope_is_neox_style": False}, ["rope_is_neox_style false"]),
        ({"draft_vocab_size": 32}, ["draft_vocab_size 32"]),
    ],
    ids=str,
)
def test_what_is_not_determined_or_contradicts_itself_is_refused(change, words):
    with refused(str(FILE), *words):
        parse(DEEPSPEC | change)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (muse(conv_kernel_size=..., conv_group_size=..., selector_rank=..., selector_top_k=...), ["neither conv"]),
        (muse(conv_group_size=...), ["conv_kernel_size 2 and conv_group_size 0"]),
        (muse(selector_rank=...), ["no selector_rank"]),
        (muse(selector_top_k=...), ["no selector_top_k"]),
        (muse(conv_group_size=5), ["conv_group_size 5 does not divide"]),
        (muse({"markov_rank": 7}), ["selector_rank", "markov_rank"]),
        (muse(projector_type="domino"), ["selector_rank", '"domino"']),
        (muse(projector_type="dflash"), ["selector_rank", '"dflash"']),
        (muse(selector_rank=..., selector_top_k=..., projector_type="domino"), ["conv_kernel_size", '"domino"']),
        (muse({"selector_rank": 9}), ["selector_rank 7", "selector_rank 9"]),
        (muse(final_logit_softcapping=20.0), ["final_logit_softcapping 20.0"]),
        (muse(output_multiplier=0.196), ["output_multiplier 0.196"]),
        (muse({"input_embedding_scale": 2.0}), ["input_embedding_scale 2.0"]),
    ],
    ids=str,
)
def test_a_dflash2_file_that_is_not_whole_or_asks_for_more_is_refused(raw, words):
    with refused(str(FILE), *words):
        parse(raw)


@pytest.mark.parametrize(("head", "convolution"), [(SelectorHead(7, 6), None), (None, Convolution(2, 4))])
def test_tensors_of_dflash2_that_the_config_does_not_have_are_named(tmp_path, head, convolution):
    make_draft(tmp_path / "draft", head=head, convolution=convolution)
    for ours in (BYTE_DRAFT, dataclasses.replace(BYTE_DRAFT, head=None)):
        with refused("is of a DFlash 2 drafter", "selector_rank"):
            folders.load_weights(tmp_path / "draft", ours)


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("name", ["undetermined", "DeepSpec's DSpark", "Model-Optimizer's, as it says", "Nemotron's"])
def test_an_override_takes_the_place_of_every_name_at_every_level(name, anchored):
    raw = UNDETERMINED if name == "undetermined" else FILES[name][0]
    assert parse(with_overrides(raw, {"shift_label": anchored})) == (MARKOV if anchored else FILL_IN, [])


def test_a_confidence_head_without_a_markov_head_is_set_aside():
    config, (warning,) = parse(DEEPSPEC | {"markov_rank": 0, "confidence_head_with_markov": False})
    assert config == CONFIGS["DeepSpec's DFlash"] and "confidence head" in warning


@pytest.fixture
def dspark(tmp_path) -> Path:
    make_draft(tmp_path / "draft", head=MarkovHead(7, "gated", enable_confidence_head=True))
    return tmp_path / "draft"


def rewrite(folder: Path, change: Any) -> None:
    save_file(change(load_file(folder / hf.SINGLE)), folder / hf.SINGLE)


@pytest.mark.parametrize("flat", [True, False])
def test_flat_names_and_nested_ones_are_one_drafter(dspark, flat):
    expected = flatten(folders.load_weights(dspark, folders.read_config(dspark)))

    def named(name: str) -> str:
        flattened = name.removeprefix("markov_head.").replace("confidence_head.proj", "confidence_proj")
        return flattened if flat else f"model.{name}"

    rewrite(dspark, lambda tensors: {named(name): x for name, x in tensors.items()})
    found = flatten(folders.load_weights(dspark, folders.read_config(dspark)))
    assert all(np.array_equal(found[path], x) for path, x in expected.items())


def test_a_confidence_head_that_the_config_does_not_have_and_the_verifiers_tensors_are_left_out(dspark):
    raw = hf.read_json(dspark / "config.json")
    raw["dflash_config"]["enable_confidence_head"] = raw["enable_confidence_head"] = False
    hf.write_json(dspark / "config.json", raw)
    rewrite(dspark, lambda tensors: tensors | {"verifier_norm.weight": np.ones(32, np.float32)})
    assert not check_folder(dspark).problems


@pytest.mark.parametrize(("head", "says"), [(MarkovHead(7), "Domino"), (BYTE_DRAFT.head, "DSpark"), (None, "DSpark")])
def test_tensors_of_another_head_are_named(tmp_path, head, says):
    """Whatever config.json says, the names of the tensors do not lie."""
    others = {"Domino": BYTE_DRAFT.head, "DSpark": MarkovHead(7)}
    make_draft(tmp_path / "draft", head=others[says])
    ours = dataclasses.replace(BYTE_DRAFT, head=head)
    with refused(f"is of a {says} drafter's head", "projector_type"):
        folders.load_weights(tmp_path / "draft", ours)


def test_deepspecs_copies_are_compared_in_a_few_rows(tmp_path):
    target = make_target(tmp_path / "target")
    config = make_draft(tmp_path / "draft", head=MarkovHead(7))
    embed = load_file(tmp_path / "target" / hf.SINGLE)["model.embed_tokens.weight"]
    assert target.tie_word_embeddings
    rewrite(tmp_path / "draft", lambda t: t | {"embed_tokens.weight": embed, "lm_head.weight": embed})
    folders.load_weights(tmp_path / "draft", config, target=tmp_path / "target")
    other = embed.copy()
    other[-1] += 1
    rewrite(tmp_path / "draft", lambda t: t | {"lm_head.weight": other})
    with refused("lm_head.weight is not that of"):
        folders.load_weights(tmp_path / "draft", config, target=tmp_path / "target")


@pytest.mark.parametrize("other", ["the same in blocks", "another"])
def test_copies_of_a_target_in_gguf_are_the_same_up_to_its_blocks(tmp_path, other):
    """A drafter's copies have all bits; the target's file has 8 or 4 of each weight."""
    config, target = factory.TARGET, tmp_path / "target"
    target.mkdir()
    tensors = factory.hf_weights(factory.random_weights(config, 0), config)
    blocks = GGMLQuantizationType.Q4_0
    write_gguf(target / "t.gguf", config, tensors, lambda name: blocks if name.startswith("token_embd") else F32)
    draft = factory.draft_config(config, head=MarkovHead(7))
    hf.save_hf(tmp_path / "draft", factory.random_weights(draft, 1), draft, draft.to_hf())
    copy = tensors["model.embed_tokens.weight"]
    if other == "another":
        copy = np.roll(copy, 1, axis=0)
    rewrite(tmp_path / "draft", lambda t: t | {"embed_tokens.weight": copy})
    if other == "another":
        with refused("embed_tokens.weight is not that of"):
            folders.load_weights(tmp_path / "draft", draft, target=target)
    else:
        folders.load_weights(tmp_path / "draft", draft, target=target)


# --- The command -----------------------------------------------------------------------------------------------------


def test_the_override_makes_a_copy_that_is_determined(tmp_path, capsys):
    config = make_draft(tmp_path / "draft", head=MarkovHead(7), shift_label=False)
    raw: dict[str, Any] = hf.read_json(tmp_path / "draft" / "config.json")
    raw["architectures"] = ["DFlashDraftModel"]
    for name in ("shift_label", "projector_type"):
        del raw["dflash_config"][name]
    hf.write_json(tmp_path / "draft" / "config.json", raw)
    words = [str(tmp_path / "draft"), str(tmp_path / "copy")]
    assert main(words) == 1 and "--hf-overrides" in capsys.readouterr().err
    for bad in ("shift_label", "[]", "{}"):
        assert main([*words, "--hf-overrides", bad]) == 2
    assert main([*words, "--format", "specforge", "--hf-overrides", '{"shift_label": false}']) == 0
    assert folders.read_config(tmp_path / "copy") == config
    assert main([words[1], str(tmp_path / "orbax"), "--hf-overrides", '{"shift_label": true}']) == 0
    assert folders.read_config(tmp_path / "orbax") == dataclasses.replace(config, shift_label=True)


@pytest.mark.parametrize("flag", [["--format", "deepspec"], ["--hf-overrides", '{"shift_label": true}']])
def test_what_is_for_drafters_is_refused_of_targets(tmp_path, capsys, flag):
    make_target(tmp_path / "target")
    assert main([str(tmp_path / "target"), str(tmp_path / "copy"), *flag]) == 1
    assert "block drafter" in capsys.readouterr().err and not (tmp_path / "copy").exists()


def test_a_form_needs_the_targets_depth(tmp_path, capsys):
    make_draft(tmp_path / "draft")
    raw = hf.read_json(tmp_path / "draft" / "config.json")
    del raw["num_target_layers"]
    hf.write_json(tmp_path / "draft" / "config.json", raw)
    assert main([str(tmp_path / "draft"), str(tmp_path / "copy"), "--format", "speculators"]) == 1
    assert "give --target DIR" in capsys.readouterr().err


@pytest.mark.parametrize("shifted", [True, False])
def test_the_check_warns_where_the_other_alignment_knows_better(tmp_path, shifted):
    """The good pair's row of the anchor knows what follows; read as a fill-in drafter it is of no use."""
    pair = factory.good_pair(factory.TARGET, 1, head=None)
    draft = dataclasses.replace(pair.configs.draft, shift_label=shifted)
    hf.save_hf(tmp_path / "target", pair.params.target, pair.configs.target, pair.configs.target.to_hf())
    hf.save_hf(tmp_path / "draft", pair.params.draft, draft, draft.to_hf())
    report = check_folder(tmp_path / "draft", tmp_path / "target")
    assert not report.problems and dict(report.lines)["alignment"].startswith("anchored" if shifted else "fill-in")
    assert any("other alignment" in warning for warning in report.warnings) is not shifted


@pytest.mark.parametrize("prefix", [0, 2])
def test_the_ranks_of_the_heads_choices_are_the_references(prefix):
    """Among all base logits, with the text's own tokens before each proposal."""
    pair = factory.Pair.make(factory.draft_config(head=DominoHead(14, 7, prefix)))
    pair.params.draft.head.proj_out = 6 * pair.params.draft.head.proj_out  # so that it corrects a lot
    target_w, target_cfg, draft_w, draft_cfg = pair.reference()
    config, ids, first = pair.configs.draft, [3, 17, 40, 8, 61, 22, 5, 9, 30, 77, 12, 4], [0, 5]
    text = check._read_text(pair.params.target, pair.configs.target, config, jnp.array([ids]))
    found = check._ranks(pair.params.target, pair.params.draft, pair.configs.target, config, text, jnp.array([first]))
    _, features = reference.target_forward(target_w, target_cfg, ids, config.target_layer_ids)
    embed, lm_head = reference.target_embedding(target_w), reference.target_lm_head(target_w, target_cfg)
    for block, a in zip(np.asarray(found), first, strict=True):
        z = reference.draft_block(draft_w, draft_cfg, embed, features[:a], ids[a], a)
        z = z[reference.proposal_rows(draft_cfg)]
        state = np.zeros(14)
        for j, rank in enumerate(block):
            state = reference.gru_step(draft_w, reference.f64(embed[ids[a + j]]), state)
            base = reference.linear(z[j], lm_head)
            chosen = base + (reference.head_correction(draft_w, z[j], state) if j >= prefix else 0)
            assert rank == (base > base[np.argmax(chosen)]).sum()
    assert (np.asarray(found)[:, :prefix] == 0).all() and (np.asarray(found)[:, prefix:] > 0).any()


def test_the_check_says_what_few_candidates_lose(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "CANDIDATES", (2, 80, 10_000))
    pair = factory.Pair.make(factory.draft_config())
    pair.params.draft.head.proj_out = 6 * pair.params.draft.head.proj_out
    draft, target = pair.configs.draft, pair.configs.target
    hf.save_hf(tmp_path / "target", pair.params.target, target, target.to_hf())
    hf.save_hf(tmp_path / "draft", pair.params.draft, draft, draft.to_hf())
    report = check_folder(tmp_path / "draft", tmp_path / "target")
    said = dict(report.lines)["candidates"]
    assert "the 2 likeliest in" in said and "the 80 likeliest in" in said and "10000" not in said
    assert any("with 2 candidates" in w and "--tree-candidates all" in w for w in report.warnings)


# --- The table of names ---------------------------------------------------------------------------------------------


def test_the_public_drafters_of_qwen3_have_names():
    for size in ("4b", "8b", "14b"):
        assert locate(f"qwen3-{size}", f"qwen3-{size}-dspark")[1] == f"deepseek-ai/dspark_qwen3_{size}_block7"
        assert locate(f"qwen3-{size}", f"qwen3-{size}-dflash-block7")[1] == f"deepseek-ai/dflash_qwen3_{size}_block7"
    assert DRAFTERS["qwen3-8b-jetspec"] == "JetSpec/jetspec-qwen3-8b"
    assert locate("qwen3-30b-a3b")[1] == "JetSpec/jetspec-qwen3-30b-a3b"
    assert locate("qwen3-8b")[1] == TABLE["qwen3-8b"].domino
    with pytest.raises(DominoError, match="is a drafter"):
        locate("qwen3-8b-jetspec")
