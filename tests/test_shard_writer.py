"""Shards: plain webdataset, and the same bytes for any number of processes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from datamodules.commands.shard import main
from datamodules.shards.index import ShardIndex
from datamodules.shards.write_plan import Limit, plan_shards
from datamodules.sources.captions import Flickr8kSource
from tests.sharding import NUMBER, PER_SHARD, PHOTOGRAPHS, digests, read, shard


def test_plain_webdataset_reads_the_sources_bytes_in_order(source: Path, tmp_path: Path) -> None:
    assert shard(source, tmp_path / "out") == 0
    samples = read(tmp_path / "out")
    assert [sample["__key__"] for sample in samples] == [f"{i:03d}" for i in range(NUMBER)]
    for i, sample in enumerate(samples):
        assert sample["jpg"] == (source / "images" / f"{i:03d}.jpg").read_bytes()
        assert json.loads(sample["json"]) == {"captions": [f"picture {i}", "noise, again"]}
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["index.arrow"] + [f"noise-{i:06d}.tar" for i in range(NUMBER // PER_SHARD)]
    assert len(ShardIndex.open(tmp_path / "out")) == NUMBER


def test_members_carry_nothing_of_who_writes_or_when(source: Path, tmp_path: Path) -> None:
    shard(source, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "noise-000000.tar") as tar:
        for member in tar:
            assert member.isreg() and (member.uid, member.gid, member.mtime, member.mode) == (0, 0, 0, 0o444)
            assert member.uname == member.gname == "step37" and not member.pax_headers


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_processes_changes_no_byte(
    shared_source: Path, tmp_path: Path, undisturbed: dict[str, str], workers: int
) -> None:
    assert shard(shared_source, tmp_path / "out", workers=workers) == 0
    assert digests(tmp_path / "out") == undisturbed and len(undisturbed) == NUMBER // PER_SHARD


def test_shards_are_as_large_as_they_may_be(shared_source: Path, tmp_path: Path) -> None:
    source, limit = Flickr8kSource(shared_source / "captions.txt"), 409_600
    plan = plan_shards(source, Limit(shard_size=limit), "raise")
    assert main([str(shared_source), str(tmp_path / "out"), "--shard-size", str(limit)]) == 0
    paths = sorted((tmp_path / "out").glob("*.tar"))
    assert len(paths) == len(plan.shards) > 3
    for path, entries, following in zip(paths, plan.shards, plan.shards[1:], strict=False):
        size = sum(entry.size for entry in entries)
        assert path.stat().st_size <= limit
        with tarfile.open(path) as tar:
            assert sum(512 + -(-member.size // 512) * 512 for member in tar) == size
        assert size + following[0].size + 1024 > limit  # one more would not have gone in


@pytest.mark.parametrize("blocks", range(0, 42))
def test_the_size_of_a_shard_is_known_to_the_byte(blocks: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w|") as tar:
        member = tarfile.TarInfo("key.jpg")
        member.size = 512 * blocks
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    size = len(buffer.getvalue())
    assert not Limit(shard_size=size).full(512 * (1 + blocks), 1)
    assert Limit(shard_size=size - 1).full(512 * (1 + blocks), 1)


def test_a_sample_larger_than_a_shard_is_alone(shared_source: Path) -> None:
    plan = plan_shards(Flickr8kSource(shared_source / "captions.txt"), Limit(shard_size=1), "raise")
    assert [len(entries) for entries in plan.shards] == [1] * NUMBER


def test_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--num-samples", "5", "--seed", "3", "--shard-samples", "2"]
    for workers in ("1", "2"):
        assert main(["scenes", str(tmp_path / workers), *options, "--workers", workers]) == 0
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    assert len(read(tmp_path / "1")) == 5 and "taken as scenes (auto)" in capsys.readouterr().out


def test_photographs(tmp_path: Path) -> None:
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"the photographs are not at {PHOTOGRAPHS}")
    for workers in (1, 2):
        out = tmp_path / str(workers)
        assert main([str(PHOTOGRAPHS), str(out), "--shard-size", "2000000", "--workers", str(workers)]) == 0
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    samples = read(tmp_path / "1")
    assert len(samples) == 320 and all(len(json.loads(sample["json"])["captions"]) == 5 for sample in samples)
    for sample in samples:
        assert sample["jpg"] == (PHOTOGRAPHS / "images" / f"{sample['__key__']}.jpg").read_bytes()
