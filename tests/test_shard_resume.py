"""Writing shards after a kill: the bytes of an undisturbed run, and refusals by name."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datamodules.bad_samples import BadSample
from datamodules.shards.index import ShardIndex
from datamodules.shards.index_file import WRITING_FILE
from datamodules.shards.write_plan import Limit, plan_shards
from datamodules.shards.writer import TEMPORARY, begin
from datamodules.sources.captions import Flickr8kSource
from step37_lit.errors import ConfigError
from tests.conftest import SEED
from tests.sharding import COMMAND, NUMBER, PER_SHARD, REPOSITORY, digests, shard


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
