"""The inspector's page in a browser: bars, themes, widths, names, and texts that want to get out."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import INJECTED, LOOK, OUTSIDE, STOPPED, Browser, opened
from inspected_sets import CAPTIONS, KEYS, MAX_LENGTH, SHARD, MadeSet, hostile_set, plain_set

from datamodules.inspector import inspect as inspector
from step37_lit.pages.render import visible

TITLE = "hostile: shards and packs"
CONTRASTS = (
    f"(() => {{{LOOK}"
    + """
  const shapes = [...document.querySelectorAll("rect:not(.padding), circle")];
  const of = (e, name) => [ratio(light(getComputedStyle(e)[name]), light(behind(e))), e.outerHTML.slice(0, 80)];
  return {
    texts: texts.map(e => of(e, e instanceof SVGElement ? "fill" : "color")),
    shapes: shapes.map(e => of(e.closest("section").querySelector("h2") && e, "fill")),
  };
})()"""
)
FACTS = """Object.fromEntries([...document.querySelectorAll("dl div")].map(
  e => [e.querySelector("dt").textContent, e.querySelector("dd").textContent]).reverse())"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> MadeSet:
    return plain_set(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> MadeSet:
    return hostile_set(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def pages(plain: MadeSet, hostile: MadeSet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    shown = {"plain": (plain, 5, 12), "hostile": (hostile, 24, 48)}
    return {
        name: inspector.inspect_set(made.module, folder / f"{name}.html", packs, thumbnails)
        for name, (made, packs, thumbnails) in shown.items()
    }


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["plain", "hostile"])
def test_contrast(browser: Browser, pages: dict[str, Path], name: str, theme: str) -> None:
    opened(browser, pages[name], theme)
    found = browser.run(CONTRASTS)
    assert len(found["texts"]) > 100 and len(found["shapes"]) > 50
    assert [text for text in found["texts"] if text[0] < 4.5] == []
    assert [shape for shape in found["shapes"] if shape[0] < 3] == []
    dark = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, dark[4:-1].split(","))) < 200) == (theme == "dark")


