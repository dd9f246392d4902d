"""The page at `/`, in headless Chromium, against a server with canned answers."""

import json
import re
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser, Tab

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "infer" / "serve" / "page.html"
MODEL = {"id": "qwen3-8b", "chat": True, "thinking": True, "drafter": "Domino"}
EVIL = '<img src=x onerror="window.ran = true"><script>window.ran = true</script>'
USAGE = {"completion_tokens": 23, "domino": {"tau": 4.31, "tokens_per_second": 71.25, "cycles": 3, "plain_steps": 1}}
SLOW = {"completion_tokens": 23, "domino": {"tau": None, "tokens_per_second": 28.5, "cycles": 0, "plain_steps": 22}}
chromium = [pytest.mark.e2e, pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")]


def cycle(accepted: str, rejected: str, own: str, m: int, j: int = 7) -> dict[str, Any]:
    """A cycle as the server tells it."""
    texts = {"accepted": accepted, "rejected": rejected, "target": own}
    pieces = [{"text": text, "origin": origin} for origin, text in texts.items() if text]
    return {"pieces": pieces, "accepted": m, "proposed": j, "tokens": m + 1}


def plain(text: str, tokens: int = 1) -> dict[str, Any]:
    """Plain steps, or the prefill's token."""
    pieces = [{"text": text, "origin": "target"}]
    return {"pieces": pieces, "accepted": 0, "proposed": 0, "tokens": tokens}


# What the server sends of a chat: (reasoning, content, cycles), the thoughts' marks in the drafts alone.
DRAFTED = [
    ("", "", [plain("<think>")]),
    ("The user asks about the sky.", "", [cycle("\nThe user asks about", " a colour", " the sky", 5), plain(".")]),
    ("", "Light of short waves", [cycle("\n</think>\n\nLight of", " blue\ncolour <b>", " short waves", 4)]),
    ("", f" is scattered more. {EVIL}", [cycle(" is scattered", "", " more.", 7), plain(f" {EVIL}", 2)]),
]
STEPS = [
    (
        "",
        f"Light of short waves is scattered more. {EVIL}",
        [plain(f"Light of short waves is scattered more. {EVIL}", 23)],
    )
]


class Fake:
    """A server with the page and canned answers; what it was asked is in `bodies`."""

    def __init__(self) -> None:
        self.model, self.key, self.bodies, self.keys = dict(MODEL), None, [], []
        self.refusal: tuple[int, dict[str, str], Any] | None = None
        self.end = "whole"  # or "error", "cut"
        self.slow = SLOW  # the usage of plain steps
        self.go = threading.Event()  # the rest of the answer waits for it
        self.go.set()
        self.left = threading.Event()
        self.gone = False
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                if self.path == "/":
                    self.answer(200, "text/html; charset=utf-8", PAGE.read_bytes())
                elif self.path == "/v1/models" and self.is_allowed():
                    self.answer(200, "application/json", json.dumps({"data": [fake.model]}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if fake.gone or not self.is_allowed():  # a browser may have connected ahead of time
                    return
                fake.bodies.append((self.path, body))
                if fake.refusal:
                    status, headers, said = fake.refusal
                    self.answer(status, "application/json", json.dumps(said).encode(), headers)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                try:
                    fake.stream(self.wfile, body, "messages" in body)
                except OSError:
                    fake.left.set()

            def is_allowed(self) -> bool:
                fake.keys.append(self.headers.get("Authorization"))
                if fake.key in (None, (fake.keys[-1] or "").removeprefix("Bearer ")):
                    return True
                self.answer(401, "application/json", b'{"error": {"message": "a key is needed."}}')
                return False

            def answer(self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stream(self, out: Any, body: dict[str, Any], chat: bool) -> None:
        """Write an answer, in pieces that cut events and characters."""

        def send(data: Any) -> None:
            # As some proxies do: in pieces that end anywhere, and with characters unescaped.
            raw = f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
            for part in (raw[: len(raw) // 2], raw[len(raw) // 2 :]):
                out.write(part)
                out.flush()

        rows = DRAFTED if body.get("speculative", True) else STEPS
        for number, (reasoning, content, cycles) in enumerate(rows):
            choice: dict[str, Any] = {"index": 0, "finish_reason": None, "drafts": cycles}
            if chat:
                choice["delta"] = {"content": content} if content else {}
                if reasoning:
                    choice["delta"] |= {"reasoning": reasoning, "reasoning_content": reasoning}
            else:
                choice["text"] = reasoning + content
            send({"choices": [choice], "usage": None})
            if number == 2:
                while not self.go.wait(0.02):
                    out.write(b": still at work\n\n")
        if self.end == "error":
            send({"error": {"message": "the drafts are not finite."}})
        if self.end != "whole":
            return
        ending = {"index": 0, "finish_reason": "stop", "drafts": [], **({"delta": {}} if chat else {"text": ""})}
        send({"choices": [ending], "usage": None})
        send({"choices": [], "usage": USAGE if rows is DRAFTED else self.slow})
        out.write(b"data: [DONE]\n\n")

    def close(self) -> None:
        self.gone = True
        self.go.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("chromium"))
    yield made
    made.close()


@pytest.fixture
def fake() -> Iterator[Fake]:
    made = Fake()
    yield made
    made.close()


@pytest.fixture
def tab(browser, fake) -> Iterator[Tab]:
    made = browser.open(fake.url)
    made.wait("model")
    yield made
    assert not made.close()


def ask(tab: Tab, text: str, wait: bool = True) -> None:
    """Type a prompt, press Enter, and wait for the answer's end."""
    tab.value("document.getElementById('prompt').focus()")
    tab.write(text)
    tab.press_enter()
    if wait:
        tab.wait("running === null && document.querySelector('.error:not([hidden]), .figures') !== null")


def texts(tab: Tab, selector: str) -> list[str]:
    return tab.value(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")


def click(tab: Tab, name: str) -> None:
    tab.value(f"document.getElementById('{name}').click()")


def test_nothing_foreign_is_fetched_and_no_text_is_read_as_html():
    text = PAGE.read_text(encoding="utf-8")
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|Function\(", text)
    assert not re.findall(r"(?:https?:)?//[\w-]+\.", text) and not re.findall(
        r"<(?:link|script|img)[^>]+(?:src|href)=\"[^d]", text
    )
    assert len(text.splitlines()) < 450 and max(map(len, text.splitlines())) <= 120


def test_the_wheel_has_it():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    assert PAGE in {path for pattern in data["infer"] for path in (ROOT / "infer").glob(pattern)}


class TestInChromium:
    pytestmark = chromium

    def test_an_answer(self, tab, fake):
        """Origins, thoughts, figures, and text that would be harmful as HTML."""
        ask(tab, "Why is the sky blue?")
        assert texts(tab, "article > .text .accepted") == ["Light of", " is scattered"]
        assert texts(tab, "article > .text .rejected") == [" blue↵colour <b>"]
        assert texts(tab, "article > .text .target") == [" short waves", " more.", f" {EVIL}"]
        assert texts(tab, "article > details .target") == [" the sky", "."]
        assert "think>" not in tab.value("document.getElementById('log').textContent")
        assert tab.value("document.querySelector('article details').open") is False
        assert tab.value("document.querySelector('article details').hidden") is False
        assert texts(tab, ".figures")[0].startswith("τ 4.31 · 71.3 tokens/s · 23 tokens · ")
        assert tab.value("window.ran === undefined && document.querySelector('#log img, #log script') === null")
        click(tab, "hide")
        assert tab.value("getComputedStyle(document.querySelector('main .rejected')).display") == "none"
        ((path, body),) = fake.bodies
        assert path == "/v1/chat/completions" and body == {
            "model": "qwen3-8b",
            "messages": [{"role": "user", "content": "Why is the sky blue?"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_drafts": True,
            "speculative": True,
            "chat_template_kwargs": {"enable_thinking": False},
        }

    def test_a_conversation(self, tab, fake):
        """The second turn has the first one's answer without its thoughts; New chat forgets it; settings are sent."""
        ask(tab, "one")
        click(tab, "thinking")
        tab.value("document.querySelector('[name=temperature]').value = '0.6'")
        tab.value("document.getElementById('prompt').focus()")
        tab.write("two")
        tab.press_enter(shift=True)
        assert len(fake.bodies) == 1
        ask(tab, "lines")
        said = "".join(content for _, content, _ in DRAFTED)
        body = fake.bodies[1][1]
        assert [m["content"] for m in body["messages"]] == ["one", said, "two\nlines"]
        assert body["temperature"] == 0.6 and body["chat_template_kwargs"] == {"enable_thinking": True}
        click(tab, "new")
        ask(tab, "three")
        assert len(fake.bodies[2][1]["messages"]) == 1

    def test_figures_are_live_and_stop_ends_the_request(self, tab, fake):
        fake.go.clear()
        ask(tab, "Why?", wait=False)
        figures = tab.wait(
            "document.querySelector('.rejected') && document.querySelectorAll('article .target').length > 2"
            " && document.querySelector('.figures').textContent"
        )
        assert re.match(r"τ 5\.50 · \S+ tokens/s · 13 tokens · ", figures)
        click(tab, "stop")
        tab.wait("running === null")
        assert fake.left.wait(20)
        assert texts(tab, ".error:not([hidden])") == ["Stopped."]
        fake.go.set()
        ask(tab, "And?")
        assert [m["content"] for m in fake.bodies[1][1]["messages"]] == ["Why?", "Light of short waves", "And?"]

    @pytest.mark.parametrize(
        ("status", "headers", "body", "said"),
        [
            (400, {}, {"error": {"message": "seed must be a whole number, found 0.5."}}, "found 0.5. (400)"),
            (429, {"Retry-After": "3"}, {"error": {"message": "64 requests are waiting."}}, "(429; try again in 3 s)"),
            (503, {}, {"error": {"message": "the server is still compiling."}}, "still compiling. (503)"),
            (502, {}, ["a proxy's"], "no reason. (502)"),
        ],
    )
    def test_refusals_are_told_and_the_prompt_comes_back(self, tab, fake, status, headers, body, said):
        fake.refusal = status, headers, body
        ask(tab, "Why?")
        assert said in texts(tab, ".error:not([hidden])")[0]
        assert tab.value("document.getElementById('prompt').value") == "Why?"
        fake.refusal = None
        ask(tab, "")
        assert fake.bodies[1][1]["messages"] == [{"role": "user", "content": "Why?"}]

    @pytest.mark.parametrize(
        ("end", "said"),
        [("error", "the drafts are not finite."), ("cut", "The connection ended before the answer did.")],
    )
    def test_an_answer_that_breaks_off(self, tab, fake, end, said):
        fake.end = end
        ask(tab, "Why?")
        assert texts(tab, ".error:not([hidden])") == [said] and "Light of" in texts(tab, "article > .text")[0]

    def test_a_server_that_is_gone(self, tab, fake):
        fake.close()
        ask(tab, "Why?")
        tab.wait("document.querySelector('.error:not([hidden])') !== null")
        assert "can’t be reached" in texts(tab, ".error:not([hidden])")[0]

    def test_the_key_is_asked_for(self, browser, fake):
        fake.key = "sesame"
        tab = browser.open(fake.url)
        for given, said in (("wrong", "needs its API key"), (fake.key, "does not accept")):
            tab.wait(
                f"document.getElementById('ask').open && document.getElementById('ask-why').textContent"
                f".includes({json.dumps(said)})"
            )
            tab.write(given)
            tab.press_enter()
        tab.wait("model")
        ask(tab, "Why?")
        assert fake.keys == [None, "Bearer wrong", "Bearer sesame", "Bearer sesame"]
        assert not tab.close()

    @pytest.mark.parametrize("thinking", [False, True])
    def test_a_chat_thinks_as_the_server_does_where_nobody_says(self, browser, fake, thinking):
        fake.model["thinking_default"] = thinking
        tab = browser.open(fake.url)
        tab.wait("model")
        assert tab.value("document.getElementById('thinking').checked") is thinking
        ask(tab, "Why?")
        click(tab, "thinking")
        ask(tab, "Why?")
        sent = [body["chat_template_kwargs"]["enable_thinking"] for _, body in fake.bodies]
        assert sent == [thinking, not thinking]
        assert not tab.close()

    def test_a_model_without_a_chat_template(self, browser, fake):
        fake.model |= {"chat": False, "thinking": False}
        tab = browser.open(fake.url)
        tab.wait("model")
        assert "it completes text" in texts(tab, "#about")[0]
        assert tab.value("document.getElementById('thinking-label').hidden")
        ask(tab, "Once upon ")
        ((path, body),) = fake.bodies
        assert (path, body["prompt"], body["max_tokens"]) == ("/v1/completions", "Once upon ", 256)
        assert texts(tab, "article > .text")[0].startswith("Once upon <think>")
        assert not tab.close()

    def test_side_by_side(self, tab, fake):
        click(tab, "compare")
        ask(tab, "Why?")
        assert [body["speculative"] for _, body in fake.bodies] == [True, False]
        assert texts(tab, "article h2") == ["Domino", "Plain"]
        boxes = tab.value(
            "[...document.querySelectorAll('article')].map((e) => e.getBoundingClientRect()).map(({x, y}) => [x, y])"
        )
        assert boxes[0][1] == boxes[1][1] and boxes[0][0] < boxes[1][0]
        assert texts(tab, ".verdict") == ["Domino: 2.50 × plain’s tokens/s. The texts are the same."]
        assert "28.5 tokens/s" in texts(tab, "article:last-child .figures")[0]

    def test_a_plain_side_that_had_drafts_is_not_compared(self, tab, fake):
        """As where others are answered: a batch drafts for all of its rows."""
        fake.slow = {"completion_tokens": 23, "domino": {**USAGE["domino"], "cycles": 2}}
        assert "idle server" in texts(tab, "#compare-label")[0]
        click(tab, "compare")
        ask(tab, "Why?")
        (verdict,) = texts(tab, ".verdict")
        assert "plain had drafts too" in verdict and "×" not in verdict and "The texts are the same." in verdict

    @pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
    def test_a_phone(self, browser, fake, dark):
        """Nothing is wider than it, every control has a name, and every colour can be read."""
        fake.model["id"] = "a-model-with-quite-a-long-name-and-no-space-in-it-at-all"
        tab = browser.open(fake.url, 360, 740, dark)
        tab.wait("model")
        click(tab, "compare")
        tab.value("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
        ask(tab, "long" * 60)
        wide = "[...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > 360.5)"
        assert tab.value(f"{wide}.map((e) => e.outerHTML.slice(0, 99))") == []
        assert tab.value("document.documentElement.scrollWidth") == 360
        nameless = "[...document.querySelectorAll('input, textarea, button')].filter((e) => !(e.labels?.length || 0)"
        assert tab.value(f"{nameless} && !e.textContent.trim()).map((e) => e.outerHTML)") == []
        styles = {}
        for name in ("accepted", "target", "rejected", "figures"):
            found = tab.value(
                f"(({{color, textDecorationLine, textDecorationStyle}}) => [color, textDecorationLine,"
                f" textDecorationStyle])(getComputedStyle(document.querySelector('main .{name}')))"
            )
            styles[name] = tuple(found)
            back = tab.value("getComputedStyle(document.body).backgroundColor")
            assert contrast(found[0], back) >= 4.5, name
        decorations = {found[1:] for name, found in styles.items() if name != "figures"}
        assert len({found[0] for found in styles.values()}) == 4 and len(decorations) == 3
        assert not tab.close()


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, as WCAG has it."""

    def luminance(color: str) -> float:
        parts = [int(n) / 255 for n in re.findall(r"\d+", color)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
