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


# What an author may write in a caption to get out of a page; none of it may run, load, style or hide anything.
HOSTILE_TEXTS = (
    '<script>document.title = "taken"; window.taken = 1</script>',
    '"><img id=taken src=x onerror="window.taken = 2">',
    '\'--></title></style></svg></bdi><svg id=taken onload="window.taken = 3">',
    "<style>body { display: none }</style><base href=https://example.invalid><meta http-equiv=refresh content=0>",
    "{{ 7 * 191 }}{% include 'secret' %}",
    "a file named \u202egnp.exe\u202c, \u2066hidden\u2069 and \u200b\ufeff",
    "\x1b[31mred\x07 \x7f \x85 \u2028 end",
    "&lt;script&gt; &amp; &#x3C;img&#x3E;",
)

# Beginning of a script that looks at contrasts (WCAG 2.2): `texts` are the elements that show text, `light` gives the
# relative luminance of a colour, `behind` the colour that an element stands on, `ratio` the contrast of two luminances.
LOOK = """
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => numbers(colour).slice(0, 3).map(level => level / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if ((numbers(colour)[3] ?? 1) === 1) return colour;
    }
  };
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const texts = [...document.body.querySelectorAll("*")].filter(e => !e.closest("title, defs") && e.checkVisibility()
    && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
"""
OUTSIDE = """[...document.body.querySelectorAll("*")].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width > 1 && (box.left < -0.5 || box.right > innerWidth + 0.5);
}).map(e => e.outerHTML.slice(0, 100))"""
# Tries what the policy forbids and gives the directives that stopped it.
INJECTED = """new Promise(done => {
  const blocked = new Set();
  document.addEventListener("securitypolicyviolation", e => {
    blocked.add(e.effectiveDirective);
    if (blocked.size === 5) done([...blocked].sort());
  });
  document.body.insertAdjacentHTML("beforeend",
    "<iframe src='https://example.invalid'></iframe><img src='https://example.invalid/x.png'>" +
    "<p style='color: red' onclick='window.taken = 4'></p>");
  document.body.lastElementChild.click();
  document.body.append(Object.assign(document.createElement("script"), {textContent: "window.taken = 5"}));
  setTimeout(() => done([...blocked].sort()), 5000);
})"""
STOPPED = ["frame-src", "img-src", "script-src-attr", "script-src-elem", "style-src-attr"]


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


def opened(browser: Browser, page: Path, theme: str = "light", width: int = 1400) -> None:
    """Shows a page with everything on it unfolded."""
    browser.show(page, theme, width)
    browser.run("document.querySelectorAll('details').forEach(e => { e.open = true })")
