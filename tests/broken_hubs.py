"""Hub folders that are broken in many ways, and what is said of each."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import torch

from step37_lit.hub.safetensors_folder import INDEX_FILE
from tests.hub_folders import read_hub, write_tensors

ENORM = "model.layers.4.enorm.weight"
NORM, FIRST = "model.norm.weight", "model-00001-of-00003.safetensors"
Q, K = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")


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
