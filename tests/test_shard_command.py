"""`python -m step37_lit shard`: bad samples, full disks, options."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jsonargparse import ArgumentError
from PIL import Image

from datamodules.bad_samples import BadSample
from datamodules.commands.shard import main
from datamodules.shards.index_file import WRITING_FILE
from datamodules.shards.write_plan import Limit, Plan, plan_shards
from datamodules.shards.writer import TEMPORARY, begin, write_shards
from datamodules.sources.base import Item, Ref
from datamodules.sources.captions import Flickr8kSource
from step37_lit.errors import ConfigError
from tests.sharding import NUMBER, PER_SHARD, digests, make_source, read, shard


def spoil(source: Path) -> None:
    (source / "images" / "013.jpg").write_bytes(b"GIF89a")
    (source / "images" / "030.jpg").unlink()
    for i in range(40, 44):  # a whole shard, by the order of the rest
        Image.new("RGB", (4, 4)).save(source / "images" / f"{i:03d}.jpg", "PNG")
    with (source / "captions.txt").open("a") as file:
        file.write("050.jpg,\n")


@pytest.mark.parametrize("workers", [1, 3])
def test_bad_samples_are_skipped_by_name(
    source: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(source)
    assert shard(source, tmp_path / "out", "--bad", "skip", workers=workers) == 0
    lines = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "captions.txt, line 122",
        "captions.txt, line 62, key 030",
        "captions.txt, line 28, key 013, member jpg",
        *(f"captions.txt, line {2 + 2 * i}, key {i:03d}, member jpg" for i in range(40, 44)),
    ]
    assert lines[-1].endswith("expected JPEG behind this suffix, found PNG")
    printed = capsys.readouterr().out
    assert f"skipped    7 bad ones, all of them named in {tmp_path / 'out' / 'skipped.txt'}" in printed
    assert all(line in printed for line in lines) and "wrote      54 samples" in printed
    keys = [sample["__key__"] for sample in read(tmp_path / "out")]
    assert keys == [f"{i:03d}" for i in range(NUMBER) if i not in (13, 30, 40, 41, 42, 43)]


def test_a_resumed_run_names_what_was_skipped_before(source: Path, tmp_path: Path) -> None:
    spoil(source)
    assert shard(source, tmp_path / "one", "--bad", "skip") == 0
    plan = plan_shards(Flickr8kSource(source / "captions.txt"), Limit(shard_samples=PER_SHARD), "skip")
    out = tmp_path / "two"
    settings = {"format": "flickr8k", "name": "noise", "shard_size": None, "shard_samples": PER_SHARD}
    begin(out, settings, plan, resume=False)
    half = Plan(plan.shards[:8], plan.skipped)
    write_shards(Flickr8kSource(source / "captions.txt"), half, out, "noise", "skip", 1, show_progress=False)
    with pytest.raises(BadSample, match=r"captions.txt, line 122: caption: empty"):
        shard(source, out, "--resume")
    assert shard(source, out, "--resume", "--bad", "skip") == 0
    assert digests(out) == digests(tmp_path / "one") and "skipped.txt" in digests(out)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_bad_sample_stops_a_run_by_name(source: Path, tmp_path: Path, workers: int) -> None:
    for i in (13, 45, 46):
        (source / "images" / f"{i:03d}.jpg").write_bytes(b"GIF89a")
    with pytest.raises(BadSample, match=r"^captions.txt, line 28, key 013, member jpg: ") as caught:
        shard(source, tmp_path / "out", workers=workers)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "out").iterdir() if TEMPORARY.search(path.name)]
    assert not (tmp_path / "out" / "noise-000003.tar").exists()


def test_bad_samples_that_are_seen_before_stop_a_run_before_it_writes(source: Path, tmp_path: Path) -> None:
    (source / "images" / "013.jpg").unlink()
    with pytest.raises(BadSample, match=r"line 28, key 013: '013.jpg': No such file or directory"):
        shard(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_without_a_good_sample_is_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "noise", number=2)
    for path in (source / "images").iterdir():
        path.write_bytes(b"GIF89a")
    with pytest.raises(ConfigError, match="SOURCE: expected a sample that can be used, found"):
        shard(source, tmp_path / "out", "--bad", "skip")
    (source / "captions.txt").write_text("image,caption\n")
    with pytest.raises(ConfigError, match="SOURCE: expected samples, found 'none, and 0 bad ones'"):
        shard(source, tmp_path / "other")


# What can happen to the machine


def no_file_over_8_kib() -> None:
    """As on a full disk, for a process and its children; pipes are not files."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_one_line(shared_source: Path, tmp_path: Path, workers: str) -> None:
    # A process of its own: the limit would also hold for the file that pytest's output may go to.
    run = subprocess.run(
        [sys.executable, "-m", "step37_lit", "shard", shared_source, tmp_path / "out", "--workers", workers],
        preexec_fn=no_file_over_8_kib,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    *_, line = run.stderr.strip().splitlines()
    assert re.search(r"out: SOURCE, OUT: expected files that can be .*, found 'File too large'", line), run.stderr
    assert "Traceback" not in run.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [WRITING_FILE]


def test_a_folder_that_cannot_be_made_is_one_line(shared_source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file.*: SOURCE, OUT: expected files that can be read and written, found"):
        shard(shared_source, tmp_path / "file" / "out")


class ChangingSource(Flickr8kSource):
    """Changes behind the plan's back where the writing process looks at picture 30."""

    def item(self, ref: Ref) -> Item:
        if multiprocessing.parent_process() is not None and "030" in ref[1]:
            self.happens()
        return super().item(ref)

    def happens(self) -> None:
        os.utime(self.root / "030.jpg", ns=(1, 1))


class DyingSource(ChangingSource):
    def happens(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (ChangingSource, "SOURCE: expected nothing changed .*, found 'captions.txt, line 62, key 030'"),
        (DyingSource, "--workers: expected processes that live to the end"),
    ],
)
def test_what_happens_while_shards_are_written_is_named(
    source: Path, tmp_path: Path, kind: type[ChangingSource], expected: str
) -> None:
    changing = kind(source / "captions.txt")
    plan = plan_shards(changing, Limit(shard_samples=PER_SHARD), "skip")
    begin(tmp_path / "out", {}, plan, resume=False)
    with pytest.raises(ConfigError, match=expected):
        write_shards(changing, plan, tmp_path / "out", "noise", "skip", 2, show_progress=False)
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert "noise-000007.tar" not in names and not [name for name in names if TEMPORARY.search(name)]
    assert not multiprocessing.active_children()


# Options


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--name", "a.b"], "--name: expected text without dots, slashes and spaces, found 'a.b'"),
        (["--name", "../a"], "--name: expected text without dots, slashes and spaces, found '../a'"),
        (["--name", ""], "--name: expected text without dots, slashes and spaces, found ''"),
        (["--shard-size", "9"], "--shard-size, --shard-samples: expected exactly one of them, found [9, 4]"),
        (["--seed", "1", "--split", "seen"], "--seed, --split: expected none for flickr8k, found"),
        (["--format", "chat"], "SOURCE: expected a file, found"),
        (["--image-root", "/nowhere"], "--image-root: expected a folder, found '/nowhere'"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    shared_source: Path, tmp_path: Path, options: list[str], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        shard(shared_source, tmp_path / "out", *options)
    assert str(caught.value).startswith(expected) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "--num-samples: expected a number for rendered scenes, found None"),
        (["--num-samples", "2", "--shard-size", "9"], "--shard-size: expected --shard-samples for pictures that are"),
        (["--num-samples", "2", "--image-root", "."], "--image-root: expected none for rendered scenes, found '.'"),
    ],
)
def test_options_that_do_not_fit_scenes_are_refused(tmp_path: Path, options: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        main(["scenes", str(tmp_path / "out"), *options])
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("options", [["--workers", "0"], ["--shard-samples", "x"], ["--bad", "ignore"], ["--what"]])
def test_unknown_options_are_refused(shared_source: Path, tmp_path: Path, options: list[str]) -> None:
    with pytest.raises(ArgumentError):
        shard(shared_source, tmp_path / "out", *options)


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["-h"])
    assert caught.value.code == 0 and "python -m step37_lit shard scenes" in capsys.readouterr().out
