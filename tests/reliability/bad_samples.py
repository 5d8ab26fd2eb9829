"""Broken pictures, texts and tars: each is counted and named, the good samples are the same, too many stop a run."""

from __future__ import annotations

import io
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from datamodules.bad_samples import BadSample
from datamodules.packed import PackedDataModule
from datamodules.shards.index import ShardIndex
from datamodules.shards.index_file import INDEX_FILE
from step37_lit.errors import ConfigError
from tests import shard_sets, tars
from tests.bad_kinds import OK, SAMPLES, SHARDS, damaged_shard
from tests.packed_loaders import loader, module
from tests.pictures import noise
from tests.reliability.figure import Figure
from tests.tars import sample

GOOD = [("0first", 100), *((f"good{i}", i) for i in range(8)), ("zlast", 101)]  # key and seed
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
# By kind: members or shards of it, and the keys that are bad.
Kind = tuple[Callable[[Path], None], set[str]]


def measure(full: bool, seed: int, folder: Path) -> Figure:
    kinds = {**_samples(), **_shards(), **_pictures(), **_behind_the_index()}
    if not full:
        kinds = {name: kinds[name] for name in random.Random(seed).sample(sorted(kinds), 6)}
    tokenizer = shard_sets.tokenizer_file(folder)
    clean = folder / "clean"
    _write(clean, [])
    _index(clean, tokenizer)
    expected = _samples_by_key(folder, "clean")
    problems = []
    for number, (name, (make, bad)) in enumerate(kinds.items()):
        set_name = f"set{number}"
        problems += [f"{name}: {line}" for line in _look_at(folder, set_name, tokenizer, make, bad, expected)][:1]
    print("\n".join(problems), end="")
    counts = [len(part()) for part in (_samples, _shards, _pictures, _behind_the_index)]
    detail = "{} of texts, members and names, {} of tars, {} of pictures, {} behind the index".format(*counts)
    rest = "; named and counted, the other samples bit-equal, one line under raise and past the limit"
    return Figure(len(kinds) - len(problems), len(kinds), detail + rest)


def _look_at(
    folder: Path, name: str, tokenizer: Path, make: Callable[[Path], None], bad: set[str], expected: dict[str, Any]
) -> list[str]:
    """What is not as promised for a set with one kind of damage."""
    make(folder / name)
    indexed = (folder / name / INDEX_FILE).exists()
    changes: dict[str, Any] = {"microbatches": 1, "name": name}
    wrong = []
    if not _raises(lambda: _all_of_it(folder, name, tokenizer, "raise"), bad):
        wrong.append("not one line with the key under raise")
    if not indexed:
        (folder / name / INDEX_FILE).unlink(missing_ok=True)
    train, packs = _all_of_it(folder, name, tokenizer, "skip")
    named = {record.key for record in train.ledger.records} | {r.key for r in train.source.sets[0].known_bad()}
    if named - {""} != bad or (not bad and "" not in named):
        wrong.append(f"named {sorted(named)}, expected {sorted(bad)}")
    seen = {key.partition("/")[2].partition("#")[0] for pack in packs for key in pack.sample_keys}
    index = train.source.sets[0].index
    twice = {key for key in bad if list(index.keys()).count(key) > 1}  # of which the first one is good
    bad = bad - twice
    if seen & bad or not expected.keys() <= seen | bad:
        wrong.append(f"trained on {sorted(seen & bad)}, lost {sorted(expected.keys() - seen - bad)}")
    found = _samples_by_key(folder, name, set(expected))
    wrong += [f"{key} is another sample" for key in found if not _same(found[key], expected[key])]
    few = 0.9 / len(index)

    def limited() -> object:
        data = module(folder, **(changes | {"bad": "skip", "max_bad_share": few}))
        data.check(1)
        return list(loader(folder, **(changes | {"bad": "skip", "max_bad_share": few})))

    if not _raises(limited, bad | twice):
        wrong.append("not stopped past the limit")
    return wrong


