"""A browser that is told what to do, over the protocol of its developer tools."""

import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Elsewhere(Exception):  # noqa: N818 (no fault: pages that look again by themselves do so)
    """The page was left while it was asked."""


class Browser:
    """One page of a browser."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._number = itertools.count(1)

    def ask(self, method: str, **parameters: Any) -> Any:
        number = next(self._number)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._connection.recv(timeout=60))
            if answer.get("id") == number:
                if "navigated" in answer.get("error", {}).get("message", ""):
                    raise Elsewhere
                assert "error" not in answer, answer
                return answer["result"]

    def js(self, expression: str) -> Any:
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def goto(self, url: str) -> None:
        assert "errorText" not in self.ask("Page.navigate", url=url), url
        self.until("document.readyState === 'complete'")

    def until(self, expression: str, seconds: float = 120) -> Any:
        """Wait until an expression is true, and return it."""
        end = time.monotonic() + seconds
        while True:
            with suppress(Elsewhere):
                if found := self.js(expression):
                    return found
                assert time.monotonic() < end, f"{expression} never came; the page says: {self.text()[:1500]}"
            time.sleep(0.15)

    def says(self, *parts: str, seconds: float = 120) -> None:
        """Wait until the page says all of this."""
        for part in parts:
            self.until(f"document.body?.textContent.includes({json.dumps(part)})", seconds)

    def text(self) -> str:
        return str(self.js("document.body?.innerText"))

    def click(self, selector: str, text: str = "") -> None:
        """Click the first element of a selector with this text, once it can be."""
        found = (
            f"[...document.querySelectorAll({json.dumps(selector)})]"
            ".find(e => !e.disabled && (e.querySelector('.lineage-name') ?? e).textContent.trim()"
            f".startsWith({json.dumps(text)}))"
        )
        self.until(f"!!{found}")
        before = self.js("performance.timeOrigin")
        self.js(f"{found}.dispatchEvent(new MouseEvent('click', {{bubbles: true, cancelable: true}}))")
        self._before = before

    def follow(self, selector: str, text: str = "") -> None:
        """Click a link, and wait for where it leads."""
        self.click(selector, text)
        self.until(f"performance.timeOrigin !== {self._before} && document.readyState === 'complete'")


@contextmanager
def browser(directory: Path) -> Iterator[Browser]:
    """Start a browser with a profile in a directory, and end it."""
    arguments = ["--remote-debugging-port=0", "--remote-allow-origins=*", f"--user-data-dir={directory}"]
    process = subprocess.Popen(
        [str(CHROMIUM), *QUIET, *arguments, "--window-size=1400,1000", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        said = directory / "DevToolsActivePort"
        end = time.monotonic() + 30
        while not said.is_file() or not said.read_text().strip():
            assert process.poll() is None, "the browser ended"
            assert time.monotonic() < end, "the browser does not start"
            time.sleep(0.05)
        port = said.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
            page = next(each for each in json.load(answer) if each["type"] == "page")
        with connect(page["webSocketDebuggerUrl"], max_size=None) as connection:
            yield Browser(connection)
    finally:
        process.terminate()
        process.wait(20)
