"""The report in a browser: themes, widths, curves, gallery, and texts that want to get out."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import INJECTED, LOOK, OUTSIDE, STOPPED, Browser, opened
from made_runs import CAPTIONS, HOSTILE_KEY, hostile_run, plain_run

from step37_lit.pages.render import visible
from step37_lit.report import write_report
from step37_lit.report.read import read_run

CONTRASTS = (
    f"(() => {{{LOOK}"
    + """
  const bands = [...document.querySelectorAll(".charts rect[class^=band]")].map(e => getComputedStyle(e).fill);
  const least = (e, name) => [
    Math.min(...[behind(e), ...bands].map(b => ratio(light(getComputedStyle(e)[name]), light(b)))),
    e.outerHTML.slice(0, 80)];
  return {
    texts: texts.map(e => [
      ratio(light(getComputedStyle(e)[e instanceof SVGElement ? "fill" : "color"]), light(behind(e))),
      e.outerHTML.slice(0, 80)]),
    shapes: [...[...document.querySelectorAll(".axes .line")].map(e => least(e, "stroke")),
      ...[...document.querySelectorAll(".dot")].map(e => least(e, "fill"))],
    extremes: [...document.querySelectorAll(".levels rect.h0, .levels rect.h6")].map(e =>
      ratio(light(getComputedStyle(e).fill), light(behind(e)))),
  };
})()"""
)
# Tick labels and names of a chart must neither leave its panel nor lie on each other.
CROWDED = """[...document.querySelectorAll(".axes > svg")].filter(e => e.checkVisibility()).flatMap(e => {
  const boxes = [...e.querySelectorAll("text")].map(t => t.getBoundingClientRect());
  const panel = e.closest("section").getBoundingClientRect();
  const cut = boxes.filter(b => b.left < panel.left || b.right > panel.right);
  const hit = boxes.filter((a, i) => boxes.slice(i + 1).some(b =>
    a.left < b.right && b.left < a.right && a.top + 2 < b.bottom - 2 && b.top + 2 < a.bottom - 2));
  return [...cut, ...hit].map(b => `${e.getAttribute("aria-label").slice(0, 60)} ${b.left} ${b.top}`);
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "plain": write_report(plain_run(folder / "plain")),
        "hostile": write_report(hostile_run(folder / "hostile")),
    }


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["plain", "hostile"])
def test_contrast(browser: Browser, pages: dict[str, Path], name: str, theme: str) -> None:
    opened(browser, pages[name], theme)
    found = browser.run(CONTRASTS)
    assert len(found["texts"]) > 200 and len(found["shapes"]) > 10 and len(found["extremes"]) == 2
    assert [text for text in found["texts"] if text[0] < 4.5] == []
    assert [shape for shape in found["shapes"] if shape[0] < 3] == []
    assert min(found["extremes"]) >= 3
    back = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back[4:-1].split(","))) < 200) == (theme == "dark")


