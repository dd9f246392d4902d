"""Headless Chromium for tests, driven by its DevTools protocol over a pipe: no driver and no websocket are needed."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
SECONDS = 20.0  # a busy machine takes long to start it


class Browser:
    """A Chromium process."""

    def __init__(self, profile: Path):
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # It reads its file descriptor 3 and writes 4; those from 10 up are in nobody's way.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        words += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{high[0]} 4>&{high[1]}', CHROMIUM, *words],
            pass_fds=high,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self._read, self._number, self.events = b"", 0, []

    def close(self) -> None:
        """End the process."""
        os.close(self._out)  # it ends with its pipe
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a command of the protocol; events that come meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + SECONDS
        while True:
            *messages, self._read = self._read.split(b"\0")
            for found in map(json.loads, messages):
                if found.get("id") != self._number:
                    self.events.append(found)
                    continue
                assert "error" not in found, (method, found["error"])
                return found["result"]
            if not select.select([self._in], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium has not answered {method}")
            new = os.read(self._in, 1 << 20)
            assert new, "Chromium has ended"
            self._read += new

    def open(self, url: str, width: int = 1100, height: int = 800, dark: bool = False) -> "Tab":
        """A page of some size."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        tab = Tab(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"], target)
        tab.call("Runtime.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        tab.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.call("Emulation.setEmulatedMedia", features=[scheme])
        tab.call("Page.navigate", url=url)
        tab.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")
        return tab


class Tab:
    """A page in the browser."""

    def __init__(self, browser: Browser, session: str, target: str):
        self._browser, self._session, self._target = browser, session, target

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        return self._browser.call(method, self._session, **params)

    def value(self, script: str) -> Any:
        """What a JavaScript expression gives, as JSON."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str) -> Any:
        """What a JavaScript expression gives, as soon as that is truthy."""
        until = time.monotonic() + SECONDS
        while not (found := self.value(script)):
            assert time.monotonic() < until, f"{script} has stayed {found!r}:\n{self.value('document.body.innerText')}"
            time.sleep(0.02)
        return found

    def write(self, text: str) -> None:
        """Text, to what has the focus."""
        self.call("Input.insertText", text=text)

    def press_enter(self, shift: bool = False) -> None:
        """The Enter key."""
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def screenshot(self, path: Path) -> None:
        """A picture of what is seen."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> list[Any]:
        """Close the page; returns the exceptions that no script has caught."""
        self.value("0")
        thrown = [e["params"] for e in self._browser.events if e["method"] == "Runtime.exceptionThrown"]
        self._browser.events.clear()
        self._browser.call("Target.closeTarget", targetId=self._target)
        return thrown
