"""Shards: plain webdataset, the same bytes for any number of processes and after any kill, refusals by name."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from jsonargparse import ArgumentError
from PIL import Image

from datamodules.bad_samples import BadSample
from datamodules.commands.shard import main
from datamodules.shards.index import ShardIndex
from datamodules.shards.index_file import WRITING_FILE
from datamodules.shards.write_plan import Limit, Plan, plan_shards
from datamodules.shards.writer import TEMPORARY, begin, write_shards
from datamodules.sources.base import Item, Ref
from datamodules.sources.captions import Flickr8kSource
from step37_lit.config import ConfigError
from tests.conftest import SEED

REPOSITORY = Path(__file__).parents[1]
PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "flickr8k-mini"
COMMAND = "import sys; from datamodules.commands.shard import main; sys.exit(main(sys.argv[1:]))"
NUMBER, PER_SHARD = 60, 4


def make_source(folder: Path, number: int = NUMBER, side: int = 240) -> Path:
    """Flickr8k's layout with pictures of noise and two captions each."""
    noise = np.random.default_rng(SEED)
    (folder / "images").mkdir(parents=True)
    lines = ["image,caption"]
    for i in range(number):
        pixels = noise.integers(256, size=(side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i:03d}.jpg")
        lines += [f"{i:03d}.jpg,picture {i}", f'{i:03d}.jpg,"noise, again"']
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def shared_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("shared") / "noise")


@pytest.fixture
def source(shared_source: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(shared_source, tmp_path / "noise"))


