"""`convert import|export` on broken folders and disks: one line, exit code 2, nothing half-written."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from step37_lit import commands
from step37_lit.hub.importing import import_hub
from tests.broken_hubs import BAD_HUBS
from tests.hub_folders import assert_same_tensors, every_feature, file_bytes, read_hub, write_hub


def convert(capsys: pytest.CaptureFixture, *args: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    code = commands.run("convert", list(map(str, args)))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    write_hub(tmp_path / "hub", every_feature())
    return tmp_path / "hub"


@pytest.mark.parametrize("name", BAD_HUBS)
def test_broken_hub_folder(hub: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    breaks, words = BAD_HUBS[name]
    breaks(hub)
    before = file_bytes(hub.parent)
    code, out, err = convert(capsys, "import", "--hub", hub, "--output", hub.parent / "ckpt")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "expected" in err and all(word in err for word in words), err
    assert file_bytes(hub.parent) == before
    assert {path.name for path in hub.parent.iterdir()} == {"hub"}


EXPORT = ["export", "--checkpoint", "{ckpt}", "--output", "{new}"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["import", "--hub", "nowhere", "--output", "{new}"], ["--hub", "a folder", "nowhere"]),
        (["import", "--hub", "{hub}", "--output", "{hub}"], ["--output", "nothing is"]),
        (["import", "--hub", "{hub}", "--output", "{file}/ckpt"], ["a file that can be written", "Not a directory"]),
        (["import", "--hub", "{hub}", "--output", "/sys/step37"], ["a file that can be written", "/sys/"]),
        (["import", "--hub", "{hub}"], ["output"]),
        (["export", "--checkpoint", "{hub}", "--output", "{new}"], ["manifest.json"]),
        (["export", "--checkpoint", "{ckpt}", "--output", "{hub}"], ["--output", "empty folder"]),
        ([*EXPORT, "--dtype", "int8"], ["--dtype", "bf16 or fp32", "int8"]),
        ([*EXPORT, "--layout", "x"], ["--layout", "hub or transformers"]),
        ([*EXPORT, "--shard-size", "0"], ["--shard-size", "500MB", "0"]),
        ([*EXPORT, "--like", "none"], ["--like", "none"]),
        (["export", "--checkpoint", "{ckpt}", "--output", "/sys/step37"], ["--output", "can be written"]),
        ([], ["subcommand"]),
    ],
)  # fmt: skip
def test_wrong_arguments(hub: Path, command: list[str], words: list[str], capsys: pytest.CaptureFixture) -> None:
    folder = hub.parent
    import_hub(hub, folder / "ckpt")
    (folder / "file").write_text("")
    before = file_bytes(folder)
    names = {"hub": hub, "ckpt": folder / "ckpt", "new": folder / "new", "file": folder / "file"}
    code, out, err = convert(capsys, *(part.format(**names) for part in command))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and all(word in err for word in words), err
    assert file_bytes(folder) == before and not (folder / "new").exists()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "flipped bit": (lambda c: flip(c / "model" / "__0_0.distcp"), ["__0_0.distcp", "SHA-256"]),
    "truncated": (lambda c: (c / "model" / ".metadata").write_bytes(b""), [".metadata", "bytes"]),
    "foreign file": (lambda c: (c / "extra").write_text(""), ["extra"]),
    "missing file": (lambda c: (c / "model.json").unlink(), ["model.json"]),
    "half-written": (lambda c: (c / "manifest.json").unlink(), ["manifest.json", "half-written"]),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_broken_checkpoint(hub: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    import_hub(hub, hub.parent / "ckpt")
    breaks, words = BAD_CHECKPOINTS[name]
    breaks(hub.parent / "ckpt")
    code, out, err = convert(capsys, "export", "--checkpoint", hub.parent / "ckpt", "--output", hub.parent / "new")
    assert (code, out) == (2, "") and err.count("\n") == 1 and all(word in err for word in words), err
    assert {path.name for path in hub.parent.iterdir()} == {"hub", "ckpt"}


def test_both_ways(hub: Path, capsys: pytest.CaptureFixture) -> None:
    (hub / "picture.png").write_bytes(b"\0")
    ckpt, new = hub.parent / "ckpt", hub.parent / "new"
    code, out, err = convert(capsys, "import", "--hub", hub, "--output", ckpt)
    assert (code, err) == (0, "") and "not carried picture.png" in out and f"checkpoint  {ckpt}" in out
    new.mkdir()  # an empty folder may be there
    code, out, err = convert(capsys, "export", "--checkpoint", ckpt, "--output", new, "--shard-size", "1MB")
    assert (code, err) == (0, "") and "in 3 files" in out
    assert_same_tensors(read_hub(new), read_hub(hub))


def limited(folder: Path, limit: int, *args: str | Path) -> subprocess.CompletedProcess:
    """The command in a process that cannot write files larger than `limit` bytes."""

    def set_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-W", "ignore", "-m", "step37_lit", "convert", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=set_limit, cwd=folder, timeout=300)


def test_full_disk(hub: Path, tmp_path: Path) -> None:
    done = limited(tmp_path, 100_000, "import", "--hub", hub, "--output", tmp_path / "ckpt")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "a file that can be written, found 'File too large'" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"hub"}


def test_export_goes_on_where_a_full_disk_stopped_it(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import_hub(hub, tmp_path / "ckpt")
    arguments = ["export", "--checkpoint", tmp_path / "ckpt", "--output", tmp_path / "new", "--shard-size", "80KB"]
    done = limited(tmp_path, 90_000, *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr and "finished files are kept" in done.stderr
    staged = tmp_path / ".new.export"
    kept = sorted(path.name for path in staged.glob("*.safetensors"))
    assert not (tmp_path / "new").exists() and len(kept) > 1
    flip(staged / kept[0])
    code, out, _ = convert(capsys, *arguments)
    assert code == 0 and f", {len(kept) - 1} of them kept from before" in out
    assert_same_tensors(read_hub(tmp_path / "new"), read_hub(hub))
    assert {path.name for path in tmp_path.iterdir()} == {"hub", "ckpt", "new"}
    # of another checkpoint or with other options nothing is kept
    other = [*arguments[:3], "--output", tmp_path / "other", *arguments[5:]]
    assert limited(tmp_path, 90_000, *other).returncode == 2
    code, out, _ = convert(capsys, *other, "--dtype", "fp32")
    assert code == 0 and "kept" not in out
