"""Numbers that are not finite: an error that names where they begin, and a warning where only the drafter has them."""

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import factory
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
from factory import BYTE_TARGET, Pair, make_draft, make_target, make_tokenizer
from safetensors.numpy import load_file, save_file

from convert.loading import LoadedModel
from convert.not_finite import check_finite, not_finite_error, warn_of_drafts
from domino_jax import prepare, sampling, sharding
from domino_jax.decode import DecodeConfig
from domino_jax.errors import DominoError
from domino_jax.runtime.slots import Completion, Request, Slots
from domino_jax.sampling import SamplingParams
from domino_jax.weights import Params
from infer.__main__ import main, main_chat
from infer.engine import Decoding, Engine, Sequence
from infer.model import Model

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_compilation")]  # whole runs

PROMPTS = [[70, 30, 9, 120, 8], [17] * 20]
WAYS = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(0.8, top_p=0.9, sampler="coupled"),  # the same samples with drafts and without
}
MODES = pytest.mark.parametrize("speculative", [True, False], ids=["drafter", "alone"])


@pytest.fixture(scope="module")
def pair() -> Pair:
    target = replace(BYTE_TARGET, tie_word_embeddings=False, num_hidden_layers=3)
    return factory.good_pair(target, 3, num_hidden_layers=1)


def copied(pair: Pair) -> Pair:
    """The pair with modules of its own."""
    return Pair(jax.tree.map(lambda x: x, pair.params), pair.configs)


def loaded(pair: Pair, **changes: Any) -> LoadedModel:
    return replace(
        LoadedModel(pair.configs, pair.params, make_tokenizer(), (), jnp.dtype("float32"), (), 0.0), **changes
    )


def sequences(engine: Engine, count: int = 10) -> list[Sequence]:
    return [engine.sequence(ids, count, row)[0] for row, ids in enumerate(PROMPTS)]


def one_value(place: str, value: float) -> Callable[[Any], None]:
    """Puts a value into one weight of a target: its path, and the value's index there."""

    def harm(target: Any) -> None:
        owner, _, name = place.rpartition(".")
        for part in filter(None, owner.split(".")):
            target = target[int(part)] if part.isdigit() else getattr(target, part)
        weight = getattr(target, name)
        setattr(target, name, weight.at[(1,) * weight.ndim].set(value))

    return harm


def huge(place: str) -> Callable[[Any], None]:
    """Makes every value of a weight as large as float32 just holds, with its sign."""

    def harm(target: Any) -> None:
        owner, _, name = place.rpartition(".")
        for part in filter(None, owner.split(".")):
            target = target[int(part)] if part.isdigit() else getattr(target, part)
        setattr(target, name, jnp.sign(getattr(target, name)) * 3e38)

    return harm


def prompt_embedding(target: Any) -> None:
    target.embed = target.embed.at[PROMPTS[0][2], 5].set(np.nan)


TARGETS = {
    "a NaN in the embedding of a prompt's token": (
        prompt_embedding,
        r"the embedding on, first at token 2 \(id 9\)",
    ),
    "a NaN in the first layer": (
        one_value("layers.0.gate_up", np.nan),
        r"layer 0 on .*gate_proj.*up_proj.* holds",
    ),
    "an infinity in a norm": (
        one_value("layers.1.input_norm", np.inf),
        r"layer 1 on .*layers\.1\.input_layernorm.* h",
    ),
    "a NaN in the last layer": (
        one_value("layers.2.down", np.nan),
        r"layer 2 on \(of 3, .*2\.mlp\.down_proj.* h",
    ),
    "a NaN in the keys": (one_value("layers.1.kv", np.nan), r"layer 1 on .*1\.self_attn\.k_proj.* or .*v_proj.* holds"),
    "a NaN in the final norm": (one_value("norm", np.nan), r"the final norm on.*model\.norm\.weight holds"),
    "a NaN in the LM head": (one_value("lm_head", np.nan), r"the logits on.*lm_head\.weight holds such values; fetch"),
    "an infinity in the LM head": (one_value("lm_head", -np.inf), r"the logits on.*lm_head\.weight holds such values"),
    "an MLP that overflows": (
        huge("layers.1.down"),
        r"layer 1 on.* finite, but so large that sums overflow in",
    ),
    "an attention that overflows": (huge("layers.2.o"), r"layer 2 on.* finite, but so large"),
    "logits that overflow": (huge("lm_head"), r"the logits on.* finite, but so large"),
}


@MODES
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", TARGETS)
def test_an_answer_from_numbers_that_are_not_finite_is_an_error(pair, case, way, speculative):
    harm, expected = TARGETS[case]
    broken = copied(pair)
    harm(broken.params.target)
    engine = Engine(loaded(broken))
    rows = sequences(engine)
    with pytest.raises(DominoError, match=expected):
        engine.generate(rows, Decoding(WAYS[way], speculative=speculative))
    assert not any(s.tokens for s in rows if s.row == 0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("tpu", marks=pytest.mark.slow)])