def shard(source: Path, out: Path, *options: str, workers: int = 1) -> int:
    return main([str(source), str(out), "--shard-samples", str(PER_SHARD), "--workers", str(workers), *options])


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of everything whose bytes are promised."""
    paths = [*out.glob("*.tar"), *out.glob("skipped.txt")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


@pytest.fixture(scope="module")
def undisturbed(shared_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert shard(shared_source, out) == 0
    return digests(out)


def read(out: Path) -> list[dict]:
    shards = sorted(str(path) for path in out.glob("*.tar"))
    return list(webdataset.WebDataset(shards, shardshuffle=False, handler=webdataset.reraise_exception))


# What is written


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


# Kills


def start(source: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", COMMAND, str(source), str(out), "--shard-samples", str(PER_SHARD), *options]
    return subprocess.Popen(
        arguments, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def wait_for_shards(process: subprocess.Popen[str], out: Path, number: int) -> None:
    """Until that many are complete and one more is begun."""
    while process.poll() is None:
        names = os.listdir(out) if out.is_dir() else []
        if sum(name.endswith(".tar") for name in names) >= number and any(TEMPORARY.search(name) for name in names):
            return
        time.sleep(0.0002)


def members_of_session(session: int) -> list[str]:
    """Running processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of = (path / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        found += [path.name] if int(of) == session and state != "Z" else []
    return found


def wait_until_gone(session: int) -> None:
    deadline = time.monotonic() + 30
    while left := members_of_session(session):
        assert time.monotonic() < deadline, f"processes {left} outlive the command"
        time.sleep(0.01)


def kill_points() -> list[tuple[int, float, bool]]:
    """Complete shards before the kill, seconds that the command still has then, and whether its workers die as well."""
    random_ = random.Random(SEED)
    return [
        (random_.randrange(NUMBER // PER_SHARD - 4), random_.uniform(0, 0.003), workers_too)
        for workers_too in (True, True, False)
    ]


@pytest.mark.parametrize(("shards", "delay", "workers_too"), kill_points())
def test_resume_after_a_kill_gives_the_bytes_of_an_undisturbed_run(
    shared_source: Path, tmp_path: Path, undisturbed: dict[str, str], shards: int, delay: float, workers_too: bool
) -> None:
    print(f"seed {SEED}: killed {delay:.4f} s behind shard {shards}")
    out = tmp_path / "out"
    process = start(shared_source, out, "--workers", "3")
    wait_for_shards(process, out, shards)
    time.sleep(delay)
    if workers_too:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.communicate()
    wait_until_gone(process.pid)
    left = digests(out)
    assert left.items() <= undisturbed.items()  # what has a final name is whole
    half = [path for path in out.iterdir() if TEMPORARY.search(path.name)]
    print(f"{len(left)} of {len(undisturbed)} shards were written, {len(half)} half")
    assert (out / WRITING_FILE).exists() or not left, "killed too late: the run had ended"
    assert shard(shared_source, out, "--resume", workers=2) == 0
    assert digests(out) == undisturbed
    assert not (out / WRITING_FILE).exists() and not [path for path in out.iterdir() if TEMPORARY.search(path.name)]
    assert len(ShardIndex.open(out)) == NUMBER


@pytest.mark.parametrize("workers", [1, 3])
def test_ctrl_c_leaves_no_half_shard(
    tmp_path: Path, shared_source: Path, undisturbed: dict[str, str], workers: int
) -> None:
    out = tmp_path / "out"
    process = start(shared_source, out, "--workers", str(workers))
    wait_for_shards(process, out, 3)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert errors == "stopped; the same command with --resume goes on\n"
    wait_until_gone(process.pid)
    assert digests(out).items() < undisturbed.items()
    assert not [path for path in out.iterdir() if TEMPORARY.search(path.name)]
    assert shard(shared_source, out, "--resume") == 0 and digests(out) == undisturbed


# Stopped runs in this process: a bad picture in shard 5 ends them under the policy `raise`


def interrupt(source: Path, out: Path) -> None:
    """Leaves a run that stopped at shard 5, and a source that is good again with the same stamps."""
    picture = source / "images" / f"{5 * PER_SHARD:03d}.jpg"
    data, stamp = picture.read_bytes(), picture.stat()
    picture.write_bytes(data[::-1])
    os.utime(picture, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(BadSample, match=r"^captions.txt, line 42, key 020, member jpg: "):
        shard(source, out)
    picture.write_bytes(data)
    os.utime(picture, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert len(list(out.glob("*.tar"))) == 5 and (out / WRITING_FILE).exists()


def test_resume_writes_only_what_is_missing_and_removes_what_is_half_written(
    source: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    out = tmp_path / "out"
    interrupt(source, out)
    stale = out / "noise-000005.tar.0123abcd.tmp"
    stale.write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert shard(source, out, "--resume") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 5
    assert digests(out) == undisturbed and not stale.exists()


def test_half_shards_are_removed_before_new_ones_need_the_room(shared_source: Path, tmp_path: Path) -> None:
    plan = plan_shards(Flickr8kSource(shared_source / "captions.txt"), Limit(shard_samples=PER_SHARD), "raise")
    begin(tmp_path, {}, plan, resume=False)
    for name in ("noise-000005.tar", "noise-000005.tar.0123abcd.tmp", f"{WRITING_FILE}.0123abcd.tmp"):
        (tmp_path / name).write_bytes(b"half")
    begin(tmp_path, {}, plan, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["noise-000005.tar", WRITING_FILE]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--shard-samples", "5"], "--resume: shard_samples: expected '4 (the run that is resumed)', found 5"),
        (["--name", "x"], "--resume: name: expected \"'noise' (the run that is resumed)\", found 'x'"),
        (["--shard-samples", "4"], ""),
        (["--workers", "2", "--bad", "skip"], ""),
    ],
)
def test_resume_refuses_other_settings_by_name(source: Path, tmp_path: Path, options: list[str], expected: str) -> None:
    interrupt(source, tmp_path / "out")
    if not expected:
        assert shard(source, tmp_path / "out", "--resume", *options) == 0
        return
    with pytest.raises(ConfigError) as caught:
        shard(source, tmp_path / "out", "--resume", *options)
    assert str(caught.value) == expected.replace(
        "'4 (the run that is resumed)'", "4 (the run that is resumed)"
    ).replace("\"'noise' (the run that is resumed)\"", "'noise' (the run that is resumed)")


def _edit_caption(source: Path) -> None:
    captions = source / "captions.txt"
    captions.write_text(captions.read_text().replace("picture 7\n", "picture 8\n"))


def _touch_picture(source: Path) -> None:
    os.utime(source / "images" / "007.jpg", ns=(1, 1))


def _remove_sample(source: Path) -> None:
    captions = source / "captions.txt"
    captions.write_text("".join(line for line in captions.open() if not line.startswith("059.jpg")))


def _add_sample(source: Path) -> None:
    shutil.copy(source / "images" / "007.jpg", source / "images" / "x.jpg")
    with (source / "captions.txt").open("a") as file:
        file.write("x.jpg,one more\n")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_edit_caption, "found 'a change, first seen at sample 8 (key 007)'"),
        (_touch_picture, "found 'a change, first seen at sample 8 (key 007)'"),
        (_remove_sample, "expected 60 samples (the run that is resumed), found 59"),
        (_add_sample, "found 'a change, first seen at sample 61 (key x)'"),
    ],
)
def test_resume_refuses_a_changed_source_by_name(source: Path, tmp_path: Path, change, expected: str) -> None:
    interrupt(source, tmp_path / "out")
    before = digests(tmp_path / "out")
    change(source)
    with pytest.raises(ConfigError) as caught:
        shard(source, tmp_path / "out", "--resume")
    assert str(caught.value).startswith("--resume: SOURCE: expected ") and expected in str(caught.value)
    assert digests(tmp_path / "out") == before


def test_resume_refuses_a_damaged_shard_and_a_damaged_record(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(source, out)
    path = out / "noise-000001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r"noise-000001.tar: --resume: expected a .*shard"):
        shard(source, out, "--resume")
    for content in ("", "[]", "{}", '{"settings": 1, "samples": ""}'):
        (out / WRITING_FILE).write_text(content)
        with pytest.raises(ConfigError, match=r"writing.json: --resume: expected what a run of this command wrote"):
            shard(source, out, "--resume")


def test_a_folder_in_use_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(source, out)
    with pytest.raises(
        ConfigError, match=r"out: OUT: expected an empty folder, or --resume, found 'noise-000000.tar, "
    ):
        shard(source, out)
    assert shard(source, out, "--resume") == 0
    finished = digests(out)
    for option in ([], ["--resume"]):
        with pytest.raises(ConfigError, match=r"out: OUT: expected .*, found 'index.arrow, noise-000000.tar, "):
            shard(source, out, *option)
    assert digests(out) == finished
    assert shard(source, tmp_path / "new", "--resume") == 0  # killed before it began


# Bad samples


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


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process and its children may grow over 8 KiB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("small_files")
def test_a_full_disk_is_one_line(shared_source: Path, tmp_path: Path, workers: int) -> None:
    with pytest.raises(ConfigError, match=r"out: SOURCE, OUT: expected files that can be .*, found 'File too large'"):
        shard(shared_source, tmp_path / "out", workers=workers)
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