def _all_of_it(folder: Path, name: str, tokenizer: Path, policy: str) -> Any:
    """Indexes where there is no index, and reads an epoch."""
    if not (folder / name / INDEX_FILE).exists():
        _index(folder / name, tokenizer, policy)
    data: PackedDataModule = module(folder, name, microbatches=1, bad=policy, max_bad_share=0.9)
    data.check(1)
    train = loader(folder, name=name, microbatches=1, bad=policy, max_bad_share=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each bad sample is one
        return train, [pack for step in train for pack in step]


def _raises(act: Callable[[], object], bad: set[str]) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            act()
    except (BadSample, ConfigError) as error:
        told = str(error)
        return "\n" not in told and (not bad or any(key in told for key in bad))
    return False


def _index(folder: Path, tokenizer: Path, policy: Any = "skip") -> None:
    shard_sets.index(folder, tokenizer, policy)


def _samples_by_key(folder: Path, name: str, keys: set[str] | None = None) -> dict[str, Any]:
    """The first text of each good sample."""
    (shards,) = module(folder, name, bad="skip", max_bad_share=0.9).sets("train")
    found = {}
    for i in range(len(shards.index)):
        key = shards.index.key(i)
        if keys is None or key in keys:
            try:
                found[key] = shards.sample(i, 0)
            except BadSample:
                continue
    return found


def _same(one: Any, other: Any) -> bool:
    tensors = torch.equal(one.input_ids, other.input_ids) and torch.equal(one.loss_mask, other.loss_mask)
    pictures = zip(one.images, other.images, strict=True)
    return tensors and all(torch.equal(a.images, b.images) for a, b in pictures)


def _write(folder: Path, members: list) -> None:
    """Good samples around `members`, in three shards."""
    by_key = dict(GOOD)

    def good(*keys: str) -> list:
        return [member for key in keys for member in sample(key, by_key[key], f"a red dog near {key[-1]}")]

    tars.write(folder / "s-0.tar", good(*(f"good{i}" for i in range(4))))
    tars.write(folder / "s-1.tar", [*good("0first"), *members, *good("zlast")])
    tars.write(folder / "s-2.tar", good(*(f"good{i}" for i in range(4, 8))))


def _samples() -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for name, (members, problems) in SAMPLES.items():
        bad = {key for key, problem in problems.items() if problem is not None}
        if bad:
            kinds[f"sample: {name}"] = (lambda folder, members=members: _write(folder, members)), bad
    return kinds


def _shards() -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for name in SHARDS:
        content, _, problems = damaged_shard(name)

        def make(folder: Path, content: bytes = content) -> None:
            _write(folder, [])
            tars.write(folder / "s-3.tar", content)

        kinds[f"shard: {name}"] = make, {key for key, problem in problems.items() if problem is not None}
    return kinds


def _pictures() -> dict[str, Kind]:
    """Files whose beginning is that of a good picture."""
    kinds: dict[str, Kind] = {}
    for name, suffix in FORMATS.items():
        file = io.BytesIO()
        noise(60, 50).save(file, name)
        data = file.getvalue()
        half = len(data) // 2
        broken = {
            "cut in the middle": data[:half],
            "without its last byte": data[:-1],
            "zeros behind its header": data[:20] + bytes(len(data) - 20),
            "text in its place": b"no picture " * 40,
            "of another format": _encoded("GIF"),
            "animated" if name != "JPEG" else "of no pixels": _animated(name) if name != "JPEG" else _no_pixels(data),
        }
        for kind, content in broken.items():
            members = [(f"k.{suffix}", content), ("k.json", OK)]
            kinds[f"{name}: {kind}"] = (lambda folder, members=members: _write(folder, members)), {"k"}
    return kinds


def _encoded(format: str) -> bytes:
    file = io.BytesIO()
    noise(60, 50).save(file, format)
    return file.getvalue()


def _animated(format: str) -> bytes:
    file = io.BytesIO()
    frames: list[Image.Image] = [noise(8, 8, seed) for seed in range(3)]
    frames[0].save(file, format, save_all=True, append_images=frames[1:])
    return file.getvalue()


def _no_pixels(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + bytes(4) + jpeg[at + 4 :]


def _behind_the_index() -> dict[str, Kind]:
    """What happens to a shard when it has been indexed: its size and time stay."""

    def damaged(suffix: str, member: int, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            _write(folder, [(f"k.{suffix}", _encoded(named[suffix])), ("k.json", OK)])
            _index(folder, folder.parent / "tokenizer.json")
            shards = ShardIndex.open(folder)
            place = shards.members(list(shards.keys()).index("k"))[member]
            path = folder / "s-1.tar"
            stamp, content = path.stat(), path.read_bytes()
            part = content[place.offset : place.offset + place.size]
            path.write_bytes(content[: place.offset] + change(part) + content[place.offset + place.size :])
            os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

        return make

    named = {suffix: format for format, suffix in FORMATS.items()}

    def flipped(part: bytes) -> bytes:
        return part[:-9] + bytes([part[-9] ^ 4]) + part[-8:]

    def reworded(part: bytes) -> bytes:
        return part.replace(b"a dog", b"a cat")

    kinds: dict[str, Kind] = {
        f"behind the index: a bit of a {suffix}": (damaged(suffix, 1, flipped), {"k"}) for suffix in named
    }
    kinds["behind the index: a word of a text"] = damaged("jpg", 0, reworded), {"k"}
    kinds["behind the index: a text of zeros"] = damaged("jpg", 0, lambda part: bytes(len(part))), {"k"}
    return kinds