def test_a_weight_in_8_bits_is_named(pair, device):
    harmed, config = copied(pair).params.target, pair.configs.target
    one_value("layers.1.q", np.nan)(harmed)
    params = Params(prepare.quantize_target(harmed, config, "int8"))
    made = prepare.quantized_for_cpu(params) if device == "cpu" else prepare.prepare_for_tpu(params, config, None)
    error = not_finite_error(made.target, config, PROMPTS[0], jnp.dtype(jnp.float32))
    assert "from layer 1 on" in str(error) and "layers.1.self_attn.q_proj.weight" in str(error)


@pytest.mark.parametrize("way", WAYS)
@MODES
def test_what_was_generated_before_is_kept(pair, way, speculative):
    """The embedding of a token that comes only later in the answer: all before it, and it, are the sound model's."""
    how = Decoding(WAYS[way], speculative=False)
    sound = sequences(Engine(loaded(pair)), 24)[:1]
    Engine(loaded(pair)).generate(sound, how)
    known = sound[0].prompt + sound[0].tokens
    at = next(i for i in range(len(sound[0].prompt) + 3, len(known) - 1) if known[i] not in known[:i])
    broken = copied(pair)
    broken.params.target.embed = broken.params.target.embed.at[known[at]].set(np.nan)
    engine = Engine(loaded(broken))
    (s,) = sequences(engine, 24)[:1]
    pieces = []
    with pytest.raises(DominoError, match=r"the embedding on.*embed_tokens\.weight holds"):
        for chunk in engine.stream([s], replace(how, speculative=speculative)):
            pieces.append(chunk)
    assert s.finish_reason is None and "".join(chunk.text for chunk in pieces) == s.text
    assert [t for chunk in pieces for t in chunk.tokens] == s.tokens
    if not speculative:  # a draft of the token makes its whole cycle NaN, so that the end may come sooner
        assert s.ids == known[: at + 1]
    else:
        assert s.ids == known[: len(s.ids)]


def drafter_weight(name: str, value: float) -> Callable[[Any], None]:
    def harm(draft: Any) -> None:
        owner, _, leaf = name.rpartition(".")
        for part in filter(None, owner.split(".")):
            draft = draft[int(part)] if part.isdigit() else getattr(draft, part)
        setattr(draft, leaf, jnp.full_like(getattr(draft, leaf), value))

    return harm


DRAFTERS = {
    "fc": drafter_weight("fc", np.nan),
    "context norm": drafter_weight("context_norm", np.inf),
    "a layer": drafter_weight("layers.0.down", np.nan),
    "an overflow": drafter_weight("layers.0.o", 3e38),
    "final norm": drafter_weight("norm", np.nan),
    "the head's GRU": drafter_weight("head.gru_in", np.nan),
    "the head's output": drafter_weight("head.proj_out", np.inf),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", DRAFTERS)
def test_a_drafter_that_is_not_finite_changes_no_output_and_is_told_once(pair, case, way, capsys):
    broken, said = copied(pair), []
    DRAFTERS[case](broken.params.draft)
    engine = Engine(loaded(broken), warn=said.append)
    rows, alone = sequences(engine, 24), sequences(engine, 24)
    engine.generate(rows, Decoding(WAYS[way]))
    engine.generate(sequences(engine, 24), Decoding(WAYS[way]))
    engine.generate(alone, Decoding(WAYS[way], speculative=False))
    if way == "greedy":
        assert [s.tokens for s in rows] == [s.tokens for s in alone]
    assert all(len(s.tokens) == 24 for s in rows)
    assert len(said) == 1 and said[0].startswith("the drafter's numbers are not finite")
    slots = Slots(broken.params, broken.configs, 2, engine.loaded.dtype, warn=warn_of_drafts)
    requests = [Completion(Request(ids, replace(WAYS[way], max_tokens=24))) for ids in PROMPTS * 2]
    for answer in slots.run(requests):
        check_finite(answer, broken.params.target, broken.configs.target, engine.loaded.dtype)
    if way == "greedy":
        assert [c.tokens for c in requests[:2]] == [s.tokens for s in alone]
    assert capsys.readouterr().err.count("the drafter's numbers are not finite") == 1


def test_a_finite_drafter_is_not_warned_of(pair, recwarn):
    """Neither a good one nor one of random weights, none of whose drafts stands."""
    random = Pair.make(pair.configs.draft, pair.configs.target, 9)
    for params in (pair.params, Params(pair.params.target, random.params.draft)):
        engine = Engine(loaded(Pair(params, pair.configs)))
        engine.generate(sequences(engine, 24))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("changes", "finite"),
    [
        ({}, True),
        ({3: -np.inf}, True),
        ({3: np.nan}, False),
        ({3: -np.nan}, False),
        ({0: np.inf}, False),
        ({...: -np.inf}, False),
        ({2: 1e36}, True),
    ],
    ids=str,
)
def test_what_the_greatest_logit_tells(changes, finite):
    logits = jnp.zeros((1, 2, 7))
    for place, value in changes.items():
        logits = logits.at[0, 1, place].set(value)
    assert sampling.finite_logits(logits, jnp.zeros(1)).tolist() == [[True, finite]]
    if changes == {2: 1e36}:  # divided by a low temperature it is infinite
        assert sampling.finite_logits(logits, jnp.full(1, 1e-4)).tolist() == [[True, False]]


