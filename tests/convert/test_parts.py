"""Orthrus's folders: told by what is in them, decoded with, taken apart and put together bit for bit."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import factory
import numpy as np
import pytest
from factory import BYTE_TARGET, make_draft, make_target
from rich.console import Console

from convert import check, folders, hf
from convert.__main__ import main
from convert.drafters import form_of, make_drafter
from convert.dual_view import holds_both
from convert.loading import load_model
from convert.options import TreeSettings
from convert.parts import join_parts, write_part
from convert.registry import locate, read_configs, resolve_folders
from convert.safetensors import TensorFiles
from convert.tensors import open_tensors
from domino_jax.config import TargetConfig
from domino_jax.drafters.combined import CombinedDrafter
from domino_jax.drafters.dual_view import DualViewConfig, DualViewDrafter
from domino_jax.drafters.heads.domino import DominoHead
from domino_jax.errors import DominoError
from infer.bench.modes import mode_of
from infer.engine import Decoding, Engine

VIEW = DualViewConfig(**BYTE_TARGET.geometry(), block_size=6, mask_token_id=factory.MASK_ID)
PROMPTS = [[5, 70, 9, 30] * 4, [8], [61, 62]]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A base, a view of it in bfloat16, both in one, and in several files."""
    folder = tmp_path_factory.mktemp("orthrus")
    make_target(folder / "base", std=0.4)
    hf.save_hf(folder / "view", factory.random_weights(VIEW, 3), VIEW, VIEW.to_hf(), "bfloat16")
    join_parts(folder / "base", folder / "view", folder / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "SHARD_BYTES", 40_000)
        join_parts(folder / "base", folder / "view", folder / "sharded")
    # As it is told by its tensors alone, and as the public ones write it.
    shutil.copytree(folder / "whole", folder / "unnamed")
    change(folder / "unnamed", architectures=["Qwen3ForCausalLM"])
    shutil.copytree(folder / "whole", folder / "public")
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": None, "rope_scaling": None}
    change(folder / "public", **theta, use_cache=False, r=128, lora_alpha=256, eos_token_id=2)
    return folder


def change(folder: Path, **fields: Any) -> None:
    """Other fields of a config.json; None removes one."""
    raw = json.loads((folder / "config.json").read_text()) | fields
    hf.write_json(folder / "config.json", {name: value for name, value in raw.items() if value is not None})


def stored(folder: Path) -> dict[str, bytes]:
    files = open_tensors(folder)
    assert isinstance(files, TensorFiles)
    return {name: f"{s.dtype} {s.shape} ".encode() + files.read(s).tobytes() for name, s in files.stored.items()}


def generated(target: Path, draft: Path | None, **how: Any) -> tuple[list[list[int]], Any]:
    loaded = load_model(target, draft, "float32", **how)
    engine = Engine(loaded)
    sequences = [engine.sequence(prompt, 14)[0] for prompt in PROMPTS]
    engine.generate(sequences, Decoding())
    assert not loaded.warnings
    return [s.tokens for s in sequences], loaded.configs.drafter


