"""Tensors of other people's files: duplicates, indexes, names with and without a prefix, what a loader leaves out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import BYTE_DRAFT, BYTE_TARGET, make_draft, make_target
from safetensors.numpy import load_file, save_file

from convert import hf
from convert.check import check_folder
from convert.folders import convert_folder
from convert.identity import model_fingerprint
from convert.loading import load_model
from convert.tensors import INDEX, SINGLE, open_tensors
from domino_jax.config import MoeConfig
from domino_jax.errors import DominoError
from domino_jax.weights import flatten

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def target(tmp_path) -> Path:
    """Tied, without its tokenizer."""
    make_target(tmp_path / "target", tokenizer=False, tie_word_embeddings=True)
    return tmp_path / "target"


@pytest.fixture
def draft(tmp_path) -> Path:
    make_draft(tmp_path / "draft")
    return tmp_path / "draft"


def rewrite(folder: Path, change: Any) -> dict[str, np.ndarray]:
    """The tensors of a folder's one file after `change` was called with them."""
    tensors = load_file(folder / SINGLE)
    tensors = change(tensors) or tensors
    save_file(tensors, folder / SINGLE)
    return tensors


def split(folder: Path, parts: int = 3) -> dict[str, str]:
    """Divide a folder's one file into several with an index, and return its weight_map."""
    tensors, placed = load_file(folder / SINGLE), {}
    names = sorted(tensors)
    for part in range(parts):
        file = f"model-{part}.safetensors"
        save_file({name: tensors[name] for name in names[part::parts]}, folder / file)
        placed |= dict.fromkeys(names[part::parts], file)
    (folder / SINGLE).unlink()
    hf.write_json(folder / INDEX, {"weight_map": placed})
    return placed


def same(folder: Path, config: Any, expected: dict[str, Any]) -> bool:
    found = flatten(hf.load_hf(folder, config))
    return found.keys() == expected.keys() and all(np.array_equal(found[path], expected[path]) for path in expected)


def refused_everywhere(folder: Path, config: Any, *words: str) -> None:
    """By loading, converting, checking and the fingerprint, and nothing is left behind."""
    config_of: Any = config
    ways = (
        lambda: hf.load_hf(folder, config_of),
        lambda: convert_folder(folder, folder.with_name("converted")),
        lambda: open_tensors(folder),
        lambda: model_fingerprint(folder),
    )
    for way in ways:
        with pytest.raises(DominoError) as error:
            way()
        assert all(word in str(error.value) for word in words), str(error.value)
    assert not folder.with_name("converted").exists()
    problems = check_folder(folder).problems
    assert problems and all(word in problems[0] for word in words)


# --- One tensor in two places -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.norm.weight", EMBED, "model.layers.1.mlp.down_proj.weight"])
def test_a_tensor_in_two_files_without_an_index_is_refused(target, name):
    split(target)
    (target / INDEX).unlink()
    assert hf.load_hf(target, make_config(target)), "files without an index are read together"
    save_file({name: np.zeros(1, np.float32)}, target / "a-stray-copy.safetensors")
    refused_everywhere(target, make_config(target), name, "a-stray-copy.safetensors", "can't be told which is meant")


def make_config(folder: Path) -> Any:
    return hf.parse_config(hf.read_json(folder / "config.json"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m | {"model.norm.weight": m[EMBED]} if m[EMBED] != m["model.norm.weight"] else m, ("places",)),
        (lambda m: {n: f for n, f in m.items() if n != "model.norm.weight"}, ("does not name model.norm.weight",)),
        (lambda m: m | {"model.other.weight": m[EMBED]}, ("model.other.weight", "has no such tensor")),
    ],
    ids=["in another file", "not named", "named and not there"],
)
def test_an_index_and_files_that_disagree_are_refused(target, change, words):
    placed = change(split(target))
    hf.write_json(target / INDEX, {"weight_map": placed})
    refused_everywhere(target, make_config(target), *words)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {}}, "the weight_map {}"),
        ({"weight_map": ["model-0.safetensors"]}, 'the weight_map ["model-0.safetensors"]'),
        ({"weight_map": {"a": "../target/model-0.safetensors"}}, "expected the name of a .safetensors file beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "expected the name of a .safetensors file beside it"),
        ({"weight_map": {"a": 3}}, "places a in 3"),
        ({"weight_map": {"a": "model-9.safetensors"}}, "names model-9.safetensors, which is not in the folder"),
    ],
)
def test_a_damaged_index_is_named_by_what_is_wrong(target, index, words):
    split(target)
    hf.write_json(target / INDEX, index)
    with pytest.raises(DominoError) as error:
        hf.load_hf(target, make_config(target))
    assert words in str(error.value) and INDEX in str(error.value)


def test_files_that_are_not_read_are_named_by_the_check(target):
    before = load_file(target / SINGLE)
    save_file({"x": np.zeros(1, np.float32)}, target / "adapter.safetensors")
    assert same(target, make_config(target), flatten(hf.load_hf(target, make_config(target)))) and before
    report = check_folder(target)
    assert not report.problems and any("adapter.safetensors" in warning for warning in report.warnings)


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_target_whose_names_lack_their_prefix_is_read(tmp_path, tied, moe):
    more: dict[str, Any] = {"moe": MoeConfig(4, 2, 16, norm_topk_prob=True)} if moe else {}
    config = make_target(tmp_path / "t", tokenizer=False, tie_word_embeddings=tied, **more)
    expected = flatten(hf.load_hf(tmp_path / "t", config))
    rewrite(tmp_path / "t", lambda tensors: {name.removeprefix("model."): x for name, x in tensors.items()})
    assert same(tmp_path / "t", config, expected) and not check_folder(tmp_path / "t").problems


