"""Hugging Face -> Orbax -> Hugging Face, and the conversion's command line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import hf, orbax
from convert.__main__ import main
from convert.folders import convert_folder, load_weights
from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.runtime.files import lock_file, lock_folder
from domino_jax.weights import flatten, init_weights

TARGET = TargetConfig(31, 16, 3, 4, 2, 8, 24, 1e-6, 1e6, 64, True)
DRAFT = DraftConfig(31, 16, 2, 4, 2, 8, 24, 1e-6, 1e6, 64, 4, 30, (0, 2), 3, True, DominoHead(8, 6, 1))
MODELS = {
    "tied target": TARGET,
    "untied target": TargetConfig(31, 16, 3, 4, 2, 8, 24, 1e-6, 1e6, 64, False),
    "domino": DRAFT,
    "dflash": DraftConfig(31, 16, 1, 4, 2, 8, 24, 1e-6, 1e6, 64, 4, 30, (1,), 3),
}


def write(folder, config, dtype=jnp.float32, **extra):
    """A Hugging Face folder of random weights."""
    hf.save_hf(folder, init_weights(config, jax.random.key(0), dtype), config, {**config.to_hf(), **extra})
    return folder


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_round_trip_is_bit_equal(tmp_path, capsys, kind, dtype):
    source = write(tmp_path / "hf", MODELS[kind], jnp.dtype(dtype), torch_dtype=dtype, anything={"kept": [1]})
    (source / "tokenizer.json").write_text('{"a": 1}')
    assert main([str(source), str(tmp_path / "orbax")]) == 0
    assert orbax.is_orbax(tmp_path / "orbax") and not list((tmp_path / "orbax").glob("*.safetensors"))
    assert main([str(tmp_path / "orbax"), str(tmp_path / "back")]) == 0
    assert "(Orbax)" in capsys.readouterr().out
    before, after = (load_file(f / hf.SINGLE) for f in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == np.dtype(dtype)
        assert tensor.tobytes() == after[name].tobytes(), name
    for name in ("config.json", "tokenizer.json"):
        assert (source / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_a_sharded_folder_round_trips(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 4000)
    source = write(tmp_path / "hf", TARGET)
    assert len(list(source.glob("model-*.safetensors"))) > 2 and (source / hf.INDEX).exists()
    assert main([str(source), str(tmp_path / "orbax")]) == 0
    one, other = flatten(load_weights(source, TARGET)), flatten(load_weights(tmp_path / "orbax", TARGET))
    assert all(np.array_equal(one[path], other[path]) for path in one)
    assert not (tmp_path / "orbax" / hf.INDEX).exists()  # it would name files that are not there


def test_loading_converts_the_dtype_of_either_form(tmp_path):
    source = write(tmp_path / "hf", TARGET)
    assert main([str(source), str(tmp_path / "orbax")]) == 0
    for folder in (source, tmp_path / "orbax"):
        assert {leaf.dtype for leaf in flatten(load_weights(folder, TARGET, jnp.bfloat16)).values()} == {
            jnp.dtype("bfloat16")
        }


def test_the_head_of_older_drafters_is_found_under_its_prefix(tmp_path):
    source = write(tmp_path / "hf", DRAFT)
    tensors = load_file(source / hf.SINGLE)
    nested = {f"logit_head.{k}" if k.startswith(("prefix_gru", "embed_proj")) else k: v for k, v in tensors.items()}
    assert nested.keys() != tensors.keys()
    save_file(nested, source / hf.SINGLE)
    assert np.array_equal(hf.load_hf(source, DRAFT).head.proj_out, tensors["embed_proj.2.weight"])


def test_both_spellings_of_the_config_are_read():
    old = TARGET.to_hf() | {"rope_theta": 5e5}
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    new |= {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "dtype": "float32"}
    assert hf.parse_config(old) == hf.parse_config(new)
    assert hf.parse_config(new).rope_theta == 5e5


@pytest.mark.parametrize("kind", MODELS)
def test_the_config_round_trips(kind):
    assert hf.parse_config(MODELS[kind].to_hf()) == MODELS[kind]


def test_refusals_leave_the_destination_alone(tmp_path, capsys):
    source = write(tmp_path / "hf", TARGET)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("mine")
    assert main([str(source), str(taken)]) == 1
    assert "already holds other files: give a folder that is new or empty" in capsys.readouterr().err
    assert [f.name for f in taken.iterdir()] == ["mine"]
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "new")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    (source / hf.SINGLE).write_bytes((source / hf.SINGLE).read_bytes()[:-100])
    assert main([str(source), str(tmp_path / "new")]) == 1
    error = capsys.readouterr().err
    assert "truncated" in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_a_destination_is_one_conversions_and_leftovers_of_killed_ones_go(tmp_path, capsys, there):
    source, out = write(tmp_path / "hf", TARGET), tmp_path / "out"
    if there:
        out.mkdir()
    mine = out / "..0123abcd.partial" if there else tmp_path / ".out.0123abcd.partial"
    others = [tmp_path / name for name in (".out2.0123abcd.partial", ".out.b.0123abcd.partial", ".out.partial")]
    for left in (mine, *others):
        left.mkdir(parents=True)
    with lock_folder(out) if there else lock_file(out):
        assert main([str(source), str(out)]) == 1
        assert "is being written by another process" in capsys.readouterr().err
        assert mine.exists()
    assert main([str(source), str(out)]) == 0
    assert not mine.exists() and all(other.exists() for other in others)
    assert not [file for file in (*out.iterdir(), *tmp_path.glob(".*lock")) if file.name.startswith(".")]


def test_a_damaged_orbax_folder_is_refused(tmp_path, capsys):
    source = write(tmp_path / "hf", TARGET)
    assert main([str(source), str(tmp_path / "orbax")]) == 0
    raw = hf.read_json(source / "config.json")
    hf.write_json(tmp_path / "orbax" / "config.json", raw | {"intermediate_size": 25, "num_hidden_layers": 4})
    assert main([str(tmp_path / "orbax"), str(tmp_path / "back")]) == 1
    error = capsys.readouterr().err
    assert "missing layers.3.q" in error
    hf.write_json(tmp_path / "orbax" / "config.json", raw | {"intermediate_size": 25})
    assert main([str(tmp_path / "orbax"), str(tmp_path / "back")]) == 1
    assert "layers.0.down has shape [16, 24], expected [16, 25]" in capsys.readouterr().err


def test_orbax_weights_in_an_older_format_are_refused_in_one_sentence(tmp_path, capsys):
    source = write(tmp_path / "hf", TARGET)
    assert main([str(source), str(tmp_path / "orbax")]) == 0
    assert hf.read_json(tmp_path / "orbax" / "weights" / "format.json") == {"format": 2}
    (tmp_path / "orbax" / "weights" / "format.json").unlink()  # as before there was one
    assert main([str(tmp_path / "orbax"), str(tmp_path / "back")]) == 1
    error = capsys.readouterr().err
    assert "holds weights in format 1, and this version reads format 2: convert the Hugging Face files again" in error
    assert error.count("\n") == 1 and not (tmp_path / "back").exists()


def test_a_drafter_that_does_not_state_its_targets_depth_is_converted_and_comes_back(tmp_path):
    config = DRAFT
    raw = config.to_hf()
    del raw["num_target_layers"]
    hf.save_hf(tmp_path / "hf", init_weights(config, jax.random.key(0)), config, raw)
    assert convert_folder(tmp_path / "hf", tmp_path / "orbax") == ("Hugging Face", "Orbax")
    assert convert_folder(tmp_path / "orbax", tmp_path / "back") == ("Orbax", "Hugging Face")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_a_single_file_replaces_an_earlier_sharded_model(tmp_path, monkeypatch):
    config = DRAFT
    monkeypatch.setattr(hf, "SHARD_BYTES", 2000)
    hf.save_hf(tmp_path, init_weights(config, jax.random.key(0)), config, config.to_hf())
    assert (tmp_path / hf.INDEX).exists()
    monkeypatch.undo()
    new = init_weights(config, jax.random.key(1))
    hf.save_hf(tmp_path, new, config, config.to_hf())
    assert np.array_equal(hf.load_hf(tmp_path, config).fc, new.fc)


@pytest.mark.parametrize("draft", [3, {"target_layer_ids": 3}, {"target_layer_ids": ["a"]}])
def test_a_drafters_config_of_the_wrong_kind_is_one_sentence(tmp_path, capsys, draft):
    source = write(tmp_path / "hf", DRAFT, num_target_layers=None, dflash_config=draft)
    assert main([str(source), str(tmp_path / "orbax")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {source / 'config.json'} has dflash_config") and error.count("\n") == 1
    assert "expected" in error and not (tmp_path / "orbax").exists()
