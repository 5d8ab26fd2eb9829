"""Readers of files that others wrote, on changed and random content: a `ConfigError` of one line, or an answer.

`STEP37_FUZZ_EXAMPLES` sets the number of examples of each reader (default 40).
"""

from __future__ import annotations

import copy
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis (extra `test`)")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step37_lit.chat_template import ChatTemplate
from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError
from step37_lit.hub.config_json import parse_hub_config
from step37_lit.hub.config_writer import LAYOUTS, hub_config, preprocessor_config
from step37_lit.hub.safetensors_file import SafetensorsFile
from step37_lit.hub.safetensors_folder import INDEX_FILE, SafetensorsFolder
from step37_lit.tokenizer import Step37Tokenizer
from tests.hub_folders import every_feature, write_hub

EXAMPLES = int(os.environ.get("STEP37_FUZZ_EXAMPLES", "40"))
MEMORY = 200 * 2**20  # bytes that a reader may take for a few kB of input
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,  # no timed assertion: other work on the machine must not fail a test
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)

NUMBERS = st.one_of(
    st.integers(), st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30, 1e308, -0.5, float("inf"), float("nan")])
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)
DEEP = "[" * 100_000 + "]" * 100_000


def answers_or_refuses(read: Callable[[], Any]) -> None:
    """No other exception, a message that can be read, and no more memory than a few kB of input may take."""
    tracemalloc.start()
    try:
        read()
    except (ConfigError, FileNotFoundError) as error:
        assert len(str(error)) < 5_000
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MEMORY, peak


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every place in nested objects and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, entry in inner for place in places(entry, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, original: Any) -> str:
    """JSON of `original` with some places set to something else, taken out, or with a few characters changed."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(places(value)[1:] or [("new",)]))
        place = value
        for key in path:
            place = place[key]
        if draw(st.booleans()):
            place[last] = draw(VALUES)
        elif not isinstance(place, dict) or last in place:
            del place[last]
    text = json.dumps(value)
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(["", "{", "[", '"', "\\ud800", "1" * 5000, DEEP])) + text[at + 1 :]
    return text


CONFIGS = [hub_config(every_feature(), layout, torch.bfloat16) for layout in LAYOUTS]
CONFIGS.append(hub_config(Step37Config.preset("tiny"), "hub", torch.float32))


@fuzz
@given(st.sampled_from(CONFIGS).flatmap(changed), st.one_of(st.none(), changed(preprocessor_config(every_feature()))))
def test_config_json(text: str, processor: str | None) -> None:
    beside = {} if processor is None else {"preprocessor_config.json": processor.encode()}
    answers_or_refuses(lambda: parse_hub_config(text.encode("utf-8", "surrogatepass"), Path("config.json"), beside))


@fuzz
@given(st.binary(max_size=300) | st.just(DEEP.encode()))
def test_config_json_of_any_bytes(content: bytes) -> None:
    answers_or_refuses(lambda: parse_hub_config(content, Path("config.json"), {"tokenizer.json": content}))


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "empty": {"dtype": "F16", "shape": [0, 7], "data_offsets": [32, 32]},
}


@fuzz
@given(changed(HEADER), st.integers(-9, 9), st.booleans())
def test_safetensors_header(tmp_path_factory: pytest.TempPathFactory, text: str, off: int, honest: bool) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    content = text.encode("utf-8", "surrogatepass")
    length = max(0, len(content) + (0 if honest else off))
    file.write_bytes(length.to_bytes(8, "little") + content + bytes(32 if honest else max(0, 32 + off)))
    answers_or_refuses(lambda: SafetensorsFile(file).close())


@fuzz
@given(st.binary(max_size=100))
def test_safetensors_of_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    file.write_bytes(content)
    answers_or_refuses(lambda: SafetensorsFile(file).close())


@pytest.mark.parametrize("length", [2**63 - 1, 2**64 - 1, 100_000_000, 90_000_000])
def test_safetensors_with_a_huge_header(tmp_path: Path, length: int) -> None:
    file = tmp_path / "huge.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{}")
    answers_or_refuses(lambda: SafetensorsFile(file).close())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded") / "hub"
    write_hub(folder, every_feature())
    return folder, json.loads((folder / INDEX_FILE).read_text())


@fuzz
@given(data=st.data())
def test_index(sharded: tuple[Path, dict[str, Any]], data: st.DataObject) -> None:
    folder, index = sharded
    few = {"metadata": index["metadata"], "weight_map": dict(list(index["weight_map"].items())[:8])}
    text = data.draw(changed(few) | changed(index))
    (folder / INDEX_FILE).write_bytes(text.encode("utf-8", "surrogatepass"))

    def read() -> None:
        with SafetensorsFolder(folder) as opened:
            assert opened.names() == set(index["weight_map"])

    answers_or_refuses(read)


TOKENIZER = Step37Tokenizer.train(["a red square", "a blue circle"], 300).content


@fuzz
@given(changed(json.loads(TOKENIZER)) | st.binary(max_size=100))
def test_tokenizer(tmp_path_factory: pytest.TempPathFactory, content: str | bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "tokenizer.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    answers_or_refuses(lambda: Step37Tokenizer.from_file(file))


PIECES = [
    "{{ messages }}", "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{% if m.role == 'user' %}",
    "{% endif %}",
    "{{ m.content * 10**12 }}", "{{ 10**10**10 }}", "{% for i in range(10**5) %}", "{% macro f() %}", "{% endmacro %}",
    "{{ f() }}", "{% set x = x ~ x %}", "{% set x = 'ab' %}", "{{ x|center(10**9) }}", "{{ ''.__class__.__mro__ }}",
    "{{ cycler }}", "{{ 'a'.ljust(10**9) }}", "{% set ns = namespace(a='aa') %}", "{% set ns.a = ns.a + ns.a %}",
    "{{ ''.join(x) }}", "{{ x|replace('a', x) }}", "{% include 'x' %}", "{{", "}}", "{% raw %}", "\ud800", "{{ 1/0 }}",
    "{{ messages[9].x.y }}", "{{ raise_exception('no') }}", "{{ lipsum(n=10**9) }}", "{{ '%999999999d' % 1 }}",
]  # fmt: skip
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@fuzz
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=12).map("".join))
def test_chat_template(text: str) -> None:
    answers_or_refuses(lambda: ChatTemplate(text).render(messages=MESSAGES, bos_token="<", eos_token=">"))


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macro": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "product": "{{ 'a' * 10**12 }}",
    "power": "{{ 9 ** 9 ** 9 ** 9 }}",
    "doubling": "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "adding": "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "block": "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"
    "{% endfor %}",
    "width": "{{ 'a'.ljust(10**12) }}",
    "join": "{{ ('a' * 10**6).join(['b'] * 10**6) }}",
    "replace": "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_templates(name: str) -> None:
    with pytest.raises(ConfigError, match=r"more than|too large|is unsafe|endless recursion") as refused:
        ChatTemplate(ENDLESS[name]).render(messages=MESSAGES)
    assert "\n" not in str(refused.value)


def test_templates_still_do_what_they_need() -> None:
    text = (
        "{% set x = 'a' ~ 'b' %}{{ x ~ 'c' }}{{ ['1', '2']|join('-') }}{{ '+'.join(['1', '2']) }}"
        "{{ 'abc'.replace('b', 'x') }}{% set y %}k{% endset %}{{ y }}{{ 'abc'|replace('a', 'b') }}"
        "{{ 7 % 4 }}{{ 2 ** 3 }}"
        "{% for m in messages %}{{ loop.index }}{{ m['content']|trim }}{% if not loop.last %},{% endif %}{% endfor %}"
    )
    assert ChatTemplate(text).render(messages=MESSAGES) == "abc1-21+2axckbbc381hi,2ho"
