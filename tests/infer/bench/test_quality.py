"""`python -m infer.bench --quality` on tiny pairs: formats, turns, τ, what is refused, and what Ctrl-C leaves."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factory import BYTE_TARGET, MASK_ID, REPEATING, make_draft, make_target

from convert.loading import load_model
from domino_jax import target
from infer.bench import main, quality
from infer.bench.questions import parse_questions
from infer.bench.target_forms import text_ids
from infer.engine import Engine

pytestmark = pytest.mark.usefixtures("quick_compilation")
STEPS = "\nPlease reason step by step, and put your final answer within \\boxed{}."
CODE = 'def two() -> int:\n    """Give 2."""\n'
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
# The target repeats the last id. The drafter proposes it once a block (so a cycle gives 2 tokens), or always where it
# is the mask's (5 with 4 proposals); see factory.py. Id 0 is a stop token.
ROWS = [{"input_ids": [5, 70]}, {"input_ids": [5, MASK_ID]}, {"input_ids": [5, 0]}]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("quality")
    make_target(root / "target", std=REPEATING)
    make_target(root / "chat", std=REPEATING, template=TEMPLATE)
    make_target(root / "bare", std=REPEATING, tokenizer=False)
    make_draft(root / "draft", std=REPEATING)
    return root


def write(path: Path, rows: list[dict] | str) -> Path:
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def sweep(models, tmp_path):
    """Run a sweep over rows, and give its status and figures."""

    def run(rows: list[dict] | str, *more: str, target: str = "target") -> tuple[int, list[dict]]:
        file, out = write(tmp_path / "set.jsonl", rows), tmp_path / "out.json"
        words = ["--model", str(models / target), "--draft", str(models / "draft"), "--quality", f"gsm8k={file}"]
        status = main([*words, "--new-tokens", "9", "--json", str(out), *more])
        return status, json.loads(out.read_text()) if out.exists() else []

    return run


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"question": "1 + 1?", "answer": "It is 2.\n#### 2"}, ["1 + 1?" + STEPS]),
        ({"problem": "$x = 2$", "solution": "s", "answer": "2", "level": 1, "unique_id": "a"}, ["$x = 2$" + STEPS]),
        (
            {"task_id": "HumanEval/0", "prompt": CODE, "canonical_solution": "", "test": "", "entry_point": "two"},
            [
                "Write a solution to the following problem and make sure that it passes the tests:\n"
                f"```python\n{CODE}\n```"
            ],
        ),
        ({"prompt": "Add.", "task_id": 2, "code": "", "test_imports": [], "test_list": ["assert 1"]}, ["Add."]),
        ({"task_id": 11, "text": "Add.", "code": "", "test_list": ["assert 1"], "test_setup_code": ""}, ["Add."]),
        ({"question_id": 81, "category": "writing", "turns": ["One.", "Two."]}, ["One.", "Two."]),
        ({"category": "math", "prompt": ["One.", "Two."], "prompt_id": 1, "reference": []}, ["One.", "Two."]),
        ({"instruction": "Sort.", "input": "3, 1", "output": "1, 3", "text": "…"}, ["Sort.\n\nInput:\n3, 1"]),
        ({"instruction": "Sing.", "input": "", "output": "La."}, ["Sing."]),
        ({"instruction": "Sing.", "output": "La.", "generator": "g", "dataset": "helpful_base"}, ["Sing."]),
        ({"prompt": "def ", "max_new_tokens": 5}, ["def "]),
    ],
)
def test_the_usual_formats_are_known_by_their_fields(row, turns):
    question = parse_questions(row, "here")
    assert list(question.turns) == turns and question.answers == len(turns)
    assert question.limit == row.get("max_new_tokens")


def test_conversations_and_ids_are_taken_as_they_are():
    message = {"role": "user", "content": "Hi."}
    assert parse_questions({"messages": [message]}, "here").messages == (message,)
    assert parse_questions({"input_ids": [1, 2], "text": "the answer"}, "here").ids == (1, 2)


@pytest.mark.e2e
@pytest.mark.slow
def test_acceptance_of_every_mode_with_stop_tokens(sweep, tmp_path, capsys):
    status, rows = sweep(ROWS, "--lean", "--batch-sizes", "2", "--plot", str(tmp_path / "plots"))
    assert status == 0
    assert [(r["mode"], r["drafts"]) for r in rows] == [("domino", 4), ("dflash", 4), ("lean", 0)]
    assert not [v for row in rows for v in row.values() if isinstance(v, dict | list)]
    for row in rows:
        assert (row["prompts"], row["answers"], row["tokens"], row["stopped"]) == (3, 3, 9 + 9 + 1, 1)
        assert row["same_answers_as_lean"] == 3 and row["speed_over_lean"] > 0
        assert row["published_tau_per_answer"] is None and row["difference"] is None
    for row in rows[:2]:
        # 8 tokens after the prefill's: 4 cycles of 2, or 2 of 5, the last counted whole; no cycle after a stop.
        assert row["cycles"] == 6 and row["tau"] == row["tau_first_turn"] == (4 * 2 + 2 * 5) / 6
        assert row["tau_per_answer"] == (2 + 5) / 2
        assert [row[f"length_{n}"] for n in range(1, 6)] == [0, 4, 0, 0, 2]
    assert rows[2]["tau"] is None and rows[2]["tau_per_answer"] is None
    for name in ("tau.png", "acceptance_lengths.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "gsm8k, domino 4" in shown and "3.00" in shown and "3.50" in shown and "published" not in shown


@pytest.mark.e2e
@pytest.mark.slow
def test_published_figures_belong_to_the_checkpoint_as_it_is(sweep, models, monkeypatch, capsys):
    pair = str(models / "target"), str(models / "draft")
    monkeypatch.setitem(quality.PUBLISHED, pair, (3.25, *[0.0] * 7))
    _, rows = sweep(ROWS)
    assert [(row["published_tau_per_answer"], row["difference"]) for row in rows] == [(3.25, 0.25), (None, None)]
    shown = capsys.readouterr().out
    assert "+0.25" in shown and "Domino-Tree" in shown
    _, rows = sweep(ROWS, "--drafts", "2", "4", "--no-head-off", "--limit-prompts", "2", "--batch-sizes", "2")
    assert [(row["drafts"], row["published_tau_per_answer"]) for row in rows] == [(2, None), (4, None)]
    assert [row["tau"] for row in rows] == pytest.approx([(4 * 2 + 3 * 3) / 7, 3])
    assert "length_4" not in rows[0] and rows[0]["prompts"] == 2


def test_sampled_answers_have_no_published_figure(sweep, models, monkeypatch):
    monkeypatch.setitem(quality.PUBLISHED, (str(models / "target"), str(models / "draft")), (3.25, *[0.0] * 7))
    _, rows = sweep(ROWS[:1], "--temperature", "0.5", "--no-head-off")
    assert [(row["mode"], row["tokens"], row["published_tau_per_answer"]) for row in rows] == [("domino", 9, None)]


@pytest.mark.parametrize(
    ("model", "draft", "name", "figure"),
    [
        ("qwen3-4b", None, "GSM8K", 10.23),
        ("Qwen/Qwen3-8B", "qwen3-8b", "mt_bench", 5.14),
        ("qwen3-8b", "z-lab/Qwen3-8B-DFlash-b16", "math-500", 7.58),
        ("qwen3-8b", "qwen3-4b", "gsm8k", None),
        ("Qwen/Qwen3-4B", None, "gsm8k", 10.23),
        ("demo", None, "gsm8k", None),
        ("qwen3-4b", None, "mine", None),
    ],
)
def test_published_figures_go_by_name(model, draft, name, figure):
    assert quality.published(model, draft, name) == figure


@pytest.fixture
def asked(monkeypatch) -> list[list[int]]:
    """The prompts that the engine is given."""
    seen: list[list[int]] = []
    generate = Engine.generate

    def spy(self, sequences, *rest, **named):
        seen.extend(s.prompt for s in sequences)
        return generate(self, sequences, *rest, **named)

    monkeypatch.setattr(Engine, "generate", spy)
    return seen


TURNS = [{"turns": ["Hi", "So"]}, {"turns": ["One"]}]


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("target", "first", "second"),
    [
        ("target", "Hi", "Hi" + "i" * 9 + "\n\nSo"),
        (
            "chat",
            "<|im_start|>user:Hi<|im_end|><|im_start|>assistant:",
            f"<|im_start|>user:Hi<|im_end|><|im_start|>assistant:{':' * 9}<|im_end|>"
            "<|im_start|>user:So<|im_end|><|im_start|>assistant:",
        ),
    ],
)
def test_a_second_turn_follows_the_models_own_answer(sweep, models, asked, target, first, second):
    from transformers import AutoTokenizer

    status, rows = sweep(TURNS, "--no-head-off", "--batch-sizes", "2", target=target)
    tokenizer = AutoTokenizer.from_pretrained(models / target)
    one = first.replace("Hi", "One")
    assert [tokenizer.decode(prompt) for prompt in asked] == [first, one, second]
    assert status == 0
    assert (rows[0]["prompts"], rows[0]["answers"], rows[0]["tau"], rows[0]["cycles"]) == (2, 3, 2.0, 12)
    assert rows[0]["tau_first_turn"] == 2.0


@pytest.mark.e2e
@pytest.mark.slow
def test_prompts_that_are_too_long_are_counted_and_limits_warned_of(sweep, capsys):
    room = BYTE_TARGET.max_position_embeddings
    long = {"input_ids": [70] * (room + 1)}
    rows = [long, {"input_ids": [70] * (room - 3)}, {"turns": ["a" * 240, "b" * 10]}]
    status, figures = sweep(rows, "--no-head-off")
    assert status == 0
    assert [(r["questions"], r["prompts"], r["too_long"], r["answers"]) for r in figures] == [(3, 2, 2, 2)]
    assert figures[0]["tokens"] == 4 + 9
    errors = capsys.readouterr().err
    assert "too long for the model, left out: 2." in errors and "less room than --new-tokens: 1." in errors


@pytest.mark.e2e
def test_ctrl_c_leaves_the_batches_before(sweep, tmp_path, monkeypatch, capsys):
    generate, calls = Engine.generate, []

    def interrupted(self, *rest, **named):
        calls.append(1)
        if len(calls) == 4:  # the second batch, its second way of decoding
            raise KeyboardInterrupt
        return generate(self, *rest, **named)

    monkeypatch.setattr(Engine, "generate", interrupted)
    status, rows = sweep(ROWS)
    assert status == 130
    assert [(r["mode"], r["questions"], r["prompts"], r["tau"]) for r in rows] == [
        ("domino", 3, 1, 2.0),
        ("dflash", 3, 1, 2.0),
    ]
    captured = capsys.readouterr()
    assert "interrupted after 1 of 3 questions of gsm8k" in captured.err and "gsm8k, domino 4" in captured.out


@pytest.mark.parametrize(
    ("rows", "more", "target", "status", "says"),
    [
        ("", [], "target", 1, "has no questions"),
        ('{"prompt": "a"}\n{"prompt"', [], "target", 1, "set.jsonl, line 2 is not JSON"),
        ("3", [], "target", 1, "is not a JSON object but a number"),
        ([{"frage": "Wie?", "n": 1}], [], "target", 1, "set.jsonl, line 1 is a question of no known format"),
        ([{"frage": "Wie?", "n": 1}], [], "target", 1, "its fields are frage (text), n (a number)"),
        ([{"input_ids": []}], [], "target", 1, "line 1 has no token in its input_ids"),
        ([{"input_ids": ["5"]}], [], "target", 1, "line 1: input_ids must be token ids"),
        ([{"messages": []}], [], "target", 1, "line 1 has no message"),
        ([{"turns": ["a", 1]}], [], "target", 1, "no known format"),
        ([{"instruction": "a", "input": 1}], [], "target", 1, "no known format"),
        ([{"prompt": "a", "max_new_tokens": 0}], [], "target", 1, "max_new_tokens 0"),
        ([{"input_ids": [260]}], [], "target", 1, "line 1: the prompt has id 260, outside the vocabulary"),
        ([{"input_ids": [5] * 257}], [], "target", 1, "no prompt that fits the model's 256 positions"),
        ([{"prompt": "a"}], [], "bare", 1, "line 1: this is text, and the model's folder has no tokenizer"),
        ([{"messages": [{"role": "user", "content": "a"}]}], [], "target", 1, "no chat template"),
        (ROWS, ["--num-prompts", "2"], "target", 2, "--num-prompts is for measuring speed"),
        (ROWS, ["--batch-sizes", "1", "2"], "target", 2, "one batch size, found 2"),
        (ROWS, ["--limit-prompts", "0"], "target", 2, "--limit-prompts must be at least 1"),
        (ROWS, ["--draft", "none"], "target", 1, "--quality measures a drafter"),
        (ROWS, ["--quality", "a=b.jsonl"], "target", 1, "b.jsonl can't be read"),
        (ROWS, ["--quality", "=b.jsonl"], "target", 1, "needs a name of its own"),
        (ROWS, ["--quality"], "target", 2, "--perplexity need --quality"),
    ],
)
def test_refusals(sweep, capsys, rows, more, target, status, says):
    more = [*more, "--lean"] if more == ["--quality"] else more
    assert sweep(rows, *more, target=target)[0] == status
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_two_sets_of_one_name_are_refused(models, tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", ROWS)
    words = ["--model", str(models / "target"), "--draft", str(models / "draft")]
    assert main([*words, "--quality", str(file), f"a={file}"]) == 1
    assert "needs a name of its own" in capsys.readouterr().err


def test_forms_of_a_target_stand_side_by_side(sweep, models, tmp_path, capsys):
    """τ of each with the same drafter, answers that are the first form's, and each one's perplexity."""
    text = write(tmp_path / "text.txt", "what a text says" * 32)
    words = ["--forms", "int8", str(models / "chat"), "--perplexity", str(text), "--no-head-off"]
    status, rows = sweep(ROWS[:2], *words)
    assert status == 0
    forms = ["exact", "int8", str(models / "chat")]
    assert [(row["target_weights"], row["mode"]) for row in rows] == [(form, "domino") for form in forms]
    assert [row["same_answers_as_first_form"] for row in rows] == [None, 2, 2]
    likely = {row["target_weights"]: row["perplexity"] for row in rows}
    assert likely["exact"] == likely[str(models / "chat")] != likely["int8"]
    loaded = load_model(models / "target")
    config = loaded.configs.target
    windows = jnp.asarray(text_ids(text, loaded)).reshape(2, config.positions)

    @jax.jit
    def logits(params, tokens):
        return target.logits(params, config, target.forward(params, config, tokens)[0])

    told = np.asarray(jax.nn.log_softmax(logits(loaded.params.target, windows)))[:, :-1]
    surprise = -np.take_along_axis(told, np.asarray(windows)[:, 1:, None], axis=-1)
    assert rows[0]["perplexity_tokens"] == windows.size
    assert likely["exact"] == pytest.approx(np.exp(surprise.mean()), rel=1e-4)
    out = capsys.readouterr().out
    assert "as exact" in out and "perplexity" in out and "gsm8k, int8, domino 4" in out


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--forms", "exact"], 2, "--forms exact is none beside --weights auto"),
        (["--forms", "int8", "--weights", "int8"], 2, "--forms int8 is none beside --weights int8"),
        (["--forms", "int4"], 2, "--forms int4 is none"),
        (["--forms", "int8", "int8"], 2, "--forms names one twice"),
        (["--perplexity", "missing.txt"], 1, "missing.txt can't be read as text"),
        (["--forms", "nowhere"], 1, "nowhere"),
    ],
)
def test_forms_that_can_not_be_compared(sweep, capsys, words, status, says):
    assert sweep(ROWS, *words)[0] == status
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_a_form_of_another_model_is_refused(sweep, tmp_path, capsys):
    make_target(tmp_path / "other", num_hidden_layers=3)
    status, _ = sweep(ROWS, "--forms", str(tmp_path / "other"))
    assert status == 1 and "made for another target" in capsys.readouterr().err


def test_forms_and_texts_need_questions(capsys):
    assert main(["--forms", "int8"]) == 2 and main(["--perplexity", "x"]) == 2
    assert "--forms and --perplexity need --quality" in capsys.readouterr().err
