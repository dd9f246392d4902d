"""The Python API: what the command line gives, from Python."""

import doctest
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from factory import REPEATING, make_draft, make_target

import infer
from domino_jax.config import TargetConfig
from domino_jax.errors import DominoError
from domino_jax.runtime.command import UsageError
from infer import CompletionOutput, Model, load
from infer.__main__ import main

pytestmark = pytest.mark.usefixtures("quick_compilation")
TEMPLATE = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_target(root / "target", std=REPEATING, eos=())
    make_target(root / "chat", template=TEMPLATE, eos=())
    make_draft(root / "draft", std=REPEATING)
    return root


@pytest.fixture(scope="module")
def model(folder) -> Model:
    # Always four drafts: what auto chooses goes by times.
    return load(str(folder / "target"), draft=str(folder / "draft"), dtype="float32", num_draft_tokens=4)


@pytest.fixture(scope="module")
def talker(folder) -> Model:
    return load(str(folder / "chat"), draft="none")


def test_a_completion_is_what_the_command_prints(model, folder, capsys):
    words = ["--model", str(folder / "target"), "--draft", str(folder / "draft"), "--max-new-tokens", "12"]
    words += ["--num-draft-tokens", "4"]
    assert main(["hello", *words, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    (found,) = model.generate(["hello"], max_new_tokens=12)
    assert isinstance(found, CompletionOutput)
    assert (found.text, found.tokens, found.accepted, found.tau, found.finish_reason, found.prompt_tokens) == (
        *(row[key] for key in ("text", "tokens", "accepted", "tau", "finish_reason")),
        row["input_ids"],
    )


def test_streamed_pieces_make_the_text(model):
    pieces = list(model.stream("hello", max_new_tokens=30))
    (whole,) = model.generate(["hello"], max_new_tokens=30)
    assert len(pieces) > 1 and "".join(pieces) == whole.text
    stopped = "".join(model.stream("hello", max_new_tokens=30, stop=[whole.text[:1]]))
    assert stopped == ""


def test_a_stream_that_is_left_early_leaves_the_model_usable(model):
    stream = model.stream("hello", max_new_tokens=60)
    next(stream)
    stream.close()
    assert len("".join(model.stream("hello", max_new_tokens=5))) == 5


def test_text_messages_and_ids_in_batches_keep_their_order(model, talker):
    ids = [5, 70]
    together = model.generate(["hello", ids, "a longer prompt"], max_new_tokens=4, batch_size=2)
    assert [found.prompt_tokens == ids for found in together] == [False, True, False]
    assert together[1].tokens == model.generate([ids], max_new_tokens=4)[0].tokens
    (asked,) = talker.generate([[{"role": "user", "content": "hi"}]], max_new_tokens=1)
    assert talker.tokenizer.decode(asked.prompt_tokens) == "[user:hi]"
    (raw,) = talker.generate(["hi"], max_new_tokens=1, raw=True)
    assert talker.tokenizer.decode(raw.prompt_tokens) == "hi"
    assert model.generate([]) == []


def test_samples_follow_the_seed(model):
    def sampled(seed: int) -> list[int]:
        return model.generate(["hello"], max_new_tokens=12, temperature=1.0, seed=seed)[0].tokens

    assert sampled(1) == sampled(1) != sampled(2)


def test_a_chat_remembers_and_goes_on_from_its_caches(talker):
    chat = talker.chat(max_new_tokens=6, system="x" * 100)
    first = chat.send("hi")
    assert first == "".join(piece for piece in [chat.messages[1]["content"]])
    second = "".join(chat.stream("more"))
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "user", "assistant"]
    assert chat.last is not None and chat.last.reused > 0
    messages = [{"role": "system", "content": "x" * 100}, *chat.messages[:3]]
    assert talker.generate([messages], max_new_tokens=6)[0].text == second == chat.messages[3]["content"]
    with pytest.raises(DominoError, match="256 positions"):
        chat.send("y" * 300)
    wrong: Any = {"role": "user", "content": "hi"}
    with pytest.raises(UsageError, match="a message must be text, found an object"):
        chat.send(wrong)
    assert len(chat.messages) == 4


def test_weights_and_config_are_there_for_researchers(model):
    assert isinstance(model.config, TargetConfig)
    assert model.params.target.embed.shape[0] == model.config.vocab_size
    assert model.params.draft is not None


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"temperature": -1.0}, "--temperature must be 0 or more"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1"),
        ({"top_p": 0.0}, "--top-p"),
        ({"temprature": 1.0}, "temprature is no keyword; those are max_new_tokens, temperature"),
        ({"temperature": "hot"}, "--temperature must be a number, found 'hot'"),
        ({"top_k": 1.5}, "--top-k must be a whole number"),
        ({"max_new_tokens": 2**40}, "--max-new-tokens must be from 1 to 2"),
        ({"seed": True}, "--seed must be a whole number"),
        ({"stop": [""]}, "stop must be texts that are not empty"),
        ({"stop": [1]}, "stop must be texts"),
        ({"raw": "yes"}, "raw must be True or False"),
        ({"thinking": 1}, "thinking must be True or False"),
        ({"system": ["Be brief."]}, "system must be text"),
    ],
)
def test_wrong_values_are_refused_when_they_are_given(model, how, says):
    for ask in (lambda: model.stream("hi", **how), lambda: model.generate(["hi"], **how), lambda: model.chat(**how)):
        with pytest.raises(UsageError, match=says):
            ask()


