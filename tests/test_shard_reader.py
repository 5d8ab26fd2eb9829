"""Reading samples by the index: checksums, shards that change, processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.bad_samples import BadSample
from datamodules.shards.index import ShardIndex
from datamodules.shards.index_build import build_index
from datamodules.shards.index_file import write_index
from datamodules.shards.reader import ShardReader
from datamodules.shards.storage import OPEN_FILES
from step37_lit.errors import ConfigError
from step37_lit.processor import Step37Processor
from tests import tars
from tests.indexed_shards import flipped, keep_time, small_processor, write_set
from tests.tars import picture, sample

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def processor() -> Step37Processor:
    return small_processor()


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