@pytest.mark.parametrize("width", [320, 400, 768, 1400])
@pytest.mark.parametrize("name", ["plain", "hostile"])
def test_nothing_is_wider_than_the_window(browser: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    opened(browser, pages[name], width=width)
    inside, needed = browser.run("(e => [e.clientWidth, e.scrollWidth])(document.documentElement)")
    assert needed == inside and width - 20 <= inside <= width  # a scroll bar at the right
    assert browser.run(OUTSIDE) == []


@pytest.mark.parametrize("name", ["plain", "hostile"])
def test_loads_nothing_and_complains_about_nothing(browser: Browser, pages: dict[str, Path], name: str) -> None:
    opened(browser, pages[name])
    asked = [event["request"]["url"] for event in browser.told("Network.requestWillBeSent")]
    assert asked[0] == pages[name].as_uri() and all(url.startswith("data:image/jpeg;") for url in asked[1:])
    assert browser.told("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown") == []
    shown = browser.run("[...document.images].map(e => e.complete && e.naturalWidth)")
    assert shown == [112] * len(shown) and len(shown) > 10
    assert (
        browser.run("document.querySelectorAll('link:not([href=\"data:,\"]), script, iframe, object, embed').length")
        == 0
    )


def test_policy_is_in_force(browser: Browser, pages: dict[str, Path]) -> None:
    """Even text that was not escaped could neither run nor load nor style anything."""
    opened(browser, pages["plain"])
    assert browser.run(INJECTED) == STOPPED
    assert browser.run("typeof window.taken") == "undefined"


def test_header_and_bars_are_the_index_and_the_plan(browser: Browser, pages: dict[str, Path], plain: MadeSet) -> None:
    opened(browser, pages["plain"])
    index, plan = plain.index, plain.module.planner.plan(0)
    facts = browser.run(FACTS)
    size = sum(shard.size for shard in index.shards) / 1000
    expected = {
        "Shards": "2", "Samples": "42", "Texts": "122", "Pictures": "42", "Bad samples": "0", "Size": f"{size:.1f} kB",
        "Fingerprint": plain.module.sets("train")[0].fingerprint, "Packs": str(plan.num_packs),
        "Global steps": str(plan.num_steps), "Samples packed": str(len(plan.entries)), "Multicrop": "on",
    }  # fmt: skip
    assert {name: facts[name] for name in expected} == expected
    bars = browser.run("""[...document.querySelectorAll("svg.bar")].map(bar => ({
      samples: [...bar.querySelectorAll("g.sample title")].map(e => e.textContent.split("\\n")[0]),
      positions: [...bar.querySelectorAll("rect")].reduce((sum, e) => sum + e.width.baseVal.value, 0),
      end: Math.max(...[...bar.querySelectorAll("rect")].map(e => e.x.baseVal.value + e.width.baseVal.value)),
      borders: bar.querySelectorAll(".border").length,
      padding: bar.querySelectorAll(".padding").length,
      rows: bar.closest("details").querySelectorAll("tbody tr").length,
      height: bar.getBoundingClientRect().height, width: bar.getBoundingClientRect().width}))""")
    assert len(bars) == 5
    shards = plain.module.sets("train")[0]
    for number, bar in enumerate(bars):
        keys = [shards.key(sample, variant) for _, sample, variant in plan.pack(number)]
        assert bar["samples"] == keys and bar["rows"] == len(keys)
        assert bar["positions"] == bar["end"] == MAX_LENGTH
        assert bar["borders"] == len(keys) - 1 + bar["padding"]
        assert bar["height"] >= 18 and bar["width"] > 500
    assert browser.run("document.querySelectorAll('#bad table').length") == 0
    assert "None: all 42 samples" in browser.run("document.querySelector('#bad').textContent")


def test_pictures_have_names(browser: Browser, pages: dict[str, Path]) -> None:
    opened(browser, pages["plain"])
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    names = [node["name"]["value"] for node in nodes if node.get("role", {}).get("value") == "image"]
    images, bars = browser.run("document.images.length"), [name for name in names if name.startswith("Pack ")]
    assert len(names) == images + len(bars) + 2 and len(bars) == 5 and all(names)
    (lengths,) = [name for name in names if name.startswith("Histogram of token lengths: ")]
    assert "median" in lengths and len([name for name in names if name.startswith("Scatter plot of picture")]) == 1
    headings = {node["name"]["value"] for node in nodes if node.get("role", {}).get("value") == "heading"}
    assert {"plain", "Packs of the first epoch", "Token lengths", "Bad samples"} <= headings


def test_hostile_texts_are_shown_and_do_nothing(browser: Browser, pages: dict[str, Path], hostile: MadeSet) -> None:
    opened(browser, pages["hostile"])
    assert browser.run("[document.title, typeof window.taken, document.querySelectorAll('#taken').length]") == [
        TITLE, "undefined", 0,
    ]  # fmt: skip
    handlers = browser.run("""[...document.querySelectorAll("*")].flatMap(e => [...e.attributes])
      .filter(a => a.name.startsWith("on") || /javascript:/i.test(a.value)).map(a => a.name)""")
    assert handlers == [] and browser.run("[...document.querySelectorAll('style, base')].length") == 1
    said = browser.run("""Object.fromEntries([...document.querySelectorAll(".card")].map(
      e => [e.querySelector("h3").textContent, e.querySelector("mark").parentElement.textContent]))""")
    for i, caption in enumerate(CAPTIONS[:-1]):
        assert visible(caption) in said[f"hostile/caption{i}"]
    assert said[f"hostile/caption{len(CAPTIONS) - 1}"].count("unbroken") < 200
    assert {f"hostile/{visible(key)}" for key in KEYS} <= set(said)
    assert not any(ord(c) < 32 or c in "\u202e\u2066\u2028" for key, text in said.items() for c in key + text)
    rows = browser.run("[...document.querySelectorAll('#bad tbody tr')].map(r => [...r.cells].map(c => c.textContent))")
    assert [row[1] for row in rows] == ["no<u id=taken>text", "broken<i id=taken>"]
    assert all(row[0].endswith(SHARD) for row in rows) and rows[1][2] == "png" and len(rows) == 2
    assert browser.run(FACTS)["Bad samples"] == "2"