@pytest.mark.parametrize("width", [320, 400, 768, 1400])
@pytest.mark.parametrize("name", ["plain", "hostile"])
def test_nothing_is_wider_than_the_window(browser: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    opened(browser, pages[name], width=width)
    inside, needed = browser.run("(e => [e.clientWidth, e.scrollWidth])(document.documentElement)")
    assert needed == inside and width - 20 <= inside <= width  # a scroll bar at the right
    assert browser.run(OUTSIDE) == []
    assert browser.run(CROWDED) == []


@pytest.mark.parametrize("name", ["plain", "hostile"])
def test_loads_nothing_and_complains_about_nothing(browser: Browser, pages: dict[str, Path], name: str) -> None:
    opened(browser, pages[name])
    asked = [event["request"]["url"] for event in browser.told("Network.requestWillBeSent")]
    assert asked[0] == pages[name].as_uri() and all(url.startswith("data:image/jpeg;") for url in asked[1:])
    assert browser.told("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown") == []
    shown = browser.run("[...document.images].map(e => e.complete && [e.naturalWidth, e.naturalHeight])")
    assert shown == ([[160, 120]] * 11 if name == "plain" else [])
    assert browser.run("document.querySelectorAll('.no-picture').length") == (1 if name == "plain" else 11)
    forbidden = "link:not([href=\\'data:,\\']), script, iframe, object, embed, [style]"
    assert browser.run(f"document.querySelectorAll('{forbidden}').length") == 0


def test_policy_is_in_force(browser: Browser, pages: dict[str, Path]) -> None:
    """Even text that was not escaped could neither run nor load nor style anything."""
    opened(browser, pages["plain"])
    assert browser.run(INJECTED) == STOPPED
    assert browser.run("typeof window.taken") == "undefined"


def test_curves_stand_where_their_values_are(browser: Browser, pages: dict[str, Path]) -> None:
    """A dot of CIDEr-D is at its step between the ticks and at its value between the grid's lines."""
    opened(browser, pages["plain"])
    found = browser.run("""(() => {
      const chart = [...document.querySelectorAll(".chart")].find(e => e.querySelector("h3").textContent === "CIDEr-D");
      const middle = e => (b => [(b.left + b.right) / 2, (b.top + b.bottom) / 2])(e.getBoundingClientRect());
      const axes = chart.querySelector(".axes > svg");
      const labels = [...axes.querySelectorAll("text")].map(e => [e.textContent.trim(), ...middle(e)]);
      return {
        labels, dots: [...axes.querySelectorAll(".dot")].map(middle),
        grid: [...axes.querySelectorAll(".grid")].map(e => e.getBoundingClientRect().top),
        titles: [...axes.querySelectorAll(".spot title")].map(e => e.textContent.trim().split(/\\n\\s*/)),
        bands: [...axes.querySelectorAll("[class^=band]")].map(e => e.getBoundingClientRect())
          .map(b => [b.left, b.right]),
        label: axes.getAttribute("aria-label"), legend: chart.querySelector(".legend").textContent.trim(),
      };
    })()""")
    left, right = (next(x for text, x, _ in found["labels"] if text == name) for name in ("step 0", "600"))
    steps = [(x - left) / (right - left) * 600 for x, _ in found["dots"]]
    assert steps == pytest.approx([150, 300, 450, 600], abs=2)
    values = [float(text) for text, x, _ in found["labels"] if x < left - 8]
    slope = (values[-1] - values[0]) / (found["grid"][-1] - found["grid"][0])
    drawn = [values[0] + slope * (y - found["grid"][0]) for _, y in found["dots"]]
    assert drawn == pytest.approx([0.6, 1.2, 1.8, 2.4], abs=0.03)
    assert found["titles"] == [
        [f"step {s}", f"validation: {v}"] for s, v in zip((150, 300, 450, 600), (0.6, 1.2, 1.8, 2.4), strict=True)
    ]
    borders = [(x - left) / (right - left) * 600 for band in found["bands"] for x in band]
    assert borders == pytest.approx([0, 200, 200, 320, 320, 600], abs=2)
    assert "CIDEr-D over steps: validation, last 2.4" in " ".join(found["label"].split())
    assert found["legend"].endswith("2.4")


def test_sections_say_what_the_run_has(browser: Browser, pages: dict[str, Path]) -> None:
    opened(browser, pages["plain"])
    text = browser.run("document.body.innerText")
    assert "finished" in text and "step 600 of 600 in epoch 0" in text and "None was met." in text
    stages = browser.run("[...document.querySelectorAll('.stages bdi')].map(e => e.textContent)")
    assert stages[::2] == ["projector", "text", "everything"]
    rows = browser.run(
        "[...document.querySelectorAll('.results tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    found = {row[0]: row[1:] for row in rows}
    assert found["cider_d"] == ["0.6 step 150", "2.4 step 600", "2.4 step 600"]
    assert found["caption_words"][1] == "–" and found["loss"][1] == "0.3 step 600"
    setup = browser.run("document.querySelector('#setup').innerText")
    assert "Process that wrote this page" in setup and "5.4 MB" in setup and "callbacks.freeze_schedule" in setup
    levels = browser.run("document.querySelectorAll('.heat path').length")
    assert levels > 4 and browser.run("document.querySelectorAll('.heat .spot').length") == 4


def test_captions_stand_side_by_side(browser: Browser, pages: dict[str, Path]) -> None:
    places = "[...document.querySelector('.sample .columns').children].map(e => e.getBoundingClientRect().top)"
    opened(browser, pages["plain"])
    tops = browser.run(places)
    assert len(tops) == 4 and len(set(tops)) == 1
    opened(browser, pages["plain"], width=320)
    assert len(set(browser.run(places))) == 4
    validations = read_run(pages["plain"].parent).validations[""]
    best = max(validations[-1].captions, key=lambda caption: caption.cider_d)
    said = browser.run("""(e => [e.querySelector("h3").textContent,
      ...[...e.querySelectorAll(".columns p, li")].map(p => p.textContent)])(document.querySelector(".sample"))""")
    history = [c.caption for v in validations for c in v.captions if c.key == best.key]
    assert said == [best.key, *best.references, *history]
    marked = browser.run("[...new Set([...document.querySelectorAll('.sample mark')].map(e => e.textContent))]")
    assert marked and set(marked) <= {"red", "green", "blue", "yellow", "pink", "brown", "gray", "cyan"}


def test_hostile_texts_are_shown_and_do_nothing(browser: Browser, pages: dict[str, Path]) -> None:
    opened(browser, pages["hostile"])
    title = browser.run("[document.title, typeof window.taken, document.querySelectorAll('#taken').length]")
    assert title == ["hostile: report of a run", "undefined", 0]
    handlers = browser.run("""[...document.querySelectorAll("*")].flatMap(e => [...e.attributes])
      .filter(a => a.name.startsWith("on") || /javascript:/i.test(a.value)).map(a => a.name)""")
    assert handlers == [] and browser.run("[...document.querySelectorAll('style, base, script')].length") == 1
    said = browser.run("""Object.fromEntries([...document.querySelectorAll(".sample")].map(
      e => [e.querySelector("h3").textContent, e.querySelector(".columns > :last-child p").innerText]))""")
    assert len(said) == len(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        shown = said[visible(f"{HOSTILE_KEY}{i}")]
        expected = "\n".join(visible(line) for line in caption[:720].split("\n"))
        assert shown == (" ".join(expected.split(" ")) if caption else "empty")
    page = browser.run("document.documentElement.outerHTML")
    assert not any(character in page for character in "\u202e\u2066\u2028\u200b\x1b\x07\x7f\x85")
    bad = browser.run(
        "[...document.querySelectorAll('#bad tbody tr')].map(r => [...r.cells].map(c => c.textContent.trim()))"
    )
    assert (
        bad[1] == ["epoch 0, step 1", "s", '<b id=taken>"s".tar', "k" * 90, "png", "broken <i id=taken>"]
        and len(bad) == 3
    )
    assert "</pre><script>window.taken = 5</script>" in browser.run("document.querySelector('pre').textContent")
    assert "2 values not finite, first at step 8" in " ".join(browser.run("document.body.innerText").split())
    assert browser.run("document.querySelectorAll('.state.running').length") == 1
    names = browser.run("[...document.querySelectorAll('.chart h3')].map(e => e.textContent)")
    assert "val/<img id=taken src=x>" in names


def test_pictures_and_charts_have_names(browser: Browser, pages: dict[str, Path]) -> None:
    opened(browser, pages["plain"])
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    names = [node["name"]["value"] for node in nodes if node.get("role", {}).get("value") == "image"]
    charts = browser.run("document.querySelectorAll('.chart').length")
    assert len(names) == charts + 1 + browser.run("document.images.length") and all(names)
    assert len([name for name in names if name.startswith("Picture 1 of unseen-")]) == 11
    headings = {node["name"]["value"] for node in nodes if node.get("role", {}).get("value") == "heading"}
    assert {"plain", "Curves", "Validations", "Captions", "Expert load", "Bad samples", "Setup"} <= headings
