"""What travels with a model beside its weights, and what of it decides where an answer ends and how it is asked."""

import json
from pathlib import Path

import pytest
from factory import END, END_ID, make_draft, make_target

from convert.companions import companions, is_text_file
from convert.folders import convert_folder
from convert.identity import text_fingerprint
from convert.loading import load_model
from convert.tokenizer import end_tokens, load_tokenizer
from domino_jax.errors import DominoError

TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
EXTRA = (
    "additional_chat_templates/tools.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "LICENSE",
    "README.md",
)


@pytest.fixture
def target(tmp_path) -> Path:
    make_target(tmp_path / "target", template=TEMPLATE)
    for name in EXTRA:
        (tmp_path / "target" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "target" / name).write_text("{}")
    return tmp_path / "target"


def test_conversion_there_and_back_keeps_all_that_travels(target, tmp_path):
    names = {file.relative_to(target).as_posix() for file in companions(target)}
    assert names >= {*EXTRA, "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    (target / "training_args.bin").write_text("a pickle")
    (target / "modeling.py").write_text("code")
    convert_folder(target, tmp_path / "orbax")
    convert_folder(tmp_path / "orbax", tmp_path / "back")
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (target / name).read_bytes(), name
    assert not {"training_args.bin", "modeling.py"} & {file.name for file in (tmp_path / "back").rglob("*")}


@pytest.mark.parametrize("name", ["additional_chat_templates/tools.jinja", "chat_template.jinja", "merges.txt"])
def test_what_decides_what_a_model_is_asked_is_in_its_fingerprint(target, name):
    before = text_fingerprint(target)
    (target / name).write_text("other")
    assert text_fingerprint(target) != before and is_text_file(name)


@pytest.mark.parametrize("name", ["model.py", "additional_chat_templates/a.py", "other/x.jinja", "pytorch_model.bin"])
def test_other_files_are_never_asked_for(name):
    assert not is_text_file(name)


@pytest.mark.parametrize("raw", [{}, {"eos_token_id": None}, {"bos_token_id": 1}])
def test_without_an_end_token_in_any_config_the_tokenizers_is_used_with_a_word(tmp_path, raw):
    make_target(tmp_path / "t", eos=None)
    (tmp_path / "t" / "generation_config.json").write_text(json.dumps(raw))
    ids, (warning,) = end_tokens(tmp_path / "t", raw, load_tokenizer(tmp_path / "t"))
    assert ids == (END_ID,) and END in warning and "no eos_token_id" in warning
    assert end_tokens(tmp_path / "t", raw, None) == ((), [])
    loaded = load_model(tmp_path / "t")
    assert loaded.stop_ids == (END_ID,) and warning in loaded.warnings


def test_a_template_in_chat_template_json_alone_is_used(tmp_path):
    make_target(tmp_path / "t")
    older = tmp_path / "t" / "chat_template.json"
    older.write_text(json.dumps({"chat_template": TEMPLATE}))
    messages = [{"role": "user", "content": "hi"}]
    assert load_tokenizer(tmp_path / "t").apply_chat_template(messages, tokenize=False) == "user:hi;"
    (tmp_path / "t" / "chat_template.jinja").write_text("newer")
    assert load_tokenizer(tmp_path / "t").apply_chat_template(messages, tokenize=False) == "newer"
    (tmp_path / "t" / "chat_template.jinja").unlink()
    for wrong in ("{}", '{"chat_template": 3}', "[]", "{half"):
        older.write_text(wrong)
        with pytest.raises(DominoError, match=r"chat_template\.json"):
            load_tokenizer(tmp_path / "t")


def test_a_drafter_has_no_tokenizer_and_its_card_travels(tmp_path):
    make_draft(tmp_path / "draft")
    (tmp_path / "draft" / "README.md").write_text("card")
    convert_folder(tmp_path / "draft", tmp_path / "orbax")
    assert (tmp_path / "orbax" / "README.md").read_text() == "card"


DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (f'{{"version": {DEEP}}}', "nested more than 200 deep"),
        ('{"version": "1.0", ', "can't be read as JSON"),
        ("[1, 2]", "expected a JSON object"),
        ("", "can't be read as JSON"),
        ("\x1f\x8b zipped", "gzip"),
    ],
    ids=["nested", "cut", "a list", "empty", "compressed"],
)
def test_a_file_of_the_tokenizer_that_is_no_json_is_named(tmp_path, file, content, says):
    make_target(tmp_path / "target")
    (tmp_path / "target" / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(DominoError, match=r"^[^\n]*$") as error:
        load_tokenizer(tmp_path / "target")
    assert str(tmp_path / "target" / file) in str(error.value) and says in str(error.value)
