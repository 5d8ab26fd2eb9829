"""Bad samples through `build_index`: each is named, everything else is indexed, nothing is lost or run."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.bad_samples import BadSample
from datamodules.shards import rows as shard_rows
from datamodules.shards import tar_scan
from datamodules.shards.index_build import build_index
from tests import tars
from tests.bad_kinds import JPEG, OK, SAMPLES
from tests.indexed_shards import check_reading
from tests.tars import picture, sample


@pytest.mark.parametrize("case", SAMPLES)
def test_bad_samples(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    members, expected = SAMPLES[case]
    tars.write(tmp_path / "set" / "s.tar", tars.tar([*sample("0first"), *members, *sample("zlast")]))
    bad = {key: problem for key, problem in expected.items() if problem is not None}
    if bad:
        key, problem = next(iter(bad.items()))
        with pytest.raises(BadSample) as caught:
            build_index(tmp_path / "set")
        assert str(caught.value) == f"shard s.tar, key {key}: {problem}"
        assert not (tmp_path / "set" / "index.arrow").exists()
    index = build_index(tmp_path / "set", "skip")
    assert {index.key(i): problem for i, problem in index.problems()} == bad
    assert set(index.keys()) == {"0first", *expected, "zlast"}
    check_reading(index)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["index.arrow", "s.tar", "set"]


def test_names_that_only_extended_headers_can_hold(tmp_path: Path) -> None:
    def long_name(name: bytes, data: bytes) -> bytes:
        return tars.member(b"././@LongLink", name + b"\0", b"L") + tars.member(b"short", data)

    first, last = (tars.tar(sample(key)) for key in ("0first", "zlast"))
    content = first[: tars.end_of_members(first)]
    content += long_name(b"a\0b.jpg", JPEG) + long_name(b"\xff.jpg", JPEG) + long_name(b"x" * 5000 + b".jpg", JPEG)
    tars.write(tmp_path / "s.tar", content + last)
    with pytest.raises(BadSample, match=r"^shard s.tar, key 'a\\x00b': member jpg: NUL in the name$"):
        build_index(tmp_path)
    index = build_index(tmp_path, "skip")
    assert {index.key(i): problem for i, problem in index.problems()} == {
        "a\0b": "member jpg: NUL in the name",
        "\\xff": "member jpg: a name that is not UTF-8",
        "x" * 100: "member ..: a name of 5004 bytes, at most 4096",
    }
    assert list(index.keys()) == ["0first", "a\0b", "\\xff", "x" * 100, "zlast"]


def test_a_member_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tar_scan, shard_rows):
        monkeypatch.setattr(module, "MAX_MEMBER_BYTES", 5000)
    large = picture(1, size=(300, 300))
    tars.write(tmp_path / "s.tar", [*sample("a"), ("b.jpg", large), ("b.json", OK), ("c.mp4", large), *sample("d")])
    index = build_index(tmp_path, "skip")
    assert list(index.problems()) == [(1, f"member jpg: {len(large)} bytes, at most 5000")]
    assert list(index.keys()) == ["a", "b", "d"] and index.shards[0].ignored == 1
    check_reading(index)
