"""Chromium without a window, driven over a pipe by its DevTools protocol (https://chromedevtools.github.io/)."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

# Every name is unknown, so that nothing can be reached even where a page asks for it.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)
DOMAINS = ("Page", "Runtime", "Log", "Network", "Accessibility")


def find_chromium() -> str | None:
    """The browser's path, or None."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next(filter(None, found), None)


class Browser:
    """One tab.

    Args:
        executable: Of Chromium.
        profile: An empty folder.

    Attributes:
        events: What the browser has told so far, as it told it.
    """

    def __init__(self, executable: str, profile: Path):
        (orders, self._orders), (self._answers, answers) = os.pipe(), os.pipe()
        # Chromium reads from descriptor 3 and writes to 4.
        moved = f'exec "$@" 3<&{orders} 4>&{answers}'
        command = ["bash", "-c", moved, "bash", executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, pass_fds=(orders, answers), stdout=quiet, stderr=quiet)
        os.close(orders)
        os.close(answers)
        self._reading = os.fdopen(self._answers, "rb")
        self._numbers = itertools.count(1)
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in DOMAINS:
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._session = {}
        self.call("Browser.close")
        self._process.wait()
        self._reading.close()
        os.close(self._orders)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Result of a method of the protocol. Raises `RuntimeError` where the browser refuses it."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params, **self._session}
        os.write(self._orders, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def show(self, page: Path, theme: str = "light", width: int = 1400) -> None:
        """Opens a file and waits until all of it is there."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def run(self, expression: str) -> Any:
        """Value of a JavaScript expression in the page; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def told(self, *methods: str) -> list[dict[str, Any]]:
        """Parameters of the events of some kinds since the page was opened."""
        return [event["params"] for event in self.events if event["method"] in methods]

    def _next(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self._reading.read(1)) != b"\0":
            if not byte:
                raise RuntimeError(f"the browser ended with exit code {self._process.wait()}")
            message += byte
        return json.loads(message)