def test_prompts_are_a_list_and_a_stop_may_be_one_text(model):
    with pytest.raises(UsageError, match="put one into a list"):
        model.generate("hello")
    with pytest.raises(UsageError, match="--batch-size must be at least 1"):
        model.generate(["hello"], batch_size=0)
    for wrong in ([[1.5]], [None], [b"ab"], [{"role": "user", "content": "hi"}]):
        with pytest.raises(UsageError, match="a prompt is text, a list of messages, or a list of token ids"):
            model.generate(wrong)
    with pytest.raises(DominoError, match="id 10000000000000000000000, outside the vocabulary of 260"):
        model.generate([[10**22]])
    (found,) = model.generate(["hello"], max_new_tokens=3)
    assert model.generate(["hello"], max_new_tokens=3, stop=found.text[:2])[0].text == ""
    assert model.generate([np.array(found.prompt_tokens)], max_new_tokens=3)[0].tokens == found.tokens


@pytest.mark.parametrize("few", [0, -1, 2.0, True, "all"])
def test_the_number_of_draft_tokens_is_a_count_or_auto(folder, few):
    with pytest.raises(UsageError, match="--num-draft-tokens must be "):
        load(str(folder / "target"), num_draft_tokens=few)


def test_loading_refuses_what_contradicts(folder):
    with pytest.raises(UsageError, match="--head-candidates must be at least 1"):
        load(str(folder / "target"), head_candidates=0)
    odd: list[dict[str, Any]] = [{"weights": "int4"}, {"weights": "fp8"}, {"draft_weights": "int16"}, {"weights": 8}]
    for wrong in odd:
        with pytest.raises(UsageError, match=r"weights (int4: 4 bits need scales|must be auto, exact, int8)"):
            load(str(folder / "target"), **wrong)
    with pytest.raises(DominoError, match="drafts"):
        load(str(folder / "target"), draft=str(folder / "draft"), num_draft_tokens=9)


def settings_of_the_process() -> list[Any]:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return [dict(jax.config.values), handlers, sys.unraisablehook, np.random.get_state()[1].tolist()]  # type: ignore[index]


@pytest.mark.parametrize("how", [{}, {"num_draft_tokens": 2}, {"mesh": "data=1,model=2"}, {"draft": "ngram"}], ids=str)
def test_a_users_process_keeps_its_settings(folder, how, compile_cache_allowed):
    """Of JAX, of signals, of NumPy."""
    before = settings_of_the_process()
    model = load(str(folder / "target"), **{"draft": str(folder / "draft"), "dtype": "float32", **how})
    assert model.generate([[5, 6, 7]], max_new_tokens=4)[0].tokens
    assert "".join(model.stream([5, 6, 7], max_new_tokens=4)) is not None
    with pytest.raises(DominoError):
        load(str(folder / "nothing"))
    assert settings_of_the_process() == before and not list(compile_cache_allowed.glob("jax-*"))


@pytest.mark.e2e
def test_importing_the_package_is_quick():
    code = "import sys, infer; assert 'jax' not in sys.modules; infer.load; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
    with pytest.raises(AttributeError):
        infer.nothing  # noqa: B018
    assert set(infer.__all__) == {"Chat", "CompletionOutput", "Model", "load"}


@pytest.mark.e2e
def test_the_examples_of_the_documentation_run():
    from infer import model as module

    found = doctest.testmod(module, verbose=False)
    assert (found.failed, found.attempted > 5) == (0, True)