@pytest.mark.parametrize(
    "names",
    [
        ("its own",),
        pytest.param(
            ("on its base", "two drafts", "told by its tensors", "over a mesh", "of a base that is whole"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["most", "rest"],
)
def test_it_decodes_with_its_own_view_and_changes_no_token(made, names):
    plain, none = generated(made / "base", None)
    assert none is None
    ways: dict[str, tuple[str, str, dict[str, Any]]] = {
        "its own": ("whole", "whole", {}),
        "two drafts": ("sharded", "sharded", {"drafts": 2}),
        "told by its tensors": ("unnamed", "unnamed", {}),
        "on its base": ("base", "view", {"ngram": True}),
        "over a mesh": ("public", "public", {"mesh": (1, 2)}),
        "of a base that is whole": ("whole", "view", {}),
    }
    for name in names:
        target, draft, how = ways[name]
        tokens, drafter = generated(made / target, made / draft, **how)
        model = drafter.model if isinstance(drafter, CombinedDrafter) else drafter
        assert isinstance(model, DualViewDrafter) and tokens == plain, name
        assert dataclasses.replace(model.config, num_key_value_heads=2) == VIEW
    assert mode_of(DualViewDrafter(VIEW)) == "orthrus"


@pytest.mark.parametrize("name", ["whole", "sharded", "unnamed", "public"])
def test_a_folder_with_both_is_a_target_that_drafts_itself(made, name):
    console = Console(quiet=True)
    folder = made / name
    assert resolve_folders(str(folder), None, console) == (folder, folder)
    assert resolve_folders(str(folder), "none", console) == (folder, None)
    assert resolve_folders(str(made / "base"), str(folder), console) == (made / "base", folder)
    assert locate(str(folder)) == (str(folder), str(folder)) and locate(str(made / "base"))[1] is None
    _, target, draft, warnings = read_configs(folder, folder)
    assert isinstance(target, TargetConfig) and draft == VIEW and not warnings
    assert isinstance(folders.read_config(folder), TargetConfig)


def test_what_tells_it():
    whole, qwen = {"architectures": ["OrthrusLM"]}, {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    assert holds_both(whole | {"model_type": "qwen3"}) and holds_both(whole) and not holds_both(qwen)
    assert form_of({"architectures": ["OrthrusView"], "model_type": "qwen3"}).config is DualViewConfig
    assert form_of(qwen).config is TargetConfig and not holds_both({"model_type": "orthrus"})


@pytest.mark.parametrize("name", ["whole", "sharded", "unnamed", "public"])
def test_parts_have_the_bits_of_the_whole_and_the_whole_theirs(made, tmp_path, name):
    folder = made / name
    write_part(folder, tmp_path / "base", "base")
    write_part(folder, tmp_path / "view", "view")
    join_parts(tmp_path / "base", tmp_path / "view", tmp_path / "joined")
    whole, base, view = stored(folder), stored(tmp_path / "base"), stored(tmp_path / "view")
    assert base == stored(made / "base") and view == stored(made / "view") and len(view) == 6 * 2
    assert {**base, **view} == whole == stored(tmp_path / "joined")
    raw = {n: json.loads((f / "config.json").read_text()) for n, f in (("was", folder), ("is", tmp_path / "joined"))}
    assert raw["is"] == raw["was"] | {"architectures": ["OrthrusLM"]}
    plain = json.loads((tmp_path / "base" / "config.json").read_text())
    assert plain["architectures"] == ["Qwen3ForCausalLM"] and not {"block_size", "r", "lora_alpha"} & plain.keys()
    assert (tmp_path / "base" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert form_of(plain, tmp_path / "base").config is TargetConfig
    assert folders.read_config(tmp_path / "view") == VIEW


@pytest.mark.parametrize("parity", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_check_reads_both(made, tmp_path, monkeypatch, parity):
    if not parity:  # which is what takes time
        monkeypatch.setattr(check, "_parity", lambda *given: "differ by at most nothing")
    report = check.check_folder(made / "public")
    assert not report.problems and not report.warnings, report
    lines = dict(report.lines)
    assert lines["what"].startswith("Qwen3 target") and lines["second view"].startswith("Orthrus's second view: 2 lay")
    assert "differ by at most" in lines["transformers"]
    report = check.check_folder(made / "view", made / "base")
    assert not report.problems and dict(report.lines)["target"] == "fits"
    files = open_tensors(made / "whole")
    lost = "model.layers.1.self_attn.k_norm_diff.weight"
    kept = [(name, files.read(s)) for name, s in files.stored.items() if name != lost]
    bad = [(n, np.full_like(x, np.nan) if n.endswith("layers.0.self_attn.o_proj_diff.weight") else x) for n, x in kept]
    hf.write_tensors(tmp_path, bad, json.loads((made / "whole" / "config.json").read_text()))
    problems = check.check_folder(tmp_path).problems
    assert [lost in problems[0], "o_proj_diff.weight has" in problems[1]] == [True, True]
    with pytest.raises(DominoError, match=f"missing {lost}"):
        load_model(tmp_path, tmp_path, "float32")


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda d, to: folders.convert_folder(d / "whole", to), "give --part base or --part view"),
        (lambda d, to: folders.convert_folder(d / "unnamed", to), "give --part base or --part view"),
        (lambda d, to: write_part(d / "base", to, "view"), "holds no such pair"),
        (lambda d, to: write_part(d / "view", to, "base"), "holds no such pair"),
        (lambda d, to: write_part(d / "none", to, "base"), "is not a folder"),
        (lambda d, to: join_parts(d / "whole", d / "view", to), "a target and a second view are joined"),
        (lambda d, to: join_parts(d / "base", d / "base", to), "a target and a second view are joined"),
        (lambda d, to: join_parts(d / "view", d / "base", to), "are joined"),
        (lambda d, to: write_part(d / "whole", d / "base", "base"), "already holds a model"),
        (lambda d, to: load_model(d / "view", None), "holds a drafter"),
        (lambda d, to: load_model(d / "whole", d / "whole", confidence_threshold=0.5), "chains of a block drafter"),
    ],
)
def test_what_can_not_be(made, tmp_path, run, said):
    with pytest.raises(DominoError, match=said):
        run(made, tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("change_of_base", [{"num_hidden_layers": 3}, {"num_key_value_heads": 4}, {"head_dim": 4}])
def test_a_view_of_another_model_is_refused(made, tmp_path, change_of_base):
    make_target(tmp_path / "other", tokenizer=False, **change_of_base)
    for run in (
        lambda: join_parts(tmp_path / "other", made / "view", tmp_path / "to"),
        lambda: read_configs(tmp_path / "other", made / "view"),
    ):
        with pytest.raises(DominoError, match="made for another target"):
            run()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["SRC", "DST", "--part", "middle"], 2, "middle"),
        (["SRC", "DST", "--part", "view", "--view", "V"], 2, "give one of them"),
        (["SRC", "DST", "--part", "base", "--dtype", "float32"], 2, "copy tensors as they are"),
        (["SRC", "DST", "--view", "V", "--target", "T"], 2, "copy tensors as they are"),
        (["SRC", "--part", "base"], 2, "give SRC and DST"),
        (["--check", "SRC", "--part", "base"], 2, "--check takes one folder"),
    ],
)
def test_words_that_make_no_sense(capsys, words, code, said):
    assert main(words) == code
    assert said in capsys.readouterr().err


def test_the_command(made, tmp_path, capsys):
    assert main([str(made / "whole"), str(tmp_path / "v"), "--part", "view"]) == 0
    assert main([str(made / "base"), str(tmp_path / "w"), "--view", str(tmp_path / "v")]) == 0
    printed = capsys.readouterr()
    assert "its view" in printed.out and "both in one" in printed.out and not printed.err
    assert stored(tmp_path / "w") == stored(made / "whole")


def test_a_view_with_a_head(made, tmp_path):
    """Its head's tensors and fields go with the view."""
    config = dataclasses.replace(VIEW, head=DominoHead(6, 4, 1))
    hf.save_hf(tmp_path / "view", factory.random_weights(config, 5), config, config.to_hf())
    join_parts(made / "base", tmp_path / "view", tmp_path / "whole")
    write_part(tmp_path / "whole", tmp_path / "base", "base")
    write_part(tmp_path / "whole", tmp_path / "again", "view")
    assert stored(tmp_path / "base") == stored(made / "base") and stored(tmp_path / "again") == stored(
        tmp_path / "view"
    )
    assert folders.read_config(tmp_path / "again") == config and config.to_hf()["projector_type"] == "domino"
    assert "projector_type" not in json.loads((tmp_path / "base" / "config.json").read_text())
    assert mode_of(make_drafter(config)) == "orthrus-domino"  # type: ignore[arg-type]
    assert mode_of(make_drafter(config, tree=TreeSettings(4))) == "orthrus-domino-tree"  # type: ignore[arg-type]
    assert mode_of(make_drafter(VIEW, tree=TreeSettings(4))) == "orthrus-tree"  # type: ignore[arg-type]


def test_names():
    for size in ("1.7", "4", "8"):
        repository = f"chiennv/Orthrus-Qwen3-{size}B"
        assert locate(f"orthrus-qwen3-{size}b") == (repository, repository) == locate(repository)
        assert locate(f"orthrus-qwen3-{size}b", "none") == (repository, None)
        assert locate(f"qwen3-{size}b", f"orthrus-qwen3-{size}b") == (f"Qwen/Qwen3-{size}B", repository)


def test_another_drafter_drafts_for_it(made, tmp_path):
    make_draft(tmp_path / "draft")
    assert read_configs(made / "whole", tmp_path / "draft")[2] == factory.BYTE_DRAFT