@pytest.mark.parametrize("way", ["greedy", pytest.param("sampled", marks=pytest.mark.slow)])
def test_the_program_has_no_more_passes_over_the_vocabulary(pair, way):
    """Reductions of whole rows of logits in the compiled cycle, as it is and without the question."""
    state = loops.begin(pair.params, pair.configs, PROMPTS, 20)
    vocabulary = f",{pair.configs.target.vocab_size}]"

    def passes(finite: Callable[..., Any]) -> int:
        program: Any = loops.retraced(decode__finite_logits=finite)
        text = program.lower(pair.params, pair.configs, state, 2, way == "greedy").compile().as_text()
        shapes = dict(re.findall(r"(%[\w.-]+) = (\w+\[[\d,]*\])", text))
        return sum(vocabulary in shapes[operand] for operand in re.findall(r" reduce\((%[\w.-]+)", text))

    assert passes(sampling.finite_logits) == passes(lambda logits, _: jnp.ones(logits.shape[:2], bool)) > 0


def test_on_a_mesh(pair):
    broken = copied(pair)
    TARGETS["a NaN in the last layer"][0](broken.params.target)
    mesh, target = sharding.make_mesh(2, 2), broken.configs.target
    params = Params(factory.place(broken.params.target, target, mesh))
    configs = DecodeConfig(sharding.fit_to_mesh(target, 2))
    engine = Engine(loaded(Pair(params, configs), mesh=mesh))
    with pytest.raises(DominoError, match=TARGETS["a NaN in the last layer"][1]):
        engine.generate(sequences(engine))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A target that is NaN from the second layer on once it sees the byte Z, and its drafter."""
    root = tmp_path_factory.mktemp("models")
    make_target(root / "target", eos=None, tie_word_embeddings=False)
    make_draft(root / "draft")
    file = root / "target" / "model.safetensors"
    tensors = load_file(file)
    (z,) = make_tokenizer()("Z")["input_ids"]
    tensors["model.embed_tokens.weight"][z] = np.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return root


EXPECTED = "the embedding on, first at token 1 (id"


@pytest.mark.parametrize("words", [[], ["--json"], ["--show-drafts"], ["--compare"], ["--temperature", "1"]], ids=str)
def test_the_command_fails_with_a_sentence(folder, capsys, words):
    status = main(["aZb", "--model", str(folder / "target"), "--draft", str(folder / "draft"), *words])
    out, err = capsys.readouterr()
    assert status == 1 and EXPECTED in err and not out.strip()


def test_a_chat_ends_with_the_sentence(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("b\naZb\nnever asked\n"))
    words = ["--model", str(folder / "target"), "--draft", "none", "--max-new-tokens", "3"]
    assert main_chat(words) == 1
    out, err = capsys.readouterr()
    assert EXPECTED in err and "starts over" not in err and out.count("> ") == 2


def test_answers_that_were_whole_are_printed_before_the_error(folder, capsys, tmp_path):
    prompts = [{"prompt": "b"}, {"prompt": "aZb", "max_new_tokens": 4}, {"prompt": "c"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    words = ["--prompts", str(tmp_path / "prompts.jsonl"), "--batch-size", "1", "--max-new-tokens", "3"]
    assert main([*words, "--model", str(folder / "target"), "--draft", "none", "--json"]) == 1
    out, err = capsys.readouterr()
    assert [json.loads(line)["row"] for line in out.splitlines()] == [0] and EXPECTED in err


def test_python_and_a_chat_fail_with_the_sentence(pair):
    broken = copied(pair)
    TARGETS["a NaN in the LM head"][0](broken.params.target)
    model = Model(loaded(broken))
    for run in (model.generate, lambda prompts: list(model.stream(prompts[0])), lambda p: model.chat().send(p[0])):
        with pytest.raises(DominoError, match="the logits on"):
            run(["hello"])
    chat = model.chat()
    with pytest.raises(DominoError, match="the logits on"):
        chat.send("hello")
    assert chat.messages == []
