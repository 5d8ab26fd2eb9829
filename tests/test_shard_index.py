"""The index of a set: what is in it, refreshing it, token lengths, stale shards, reading by it, remote shards."""

from __future__ import annotations

import ast
import functools
import http.server
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.bad_samples import BadSample
from datamodules.commands import index as index_command
from datamodules.conversations import parse_text
from datamodules.shards.index import BuildCounts, ShardIndex, set_fingerprint
from datamodules.shards.index_build import build_index
from datamodules.shards.index_file import INDEX_FILE, write_index
from datamodules.shards.lengths import add_lengths
from datamodules.shards.reader import ShardReader
from datamodules.shards.storage import OPEN_FILES, Storage, expand_shards
from datamodules.shards.worker_pool import results_in_order
from step37_lit.config import ConfigError, Step37Config
from step37_lit.processor import DEFAULT_PROMPT, Step37Processor
from step37_lit.tokenizer import Step37Tokenizer
from tests import tars
from tests.tars import picture, sample, text

REPOSITORY = Path(__file__).parents[1]
TEXTS = ["a red ring", "a dog runs", "Describe the picture.", "What is it?"] * 3
CHAT = text(
    messages=[
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
        {"role": "assistant", "content": "a dog runs"},
    ],
    id=7,
)


@pytest.fixture(scope="module")
def processor() -> Step37Processor:
    return Step37Processor(Step37Tokenizer.train(TEXTS, vocab_size=300), Step37Config.preset("tiny"))


def write_set(folder: Path, shards: int = 3, samples: int = 4) -> Path:
    """Shards `s-0.tar`, ... with keys `0-0`, `0-1`, ...; captions differ in length."""
    for shard in range(shards):
        members = [m for i in range(samples) for m in sample(f"{shard}-{i}", 10 * shard + i, "a dog " * (i + 1))]
        tars.write(folder / f"s-{shard}.tar", members)
    return folder


