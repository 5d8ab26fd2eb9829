"""The index of a set: what is in it, refreshing it, token lengths, stale shards."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
import webdataset

from datamodules.bad_samples import BadSample
from datamodules.conversations import parse_text
from datamodules.shards.index import BuildCounts, ShardIndex, set_fingerprint
from datamodules.shards.index_build import build_index
from datamodules.shards.index_file import INDEX_FILE, write_index
from datamodules.shards.lengths import add_lengths
from datamodules.shards.reader import ShardReader
from datamodules.shards.storage import Storage
from datamodules.shards.worker_pool import results_in_order
from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError
from step37_lit.processor import DEFAULT_PROMPT, Step37Processor
from step37_lit.tokenizer import Step37Tokenizer
from tests import tars
from tests.indexed_shards import CHAT, TEXTS, flipped, keep_time, small_processor, write_set
from tests.tars import picture, sample, text

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def processor() -> Step37Processor:
    return small_processor()


# ---- what is in an index ----


@pytest.mark.parametrize("writer", ["webdataset", "gnu", "pax", "ustar"])
def test_foreign_shards(writer: str, tmp_path: Path) -> None:
    long = "folder/" * 12 + "long"
    wanted = {
        "one": {"jpg": picture(1), "txt": b"a dog runs\n", "cls": b"3"},
        long: {"png": picture(2, "PNG", (30, 50)), "json": text(caption=" a ring "), "npy": b"x" * 2000},
        "chat": {"1.webp": picture(3, "WEBP"), "0.jpeg": picture(4, size=(9, 8)), "json": CHAT},
    }
    path = tmp_path / "s-000000.tar"
    if writer == "webdataset":
        with webdataset.ShardWriter(str(tmp_path / "s-%06d.tar"), verbose=0) as shards:
            for key, members in wanted.items():
                shards.write({"__key__": key, **members})
    else:
        flat = [(f"{key}.{suffix}", data) for key, members in wanted.items() for suffix, data in members.items()]
        format = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}[writer]
        tars.write(path, tars.tar(flat, format))
    index = build_index(tmp_path)
    assert list(index.keys()) == list(wanted) and list(index.problems()) == []
    assert [index.image_sizes(i) for i in range(3)] == [((40, 30),), ((30, 50),), ((9, 8), (40, 30))]
    assert [[m.suffix for m in index.members(i)] for i in range(3)] == [
        ["txt", "jpg"],
        ["json", "png"],
        ["json", "0.jpeg", "1.webp"],
    ]
    assert index.shards[0].ignored == 2 and index.shards[0].size == path.stat().st_size
    with tarfile.open(path) as archive:
        for i, (key, members) in enumerate(wanted.items()):
            for member in index.members(i):
                info = archive.getmember(f"{key}.{member.suffix}")
                assert (member.offset, member.size) == (info.offset_data, info.size)
            content = ShardReader(index).read(i)
            assert (content.key, content.text) == (key, members[content.text_suffix])
            assert content.images == tuple((m.suffix, members[m.suffix]) for m in index.members(i)[1:])
    texts = [parse_text(c.text_suffix, c.text) for c in map(ShardReader(index).read, range(3))]
    assert [t.authored() for t in texts] == [["a dog runs"], ["a ring"], ["and", "a dog runs"]]
    assert texts[0].variants("What is it?", 1) == [
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": "a dog runs"},
        ]
    ]
    assert texts[2].variants("unused", 2) == [json.loads(CHAT)["messages"]]


def test_any_arrow_reader_opens_it(tmp_path: Path) -> None:
    index = build_index(write_set(tmp_path))
    table = pyarrow.feather.read_table(index.file)
    assert table["key"].to_pylist() == list(index.keys())
    assert table["members"][5].as_py() == [member._asdict() for member in index.members(5)]
    assert table["image_sizes"][5].as_py() == [{"width": 40, "height": 30}]
    assert index.shard_numbers.tolist() == table["shard"].to_pylist() == [0] * 4 + [1] * 4 + [2] * 4
    assert index.shard_numbers.dtype == np.int32 and not index.shard_numbers.flags.owndata


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_the_same_bytes_whatever_the_number_of_workers(policy: str, tmp_path: Path, processor: Step37Processor) -> None:
    write_set(tmp_path, shards=5)
    if policy == "skip":
        tars.write(tmp_path / "s-1.tar", [*sample("1-0"), ("bad.jpg", b"GIF89a"), *sample("2-0")])
    found = []
    for workers in (1, 3):
        (tmp_path / INDEX_FILE).unlink(missing_ok=True)
        index = build_index(tmp_path, policy, workers)  # type: ignore[arg-type]
        add_lengths(index, processor, DEFAULT_PROMPT, policy, workers)  # type: ignore[arg-type]
        found.append((tmp_path / INDEX_FILE).read_bytes())
    assert found[0] == found[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [INDEX_FILE, *(f"s-{i}.tar" for i in range(5))]


def test_progress_goes_to_stderr(tmp_path: Path, processor: Step37Processor, capsys: pytest.CaptureFixture) -> None:
    index = build_index(write_set(tmp_path), show_progress=True)
    add_lengths(index, processor, DEFAULT_PROMPT, show_progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and re.search(r"index .*3/3 shards", shown.err)
    assert re.search(r"lengths .*12/12 samples", shown.err)


def test_the_first_bad_sample_by_shard_is_raised_by_any_number_of_workers(tmp_path: Path) -> None:
    write_set(tmp_path, shards=6)
    for shard in (2, 4):
        tars.write(tmp_path / f"s-{shard}.tar", [("k.jpg", picture())])
    for workers in (1, 3):
        with pytest.raises(BadSample, match=r"^shard s-2.tar, key k: no text member"):
            build_index(tmp_path, workers=workers)


def test_a_killed_worker_is_one_line() -> None:
    def die(job: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with (
        pytest.raises(ConfigError, match=r"--workers: expected processes that live to the end"),
        results_in_order(die, [1, 2, 3], 2) as results,
    ):
        list(results)


# ---- refreshing ----


def test_only_changed_shards_are_read_again(tmp_path: Path, processor: Step37Processor) -> None:
    def counts() -> tuple[int, int, int]:
        counts = build_index(tmp_path).counts
        return counts.shards_read, counts.shards_compared, counts.shards_kept

    write_set(tmp_path)
    assert counts() == (3, 0, 0)
    written = (tmp_path / INDEX_FILE).stat().st_mtime_ns
    assert counts() == (0, 0, 3) and (tmp_path / INDEX_FILE).stat().st_mtime_ns == written
    os.utime(tmp_path / "s-1.tar", ns=(0, 0))
    assert counts() == (0, 1, 2) and counts() == (0, 0, 3)
    write_set(tmp_path / "other")
    tars.write(tmp_path / "s-1.tar", sample("new"))
    shutil.copy(tmp_path / "other" / "s-0.tar", tmp_path / "s-0.tar")  # another time, the same content
    assert counts() == (1, 1, 1)
    tars.write(tmp_path / "s-9.tar", sample("newer"))
    (tmp_path / "s-2.tar").unlink()
    assert counts() == (1, 0, 2)
    index = ShardIndex.open(tmp_path)
    assert list(index.keys()) == ["0-0", "0-1", "0-2", "0-3", "new", "newer"]
    fresh = build_index(shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("*.arrow", "other")))
    assert fresh.table.equals(index.table)


def test_lengths_read_texts_only_and_only_where_there_are_none(tmp_path: Path, processor: Step37Processor) -> None:
    index = build_index(write_set(tmp_path))
    text_bytes = sum(index.members(i)[0].size for i in range(len(index)))
    for i in range(len(index)):  # nothing is left of the pictures, and of all headers
        path, member = Path(index.shard_path(index.shard_of(i))), index.members(i)[0]
        if i % 4 == 0:
            content = bytes(path.stat().st_size)
        original = ShardReader(index).read(i, images=False).text
        content = content[: member.offset] + original + content[member.offset + member.size :]
        if i % 4 == 3:
            keep_time(path, content)
    index = add_lengths(index, processor, DEFAULT_PROMPT, workers=2)
    assert index.counts == BuildCounts(texts_read=12, bytes_read=text_bytes)
    index = add_lengths(index, processor, "What is it?")
    assert index.counts == BuildCounts(texts_read=12, bytes_read=text_bytes)
    assert add_lengths(index, processor, DEFAULT_PROMPT).counts == BuildCounts()

    tars.write(tmp_path / "s-3.tar", sample("new"))
    index = build_index(tmp_path)
    first, second = (set_fingerprint(processor, prompt) for prompt in (DEFAULT_PROMPT, "What is it?"))
    assert set(index.fingerprints) == {first, second} and index.counts.shards_read == 1
    with pytest.raises(ConfigError, match=f"token lengths for fingerprint {first}: expected all; .*found '12 of 13"):
        index.lengths(first)
    index = add_lengths(index, processor, DEFAULT_PROMPT)
    assert index.counts.texts_read == 1
    with pytest.raises(ConfigError, match=r"found '12 of 13 samples'"):
        index.lengths(second)


def test_lengths_are_those_of_the_samples(tmp_path: Path, processor: Step37Processor) -> None:
    write_set(tmp_path, shards=2)
    tars.write(tmp_path / "t.tar", [("c.0.jpg", picture()), ("c.1.png", picture(1, "PNG")), ("c.json", CHAT)])
    index = add_lengths(build_index(tmp_path), processor, "What is it?")
    lengths = index.lengths(set_fingerprint(processor, "What is it?"))
    assert (lengths.offsets.dtype, lengths.values.dtype) == (np.int64, np.int32)
    assert not lengths.offsets.flags.owndata and not lengths.values.flags.owndata
    assert lengths.offsets.tolist() == [*range(0, 17, 2), 17]
    from step37_lit.images import open_image

    for i in range(len(index)):
        content = ShardReader(index).read(i)
        images = [open_image(data) for _, data in content.images]
        variants = parse_text(content.text_suffix, content.text).variants("What is it?", len(images))
        found = lengths.values[lengths.offsets[i] : lengths.offsets[i + 1]].tolist()
        assert found == [len(processor(messages, images)) for messages in variants]


def test_a_text_that_the_template_refuses(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{{ p.text if p.type == 'text' else '<im_patch>' }}{% endfor %}{% endif %}"
        "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = Step37Tokenizer.train(TEXTS, vocab_size=300)
    strict = Step37Processor(tokenizer, Step37Config.preset("tiny"), template)
    plain = Step37Processor(tokenizer, Step37Config.preset("tiny"))
    turns = [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]
    tars.write(tmp_path / "s.tar", [*sample("a"), ("b.json", text(messages=turns)), *sample("c")])
    index = build_index(tmp_path)
    line = r"member json: chat_template: expected messages that it accepts, found 'no system turn'"
    with pytest.raises(BadSample, match=f"^shard s.tar, key b: {line}$"):
        add_lengths(index, strict, DEFAULT_PROMPT)
    assert ShardIndex.open(tmp_path).fingerprints == ()
    index = add_lengths(index, strict, DEFAULT_PROMPT, "skip")
    refused, accepted = (set_fingerprint(p, DEFAULT_PROMPT) for p in (strict, plain))
    assert index.lengths(refused).offsets.tolist() == [0, 2, 2, 4]
    [(i, problem)] = index.problems(refused)
    assert i == 1 and re.fullmatch(line, problem)
    index = add_lengths(index, plain, DEFAULT_PROMPT)
    assert index.lengths(accepted).offsets.tolist() == [0, 2, 3, 5] and list(index.problems(accepted)) == []
    assert list(index.problems()) == []


def test_a_fingerprint_that_is_not_there(tmp_path: Path, processor: Step37Processor) -> None:
    index = build_index(write_set(tmp_path))
    with pytest.raises(
        ConfigError, match=r"those for fingerprint 0123456789abcdef of tokenizer, chat template, .*"
    ) as e:
        index.lengths("0123456789abcdef")
    assert f"`python -m step37_lit index {tmp_path}" in str(e.value) and str(e.value).endswith("found 'none'")
    assert str(e.value).startswith(f"{tmp_path}/index.arrow: token lengths: ")
    index = add_lengths(index, processor, DEFAULT_PROMPT)
    with pytest.raises(ConfigError, match=f"found '{set_fingerprint(processor, DEFAULT_PROMPT)}'$"):
        index.lengths("0123456789abcdef")
    assert set_fingerprint(processor, DEFAULT_PROMPT) != set_fingerprint(processor, "What is it?")


# ---- staleness ----


def test_a_stale_index_is_refused_by_the_shard_s_name(tmp_path: Path) -> None:
    original = write_set(tmp_path / "set")
    build_index(original)

    def refusal(change: str) -> str:
        folder = tmp_path / change.replace(" ", "")
        shutil.copytree(original, folder)  # times are kept
        shard = folder / "s-1.tar"
        if change == "size":
            shard.write_bytes(shard.read_bytes() + bytes(512))
        if change == "content":
            shard.write_bytes(flipped(shard.read_bytes(), 700))
        if change == "missing":
            shard.unlink()
        if change == "new":
            shutil.copy(shard, folder / "s-10.tar")
        if change == "other times":
            for path in folder.glob("*.tar"):
                os.utime(path, ns=(5, 5))
        try:
            ShardIndex.open(folder).check_fresh(Storage())
        except ConfigError as error:
            assert f"; `python -m step37_lit index {folder}` reads it again" in str(error)
            return str(error).removeprefix(f"{folder}/")
        return "accepted"

    size = (original / "s-1.tar").stat().st_size
    assert refusal("nothing") == refusal("other times") == "accepted"
    assert refusal("size").startswith(f"s-1.tar: size of the shard: expected {size} bytes")
    assert refusal("size2").startswith("accepted")
    assert re.match(r"s-1.tar: SHA-256 of the shard: expected [0-9a-f]{64} as indexed", refusal("content"))
    assert re.match(rf"s-1.tar: shard: expected a file of {size} bytes.*found 'none'", refusal("missing"))
    assert re.match(r"s-10.tar: shard: expected one of the 3 in the index.*found 'a new one'", refusal("new"))


def test_a_list_or_a_pattern_says_which_shards_are_new(tmp_path: Path) -> None:
    write_set(tmp_path)
    tars.write(tmp_path / "other.tar", sample("x"))
    for shards, new in (
        (str(tmp_path / "s-*.tar"), "s-7.tar"),
        (str(tmp_path / "s-{0..2}.tar"), None),
        ([tmp_path / "s-0.tar", tmp_path / "s-1.tar"], None),
    ):
        (tmp_path / INDEX_FILE).unlink(missing_ok=True)
        index = build_index(shards)
        index.check_fresh(Storage())  # other.tar is none of them
        tars.write(tmp_path / "s-7.tar", sample("y"))
        if new is None:
            index.check_fresh(Storage())
        else:
            with pytest.raises(ConfigError, match=rf"{new}: shard: expected one of the 3"):
                index.check_fresh(Storage())
        (tmp_path / "s-7.tar").unlink()


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"", "an Arrow file"), (b"ARROW1\0\0" + b"x" * 5000, "an Arrow file"), (None, "the metadata of version 1")],
)
def test_a_file_that_is_no_index(content: bytes | None, found: str, tmp_path: Path) -> None:
    if content is None:
        pyarrow.feather.write_feather(pa.table({"key": ["a"]}), tmp_path / INDEX_FILE, compression="uncompressed")
        found = "the columns"
    else:
        (tmp_path / INDEX_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"index.arrow: index: expected {found}"):
        ShardIndex.open(tmp_path)
    with pytest.raises(
        ConfigError, match=r"index.arrow: index: expected a file; `python -m step37_lit index .* 'none'"
    ):
        ShardIndex.open(tmp_path / "absent" / INDEX_FILE)


def test_an_index_cut_anywhere_is_refused(tmp_path: Path) -> None:
    index = build_index(write_set(tmp_path))
    content = index.file.read_bytes()
    for cut in range(0, len(content), 97):
        index.file.write_bytes(content[:cut])
        with pytest.raises(ConfigError, match=r"index.arrow: index: expected an Arrow file"):
            ShardIndex.open(tmp_path)


@pytest.mark.parametrize("name", ["../s-0.tar", "/etc/passwd", "", "..", "sub/s-0.tar", "pipe:true/x.tar"])
def test_an_index_cannot_lead_out_of_its_folder(name: str, tmp_path: Path) -> None:
    index = build_index(write_set(tmp_path))
    entries = [index.shards[0].__class__(**{**vars(entry), "name": name}) for entry in index.shards]
    write_index(index.file, index.table, entries)
    with pytest.raises(ConfigError, match=r"index.arrow: index: expected names of shards without a folder"):
        ShardIndex.open(tmp_path)
    write_index(index.file, index.table, index.shards, folder="pipe:touch executed;")
    with pytest.raises(ConfigError, match=r"index: expected shards beside it or at a URL, found 'pipe:touch"):
        ShardIndex.open(tmp_path)
