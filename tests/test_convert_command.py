"""`convert import|export` on broken folders and disks: one line, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from step37_lit import commands
from step37_lit.hub.importing import import_hub
from step37_lit.hub.safetensors_folder import INDEX_FILE
from tests.hub_folders import assert_same_tensors, every_feature, file_bytes, read_hub, write_hub, write_tensors

ENORM = "model.layers.4.enorm.weight"
NORM, FIRST = "model.norm.weight", "model-00001-of-00003.safetensors"
Q, K = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")


def convert(capsys: pytest.CaptureFixture, *args: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    code = commands.run("convert", list(map(str, args)))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    write_hub(tmp_path / "hub", every_feature())
    return tmp_path / "hub"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = read_hub(folder)
    change(tensors)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    write_tensors(folder, tensors, 3)


def header_of(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(file: Path, header: str, data: bytes) -> None:
    text = header.encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def overlap(folder: Path) -> None:
    header, data = header_of(folder / FIRST)
    one, two = [name for name in header if name != "__metadata__" and header[name]["shape"] == [64]][:2]
    header[one]["data_offsets"] = header[two]["data_offsets"]
    write_raw(folder / FIRST, json.dumps(header), data)


def twice(folder: Path) -> None:
    header, data = header_of(folder / FIRST)
    name = next(name for name in header if name != "__metadata__")
    text = json.dumps(header)
    write_raw(folder / FIRST, text[:-1] + f', "{name}": {json.dumps(header[name])}}}', data)


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))


def also_in_another(folder: Path) -> None:
    names = list(header_of(folder / FIRST)[0])
    tensors = read_hub(folder)
    header, data = header_of(folder / "model-00002-of-00003.safetensors")
    extra = tensors[names[1]]
    header[names[1]] = {
        "dtype": "F32" if extra.dtype == torch.float32 else "BF16",
        "shape": list(extra.shape),
        "data_offsets": [len(data), len(data) + extra.nbytes],
    }
    raw = bytes(extra.contiguous().view(torch.uint8).flatten().tolist())
    write_raw(folder / "model-00002-of-00003.safetensors", json.dumps(header), data + raw)


def truncate(folder: Path) -> None:
    with (folder / FIRST).open("r+b") as handle:
        handle.truncate((folder / FIRST).stat().st_size - 100)


BAD_HUBS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop(NORM)), ["1 missing", NORM]),
    "unexpected tensor": (lambda f: rewrite(f, lambda t: t.update(extra=torch.zeros(2))), ["1 unexpected", "extra"]),
    "some MTP tensors": (lambda f: rewrite(f, lambda t: t.pop(ENORM)), ["1 missing", ENORM]),
    "misshapen": (lambda f: rewrite(f, lambda t: t.update({NORM: torch.zeros(63)})), [NORM, "(64,)", "(63,)"]),
    "misshapen MTP": (
        lambda f: rewrite(f, lambda t: t.update({"model.layers.5.hnorm.weight": torch.zeros(1)})),
        ["model.layers.5.hnorm.weight", "(64,)", "(1,)"],
    ),
    "two dtypes in one weight": (
        lambda f: rewrite(f, lambda t: t.update({K: t[K].float()})),
        [K, "torch.bfloat16", Q, "torch.float32"],
    ),
    "integers": (
        lambda f: write_raw(f / FIRST, header_of(f / FIRST)[0] and json.dumps(_as_int(header_of(f / FIRST)[0])),
                            header_of(f / FIRST)[1]),
        [FIRST, "F32 or F16 or BF16", "I32"],
    ),
    "truncated": (truncate, [FIRST, "bytes", "expected"]),
    "overlapping": (overlap, [FIRST, "no overlap"]),
    "named twice": (twice, [FIRST, "one field of this name", "2 of them"]),
    "in two shards": (also_in_another, ["one tensor of this name", "another in"]),
    "index leads out": (
        lambda f: edit_index(f, lambda m: m.update({NORM: "../hub/" + m[NORM]})), ["../hub/", "in this folder"]
    ),
    "index leads up": (lambda f: edit_index(f, lambda m: m.update({NORM: ".."})), ["'..'", "in this folder"]),
    "index lacks a tensor": (lambda f: edit_index(f, lambda m: m.pop(NORM)), [NORM, "not in the index"]),
    "index is a list": (lambda f: (f / INDEX_FILE).write_text("[]"), [INDEX_FILE, "a JSON object"]),
    "shard is gone": (lambda f: (f / FIRST).unlink(), [FIRST, "no such file"]),
    "pickle": (lambda f: (f / FIRST).write_bytes(pickle.dumps({"a": 1})), [FIRST, "safetensors", "a pickle"]),
    "torch.save": (lambda f: torch.save({"a": torch.zeros(2)}, f / FIRST), [FIRST, "safetensors", "torch.save"]),
    "empty file": (lambda f: (f / FIRST).write_bytes(b""), [FIRST, "safetensors", "a file of 0"]),
    "no tensors at all": (lambda f: [file.unlink() for file in f.glob("*.safetensors*")], ["no model.safetensors"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json", "no such file"]),
    "unknown field": (lambda f: _edit(f / "config.json", surprise=1), ["config.json", "surprise"]),
    "two values": (
        lambda f: (f / "config.json").write_text('{"image_token_id": 1, "image_token_id": 2}'),
        ["config.json", "image_token_id", "one field"],
    ),
    "tokenizer is no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), ["tokenizer.json", "JSON"]),
    "tokenizer is no UTF-8": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff"), ["tokenizer.json"]),
    "template does not parse": (lambda f: (f / "chat_template.jinja").write_text("{% for"), ["chat_template"]),
    "template is no UTF-8": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), ["template.jinja", "UTF-8"]),
}  # fmt: skip


def _as_int(header: dict) -> dict:
    name = next(name for name, entry in header.items() if name != "__metadata__" and entry["dtype"] == "F32")
    header[name]["dtype"] = "I32"
    return header


def _edit(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


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