def keep_time(path: Path, content: bytes) -> None:
    """Other content under the old time."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


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


# ---- reading ----


@settings(max_examples=60, deadline=None)
@given(at=st.integers(min_value=0), flip=st.integers(1, 255))
def test_any_changed_byte_of_any_member_is_seen(
    at: int, flip: int, indexed_set: tuple[Path, bytes, ShardIndex]
) -> None:
    folder, original, index = indexed_set
    places = [(i, m, offset) for i in range(len(index)) for m in index.members(i) for offset in range(m.size)]
    i, member, offset = places[at % len(places)]
    content = bytearray(original)
    content[member.offset + offset] ^= flip
    (folder / "s-0.tar").write_bytes(content)
    reader = ShardReader(index)
    with pytest.raises(BadSample) as caught:
        reader.read(i)
    error = caught.value
    assert (error.shard, error.key, error.member) == ("s-0.tar", index.key(i), member.suffix)
    assert re.fullmatch(r"CRC-32 [0-9a-f]{8}, [0-9a-f]{8} when it was indexed", error.reason)
    for other in set(range(len(index))) - {i}:
        reader.read(other)


@pytest.fixture(scope="module")
def indexed_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, ShardIndex]:
    folder = write_set(tmp_path_factory.mktemp("crc"), shards=1)
    return folder, (folder / "s-0.tar").read_bytes(), build_index(folder)


def test_shards_that_shrink_or_vanish_while_they_are_read(tmp_path: Path) -> None:
    index = build_index(write_set(tmp_path))
    shard, picture_of_it = tmp_path / "s-1.tar", index.members(4)[1]
    whole = shard.read_bytes()
    for cut, member in ((picture_of_it.offset + 10, "json: 0"), (index.members(4)[0].offset + 10, "json: 10")):
        shard.write_bytes(whole[:cut])
        with pytest.raises(BadSample, match=rf"^shard s-1.tar, key 1-0, member {member} bytes read, \d+ indexed$"):
            ShardReader(index).read(4)
    shard.unlink()
    with pytest.raises(BadSample, match=r"^shard s-1.tar, key 1-0, member json: cannot be read: .*No such file"):
        ShardReader(index).read(4)
    assert ShardReader(index).read(0).key == "0-0"


def test_a_place_outside_of_the_shard_asks_for_no_memory(tmp_path: Path) -> None:
    index = build_index(write_set(tmp_path, shards=1))
    table = index.table
    for offset, size in ((0, 1 << 45), (-1, 5), (1 << 60, 5), (0, -5)):
        members = pa.array([[{"suffix": "txt", "offset": offset, "size": size, "crc32": 0}]] * 4, table["members"].type)
        at = table.schema.get_field_index("members")
        write_index(index.file, table.set_column(at, "members", pa.chunked_array([members])), index.shards)
        with pytest.raises(BadSample, match=r"member txt: a place outside of the shard in the index"):
            ShardReader(ShardIndex.open(tmp_path)).read(0)


def test_without_images_only_the_text_is_read(tmp_path: Path) -> None:
    index = build_index(write_set(tmp_path, shards=1))
    image = index.members(2)[1]
    keep_time(tmp_path / "s-0.tar", flipped((tmp_path / "s-0.tar").read_bytes(), image.offset + 3))
    content = ShardReader(index).read(2, images=False)
    assert content.images == () and json.loads(content.text)["captions"][0].startswith("a dog")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_readers_in_other_processes(method: str, tmp_path: Path) -> None:
    index = build_index(write_set(tmp_path))
    reader = ShardReader(index)
    expected = [reader.read(i) for i in range(len(index))]  # descriptors are open now
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(reader.read, range(len(index)), chunksize=3) == expected
    assert pickle.loads(pickle.dumps(reader)).read(5) == expected[5]
    again = pickle.dumps(reader)
    tars.write(tmp_path / "s-9.tar", sample("new"))
    build_index(tmp_path)
    with pytest.raises(ConfigError, match=r"index: expected the file that the run started with, found 'a newer one'"):
        pickle.loads(again)
    assert reader.read(5) == expected[5]  # its own file is still mapped


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    for shard in range(OPEN_FILES + 20):
        tars.write(tmp_path / f"s-{shard:03d}.tar", [(f"{shard}.jpg", picture()), (f"{shard}.txt", b"x")])
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(build_index(tmp_path))
    for i in [*range(OPEN_FILES + 20)] * 2:
        assert reader.read(i).key == str(i)
    assert len(os.listdir("/proc/self/fd")) <= before + OPEN_FILES
    del reader
    assert len(os.listdir("/proc/self/fd")) <= before


# ---- remote shards ----


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and parts of them."""

    ranges = True

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        self.server.asked.append(self.headers.get("Range"))  # type: ignore[attr-defined]
        if asked is None or not self.ranges:
            self.send_response(200)
        else:
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}")
            content = content[first : last + 1]
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    handler = functools.partial(RangeHandler, directory=str(tmp_path / "remote"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_remote_shards(server: http.server.ThreadingHTTPServer, tmp_path: Path, processor: Step37Processor) -> None:
    local = build_index(write_set(tmp_path / "remote"))
    url, file = f"http://127.0.0.1:{server.server_port}/", tmp_path / "remote.arrow"
    shards, schemes = url + "s-{0..2}.tar", ("http",)
    with pytest.raises(ConfigError, match=r"shards: expected local paths .remote_schemes does not name http."):
        build_index(shards, index_file=file)
    with pytest.raises(ConfigError, match=r"--index: expected a local file for the index of remote shards"):
        build_index(shards, remote_schemes=schemes)
    assert server.asked == []  # type: ignore[attr-defined]
    index = build_index(shards, index_file=file, remote_schemes=schemes)
    assert index.table.equals(local.table) and index.folder == url
    assert build_index(shards, index_file=file, remote_schemes=schemes).counts == BuildCounts(shards_kept=3)
    index.check_fresh(Storage(schemes))
    with pytest.raises(ConfigError, match=r"remote_schemes does not name http"):
        ShardReader(index).read(0)
    reader = ShardReader(index, schemes)
    server.asked.clear()  # type: ignore[attr-defined]
    assert [reader.read(i) for i in range(12)] == [ShardReader(local).read(i) for i in range(12)]
    members = [m for i in range(12) for m in index.members(i)]
    assert server.asked == [f"bytes={m.offset}-{m.offset + m.size - 1}" for m in members]  # type: ignore[attr-defined]
    index = add_lengths(index, processor, DEFAULT_PROMPT, remote_schemes=schemes)
    expected = add_lengths(local, processor, DEFAULT_PROMPT)
    assert index.table.equals(expected.table) and index.folder == url

    content = (tmp_path / "remote" / "s-1.tar").read_bytes()
    (tmp_path / "remote" / "s-1.tar").write_bytes(flipped(content, index.members(4)[1].offset))
    with pytest.raises(BadSample, match=r"^shard s-1.tar, key 1-0, member jpg: CRC-32"):
        reader.read(4)
    (tmp_path / "remote" / "s-1.tar").write_bytes(content + bytes(512))
    with pytest.raises(ConfigError, match=r"/s-1.tar: size of the shard: expected \d+ bytes as indexed"):
        index.check_fresh(Storage(schemes))
    (tmp_path / "remote" / "s-1.tar").unlink()
    with pytest.raises(ConfigError, match=r"/s-1.tar: shard: expected a file of \d+ bytes.*found 'none'"):
        index.check_fresh(Storage(schemes))
    with pytest.raises(BadSample, match=r"^shard s-1.tar, key 1-0, member json: cannot be read: http://"):
        reader.read(4)
    with pytest.raises(ConfigError, match=r"s-1.tar: shard: expected a file that can be read"):
        build_index(shards, index_file=file, remote_schemes=schemes)


def test_a_server_without_ranges_is_noticed(
    server: http.server.ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path / "remote", shards=1)
    url = f"http://127.0.0.1:{server.server_port}/s-0.tar"
    index = build_index(url, index_file=tmp_path / "remote.arrow", remote_schemes=["http"])
    monkeypatch.setattr(RangeHandler, "ranges", False)
    with pytest.raises(BadSample, match=r"member json: \d+ bytes read, \d+ indexed$"):
        ShardReader(index, ["http"]).read(0)


# ---- what is meant by a path ----


def test_paths(tmp_path: Path) -> None:
    write_set(tmp_path, shards=12, samples=1)
    (tmp_path / ".s-half.tar").touch()
    (tmp_path / "notes.txt").touch()
    every = sorted(str(tmp_path / f"s-{i}.tar") for i in range(12))
    assert expand_shards(tmp_path) == expand_shards(str(tmp_path / "*.tar")) == every
    assert expand_shards(str(tmp_path / "s-{2,{0..1}}.tar")) == [str(tmp_path / f"s-{i}.tar") for i in (2, 0, 1)]
    assert expand_shards([tmp_path / "s-3.tar", str(tmp_path / "s-1.tar")]) == [every[i] for i in (5, 1)]
    urls = "https://host/s-{08..10}.tar"
    assert expand_shards(urls, ["https"]) == [f"https://host/s-{i}.tar" for i in ("08", "09", "10")]


# ---- the command ----


def run(*arguments: str | Path) -> int:
    return index_command.main([os.fspath(argument) for argument in arguments])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(tmp_path)
    assert run(tmp_path, "--workers", "1") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("shards     3: 3 read, 0 compared, 0 unchanged")
    assert shown[1:3] == ["samples    12", f"index      {tmp_path}/index.arrow"]
    assert shown[3].startswith("lengths    none: --config RECIPE or --preset NAME")
    assert run(tmp_path, "--preset", "tiny", "--workers", "2") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("shards     3: 0 read, 0 compared, 3 unchanged")
    assert re.fullmatch(rf"tokenizer  \d+ tokens, trained on the texts of the set: {tmp_path}/tokenizer.json", shown[3])
    assert re.fullmatch(
        r"lengths    24 texts of \d+ to \d+ tokens, [\d.]+ on average; fingerprint [0-9a-f]{16}, 12 texts read",
        shown[4],
    )
    trained = (tmp_path / "tokenizer.json").read_bytes()
    assert run(tmp_path, "--preset", "tiny", "--prompt", "What?", "--multicrop", "--workers", "1") == 0
    assert "12 texts read" in capsys.readouterr().out and (tmp_path / "tokenizer.json").read_bytes() == trained
    assert len(ShardIndex.open(tmp_path).fingerprints) == 2


def test_the_command_with_a_recipe_gives_what_its_data_module_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from datamodules.packed import PackedDataModule

    settings = {"preset": "tiny", "prompt": "What is it?", "max_length": 512}
    for name in ("one", "two"):
        write_set(tmp_path / name, shards=1)
    sets = [{"path": str(tmp_path / name)} for name in ("one", "two")]
    recipe = tmp_path / "recipe.yaml"
    data = {"class_path": "datamodules.packed.PackedDataModule", "init_args": {"sets": sets, **settings}}
    recipe.write_text(json.dumps({"data": data}))
    with pytest.raises(ConfigError, match=r"data.tokenizer: expected a file, or .*one/tokenizer.json, which indexing"):
        run(tmp_path / "two", "--config", recipe)
    assert run(tmp_path / "one", "--config", recipe, "--workers", "1") == 0
    assert run(tmp_path / "two", "--config", recipe, "--workers", "1") == 0
    assert not (tmp_path / "two" / "tokenizer.json").exists()
    module = PackedDataModule(sets=str(tmp_path / "one"), **settings)
    fingerprint = set_fingerprint(module.processor, module.prompt)
    assert {ShardIndex.open(tmp_path / name).fingerprints for name in ("one", "two")} == {(fingerprint,)}


def test_the_command_lists_what_is_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tars.write(tmp_path / "s.tar", [*sample("a"), ("b\x1b[31m.jpg", picture()), ("c.cls", b"1")])
    cut = tars.tar(sample("d"))
    tars.write(tmp_path / "t.tar", cut[: tars.end_of_members(cut)])
    with pytest.raises(BadSample):
        run(tmp_path, "--workers", "1")
    assert run(tmp_path, "--bad", "skip", "--workers", "1", "--preset", "tiny") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1] == "samples    3; 1 members of other kinds left alone"
    assert re.fullmatch(r"damaged    t.tar: cut off .*", shown[3])
    assert shown[4] == "bad        2 of 3 samples; they stay in the index with the reason"
    assert shown[5] == "           shard s.tar, key 'b\\x1b[31m': no text member (json or txt)"
    assert re.fullmatch(r"           shard t.tar, key d: .*", shown[6])
    assert shown[-1].startswith("lengths    2 texts")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "t.json"], r"--preset or --hub: expected the model that the lengths are for"),
        (["--config", "r.yaml", "--preset", "tiny"], r"--config: expected a recipe or options of the model"),
        (["--config", "absent.yaml"], r"--config: expected a file, found 'absent.yaml'"),
        (["--config", "r.yaml"], r"r.yaml: data: expected class_path and init_args"),
        (["--preset", "tiny", "--tokenizer", "absent.json"], r"tokenizer: expected a file, found 'absent.json'"),
        (["--preset", "flash"], r"id of <im_start>: expected 128000"),
        (["--preset", "nonsense"], r"preset: expected .* found 'nonsense'"),
        (["--remote-schemes", "pipe"], r"remote_schemes: expected any of"),
        (["--index", "elsewhere/index.arrow"], r"--index: expected a file in the shards' folder"),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "set", shards=1)
    (tmp_path / "r.yaml").write_text("data: 3\n")
    with pytest.raises(ConfigError, match=message):
        run("set", "--workers", "1", *arguments)
    assert not (tmp_path / "set" / "tokenizer.json").exists()


def test_an_index_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ConfigError, match=r"index: expected files that can be read and written, found 'No space left"):
        run(tmp_path, "--workers", "1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s-0.tar", "s-1.tar", "s-2.tar"]


def full_disk(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


# ---- nothing is executed ----


def test_no_reader_here_unpickles() -> None:
    """webdataset writes shards, nothing else: its readers would unpickle members and run what `pipe:` says."""
    for path in (REPOSITORY / "datamodules").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            for module in modules:
                assert not module.startswith(("pickle", "subprocess", "tarfile.TarFile", "torch.load")), path
                if module.startswith("webdataset"):
                    assert module in ("webdataset.TarWriter", "webdataset.ShardWriter"), path


def test_hostile_json_takes_no_quadratic_time() -> None:
    """A million quotes, each of which could begin a string that never ends, would take hours."""
    for data in (b'"' * 1_000_000, b'\\"' * 500_000, b"[" * 1_000_000, b'["' * 500_000, b"{" * 100 + b'"\\' * 400_000):
        with pytest.raises(ValueError, match=r"not JSON|nested"):
            parse_text("json", data)
