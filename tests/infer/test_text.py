"""Stop strings that are special tokens, or cross them; and those that can't come."""

import json
import random

import pytest
from factory import CHAT_END, CHAT_END_ID, CHAT_START, END, END_ID, MASK, make_tokenizer
from tokenizers import normalizers
from transformers import AutoTokenizer

from infer.text import TextStream, decode, encode, unmatched_stops


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def unnamed(tmp_path_factory):
    """A tokenizer whose special tokens only tokenizer.json knows."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    found = AutoTokenizer.from_pretrained(folder)
    assert CHAT_START not in found.all_special_tokens
    return found


# What the model writes, its stop strings, the text that is given out, and the part that counts as tokens.
CASES = {
    "a token alone": (f"ab{CHAT_START}cd", [CHAT_START], "ab", f"ab{CHAT_START}"),
    "a token among others": (f"ab{MASK}cd{END}e", [CHAT_END, END, "x"], "abcd", f"ab{MASK}cd{END}"),
    "text before a token": (
        f"done{MASK}it, done{CHAT_END}x",
        [f"done{CHAT_END}"],
        "doneit, ",
        f"done{MASK}it, done{CHAT_END}",
    ),
    "text after a token": (
        f"a{CHAT_START}b{CHAT_START}user",
        [f"{CHAT_START}us"],
        "ab",
        f"a{CHAT_START}b{CHAT_START}us",
    ),
    "between two tokens": (
        f"a{CHAT_END}\n{CHAT_START}b",
        [f"{CHAT_END}\n{CHAT_START}"],
        "a",
        f"a{CHAT_END}\n{CHAT_START}",
    ),
    "two tokens": (f"a{CHAT_END}{MASK}{CHAT_END}{CHAT_END}b", [CHAT_END * 2], "a", f"a{CHAT_END}{MASK}{CHAT_END * 2}"),
    "text over a token that is no part of it": (f"a E{MASK}ND b", ["END"], "a ", f"a E{MASK}ND"),
    "the first of two": (f"one{MASK}two", [f"e{MASK}t", "e"], "on", "one"),
    "the first of two kinds": (f"o{MASK}two", ["two", f"{MASK}t"], "o", f"o{MASK}t"),
    "a beginning that comes to nothing": (f"done{MASK}", [f"done{CHAT_END}"], "done", f"done{MASK}"),
    "spelled as text": ("a<|mask|", [MASK], "a<|mask|", "a<|mask|"),
    "a character of several bytes": (f"é{MASK}è{MASK}ü", [f"è{MASK}"], "é", f"é{MASK}è{MASK}"),
}


@pytest.mark.parametrize("named", [True, False], ids=["named", "in tokenizer.json alone"])
@pytest.mark.parametrize("case", CASES)
def test_a_stop_string_is_found_across_special_tokens(tokenizer, unnamed, case, named):
    written, stops, text, counted = CASES[case]
    of = tokenizer if named else unnamed
    tokens = encode(of, written, special=False)
    rng = random.Random(case)
    for _ in range(5):  # however the tokens come, nothing is given out that is then taken back
        stream, used, seen, at = TextStream(of, stops), 0, "", 0
        while at < len(tokens) and not stream.stopped:
            piece = tokens[at : at + rng.randint(1, 4)]
            used, at = used + stream.feed(piece), at + len(piece)
            assert text.startswith(stream.text) and stream.text.startswith(seen)
            seen = stream.text
        stopped = stream.stopped
        stream.finish()
        assert (stream.text, tokens[:used]) == (text, encode(of, counted, special=False))
        assert stopped == (case not in ("a beginning that comes to nothing", "spelled as text"))


def test_without_a_stop_the_text_is_the_decoded_tokens(tokenizer):
    tokens = [random.Random(3).randrange(260) for _ in range(400)]
    stream = TextStream(tokenizer, [f"{MASK}never", "nor this"])
    assert stream.feed(tokens) == 400
    stream.finish()
    assert stream.text == decode(tokenizer, tokens)


@pytest.mark.parametrize(
    "stop", ["END", " x ", "\n\n", "é", "日本", CHAT_END, f"a{CHAT_START}b", f"done{END}", "<|unknown|>"]
)
def test_a_stop_string_that_may_come_is_not_warned_of(tokenizer, stop):
    assert unmatched_stops(tokenizer, [stop], (END_ID, CHAT_END_ID)) == []


@pytest.mark.parametrize(
    ("stop", "says"),
    [
        (f"{CHAT_END}\n{CHAT_START}", "can't come: <|im_end|> in it ends the answer before"),
        (f"{END} ", "can't come: <|endoftext|> in it ends"),
        (f"{CHAT_END}{CHAT_END}", "can't come: <|im_end|> in it ends"),
        ("half \ud83d", "can't come: it is not valid Unicode"),
        ("STOP", "may never come: the tokenizer writes it as 'stop'"),
        ("e\u0301nd", "may never come: the tokenizer writes it as"),
    ],
    ids=ascii,
)
def test_a_stop_string_that_cannot_come_is_warned_of(stop, says):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    (warning,) = unmatched_stops(tokenizer, [stop, "fine"], (END_ID, CHAT_END_ID))
    assert says in warning and warning.startswith("the stop string ")