@pytest.mark.parametrize("prefix", ["model.", "model.logit_head.", "logit_head."])
def test_a_drafter_whose_names_have_a_prefix_is_read(draft, prefix):
    expected = flatten(hf.load_hf(draft, BYTE_DRAFT))
    parts = ("prefix_gru", "embed_proj") if "head" in prefix else ("",)

    def named(name: str) -> str:
        return prefix + name if name.startswith(parts) else ("model." if prefix.startswith("model") else "") + name

    rewrite(draft, lambda tensors: {named(name): x for name, x in tensors.items()})
    assert same(draft, BYTE_DRAFT, expected)


@pytest.mark.parametrize("prefix", ["module.", "transformer.", "draft_model."])
def test_names_of_another_model_are_one_problem(target, prefix):
    rewrite(target, lambda tensors: {prefix + name: x for name, x in tensors.items()})
    (problem,) = check_folder(target).problems
    assert f"{prefix}model." in problem and "expected names like" in problem


def test_one_tensor_by_two_names_is_refused(draft):
    rewrite(draft, lambda tensors: tensors | {"model.fc.weight": tensors["fc.weight"]})
    with pytest.raises(DominoError, match=r"fc\.weight and model\.fc\.weight are one tensor"):
        hf.load_hf(draft, BYTE_DRAFT)


# --- What is left out -------------------------------------------------------------------------------------------------


def nudged(matrix: np.ndarray) -> np.ndarray:
    """The same but for one value in its last row."""
    other = matrix.copy()
    other[-1, -1] += 1
    return other


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_tied_head_that_is_the_embedding_is_left_out(target, dtype):
    rewrite(target, lambda t: {n: x.astype(dtype) for n, x in t.items()} | {HEAD: t[EMBED].astype(dtype)})
    assert hf.load_hf(target, make_config(target)).lm_head is None
    assert not check_folder(target).problems


@pytest.mark.parametrize(
    "other", [nudged, lambda x: x[:-1], lambda x: x[:, :-1], lambda x: x * 0], ids=["value", "rows", "width", "zeros"]
)
def test_a_tied_head_that_differs_is_refused(target, other):
    rewrite(target, lambda tensors: tensors | {HEAD: np.ascontiguousarray(other(tensors[EMBED]))})
    for way in (lambda: hf.load_hf(target, make_config(target)), lambda: convert_folder(target, target / "../new")):
        with pytest.raises(DominoError, match=r"lm_head\.weight is not its embed_tokens\.weight, and tie_word"):
            way()
    assert any("lm_head.weight is not its" in problem for problem in check_folder(target).problems)
    assert not (target.parent / "new").exists()


@pytest.mark.parametrize("name", ["embed_tokens.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_a_drafters_copies_of_its_targets_tensors_are_compared_with_them(tmp_path, draft, target, name):
    embedding = load_file(target / SINGLE)[EMBED]
    rewrite(draft, lambda tensors: tensors | {name: embedding})
    assert load_model(target, draft, "float32").params.draft is not None
    assert not check_folder(draft, target).problems
    convert_folder(draft, tmp_path / "orbax", target=target)
    with pytest.raises(DominoError, match=f"{name} is a copy of the target's, and can't be compared"):
        convert_folder(draft, tmp_path / "blind")
    rewrite(draft, lambda tensors: tensors | {name: nudged(embedding)})
    with pytest.raises(DominoError, match=f"{name} is not that of .*target"):
        load_model(target, draft, "float32")
    assert any(f"{name} is not that of" in problem for problem in check_folder(draft, target).problems)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
def test_stored_frequencies_of_rope_are_compared_and_left_out(target, name):
    width = BYTE_TARGET.head_dim
    inverse = (1.0 / BYTE_TARGET.rope_theta ** (np.arange(0, width, 2) / width)).astype(np.float32)
    rewrite(target, lambda tensors: tensors | {name: inverse})
    assert hf.load_hf(target, make_config(target)) is not None
    for wrong in (inverse * 1.01, inverse[:-1]):
        rewrite(target, lambda tensors, wrong=wrong: tensors | {name: wrong})
        with pytest.raises(DominoError, match="inv_freq is not the frequencies"):
            hf.load_hf(target, make_config(target))


def test_the_check_names_a_dtype_that_is_not_read(target):
    """float8's values are not asked for: NumPy does not know them."""
    file = target / SINGLE
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name in ("model.norm.weight", "model.layers.0.mlp.down_proj.weight"):
        entry = header[name]
        begin, end = entry["data_offsets"]
        entry["dtype"], entry["shape"] = "F8_E4M3", [end - begin]
    new = json.dumps(header).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size :])
    problems = check_folder(target).problems
    assert any("holds F8_E4M3, expected F32, F16 or BF16" in problem for problem in problems)
    assert not any("numpy" in problem for problem in problems)
