"""`convert export`: a checkpoint -> a hub folder, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from step37_lit import saved_model
from step37_lit.checkpoint.folder import check_space
from step37_lit.checkpoint.manifest import MANIFEST, hash_file, verify
from step37_lit.checkpoint.tensors import TensorFolder
from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError, require
from step37_lit.hub.config_json import parse_hub_config
from step37_lit.hub.config_writer import ConfigLayout, hub_config, hub_facts, preprocessor_config
from step37_lit.hub.export_staging import ExportStaging
from step37_lit.hub.fields import parse_json_object
from step37_lit.hub.importing import TEXT_FOLDER, WEIGHTS_FOLDER
from step37_lit.hub.names import Row, name_table
from step37_lit.hub.progress import Advance, byte_bar
from step37_lit.hub.safetensors_folder import INDEX_FILE, SINGLE_FILE
from step37_lit.hub.safetensors_writer import SafetensorsWriter, TensorSpec
from step37_lit.hub.text_files import CONFIG_FILE, PREPROCESSOR_FILE, TEMPLATE_FILE, TOKENIZER_FILE, text_files


@dataclass(frozen=True)
class ExportOptions:
    """How a hub folder is written.

    Args:
        dtype: Of the tensors, the routers' biases excepted; None keeps each one's.
        shard_size: Bytes of tensors in a file; a larger weight has a file of its own.
        layout: Whose names of fields `config.json` has.
        like: Hub folder whose text files are carried, where the checkpoint has none; None carries the checkpoint's.
    """

    dtype: torch.dtype | None = None
    shard_size: int = 5_000_000_000
    layout: ConfigLayout = "hub"
    like: Path | None = None


@dataclass(frozen=True)
class Exported:
    """What an export has done.

    Args:
        tensors: Tensors of the hub folder.
        num_bytes: Their bytes.
        files: Files with tensors.
        kept: Of these, the files that an export that was cut off had finished.
        without_mtp: MTP layers of the config that the checkpoint does not have.
    """

    tensors: int
    num_bytes: int
    files: int
    kept: int
    without_mtp: int


@dataclass(frozen=True)
class Shard:
    """A safetensors file.

    Args:
        name: Of the file.
        rows: The weights in it, in order.
        specs: Their hub tensors, in order.
    """

    name: str
    rows: tuple[Row, ...]
    specs: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


def export_hub(checkpoint: str | Path, output: str | Path, options: ExportOptions | None = None) -> Exported:
    """Writes the hub folder of a checkpoint, which appears whole under its name or not at all.

    An export that was killed left what it had finished beside `output`; run again with the same checkpoint and options
    it keeps the files that are whole by their hash.

    Args:
        checkpoint: Folder of a checkpoint, of weights or of training.
        output: The hub folder, which must not be there or be empty.
        options: See there.

    Raises:
        ConfigError: the checkpoint is damaged or not of its model, or the folder cannot be written.
    """
    options = options if options is not None else ExportOptions()
    source, target = Path(checkpoint), Path(output)
    empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    require(empty, "--output", "a path where nothing is, or an empty folder", str(target))
    verify(source, only=WEIGHTS_FOLDER)
    config = saved_model.read_config(source)
    folder = TensorFolder(source / WEIGHTS_FOLDER)
    rows = checked_rows(config, folder)
    shards = plan_shards(rows, {str(row.ours): _dtype(row, folder, options) for row in rows}, options.shard_size)
    texts = _texts(source, config, shards, options)
    total = sum(shard.num_bytes for shard in shards)
    identity = {
        "checkpoint": hash_file(source / MANIFEST).sha256,
        "shards": [[shard.name, [[s.name, str(s.dtype), list(s.shape)] for s in shard.specs]] for shard in shards],
    }
    with ExportStaging(target, identity) as staging, byte_bar("export", total) as advance:
        kept = staging.kept()
        check_space(staging.path, sum(shard.num_bytes for shard in shards if shard.name not in kept))
        for shard in shards:
            if shard.name in kept:
                advance(shard.num_bytes)
            else:
                staging.finished(shard.name, _write(staging.path / shard.name, shard, folder, advance))
        for name, content in texts.items():
            staging.write(name, content)
        staging.commit()
    count = sum(len(shard.specs) for shard in shards)
    without = 0 if config.text.mtp else config.text.num_mtp_layers
    return Exported(count, total, len(shards), len(kept), without)


def checked_rows(config: Step37Config, folder: TensorFolder) -> list[Row]:
    """The rows of the name table that a checkpoint must have.

    Raises:
        ConfigError: it has others, or of other shapes.
    """
    rows = [row for row in name_table(config) if row.ours is not None]
    differing = sorted({str(row.ours) for row in rows} ^ folder.names())
    if differing:
        raise ConfigError("tensors", f"the {len(rows)} of the config", f"{len(differing)} differ ({differing[0]}, ...)",
                          folder.folder)  # fmt: skip
    for row in rows:
        name = str(row.ours)
        if folder.shape(name) != row.shape:
            raise ConfigError(name, f"shape {row.shape}", folder.shape(name), folder.folder)
    return rows


def _dtype(row: Row, folder: TensorFolder, options: ExportOptions) -> torch.dtype:
    if row.fp32:
        return torch.float32
    return folder.dtype(str(row.ours)) if options.dtype is None else options.dtype


def plan_shards(rows: Sequence[Row], dtypes: dict[str, torch.dtype], shard_size: int) -> list[Shard]:
    """Which weights go into which file, in the table's order; a weight's tensors stay together.

    In a file the wide dtypes come first, so that every tensor is aligned.
    """
    groups: list[list[Row]] = [[]]
    size = 0
    for row in rows:
        num_bytes = sum(spec.nbytes for spec in _specs(row, dtypes))
        if groups[-1] and size + num_bytes > shard_size:
            groups.append([])
            size = 0
        groups[-1].append(row)
        size += num_bytes
    shards = []
    for number, group in enumerate(groups, start=1):
        group.sort(key=lambda row: -dtypes[str(row.ours)].itemsize)
        specs = tuple(spec for row in group for spec in _specs(row, dtypes))
        name = SINGLE_FILE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        shards.append(Shard(name, tuple(group), specs))
    return shards


def _specs(row: Row, dtypes: dict[str, torch.dtype]) -> list[TensorSpec]:
    return [TensorSpec(tensor.name, dtypes[str(row.ours)], tensor.shape) for tensor in row.hub]


def _write(file: Path, shard: Shard, folder: TensorFolder, advance: Advance) -> str:
    """Writes a shard; returns its SHA-256."""
    with SafetensorsWriter(file, shard.specs) as writer:
        for row in shard.rows:
            weight = folder.tensor(str(row.ours))
            views = row.conversion.views(weight, [tensor.shape for tensor in row.hub])
            for tensor, view in zip(row.hub, views, strict=True):
                writer.write(tensor.name, view)
            advance(sum(spec.nbytes for spec in shard.specs if spec.name in {tensor.name for tensor in row.hub}))
            del weight, views, view  # before the next one is read
        return writer.finish()


def _texts(source: Path, config: Step37Config, shards: Sequence[Shard], options: ExportOptions) -> dict[str, bytes]:
    """Every file of the hub folder but those with tensors, by name."""
    place = options.like if options.like is not None else source / TEXT_FOLDER
    require(options.like is None or place.is_dir(), "--like", "a hub folder", str(options.like))
    texts = text_files(place)[0] if place.is_dir() else {}
    for name in (TOKENIZER_FILE, TEMPLATE_FILE):
        if (source / name).is_file():  # what it was trained with
            texts[name] = (source / name).read_bytes()
    dtypes = [spec.dtype for shard in shards for spec in shard.specs]
    fields = hub_config(config, options.layout, max(set(dtypes), key=dtypes.count))
    texts = with_config(config, fields, texts, place)
    if len(shards) > 1:
        weight_map = {spec.name: shard.name for shard in shards for spec in shard.specs}
        total = sum(shard.num_bytes for shard in shards)
        texts[INDEX_FILE] = _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return texts


def with_config(config: Step37Config, fields: dict[str, Any], texts: dict[str, bytes], place: Path) -> dict[str, bytes]:
    """Text files with a `config.json` of `fields`, or with the one among them where it says the same.

    Args:
        config: The model, of which `fields` are.
        fields: Of `config.json`.
        texts: Contents of text files by name.
        place: Where they are from, for messages.

    Raises:
        ConfigError: the tokenizer among them does not have the config's tokens.
        RuntimeError: what comes out is not read as `config`.
    """
    file, facts = place / CONFIG_FILE, hub_facts(config)
    texts = dict(texts)
    carried, made = texts.get(CONFIG_FILE), _json(fields)
    if parse_hub_config(made, file, texts).vision.crop_size != config.vision.crop_size:
        texts[PREPROCESSOR_FILE] = _json(preprocessor_config(config))
    if carried is None or not _says(carried, fields, facts, file, texts):
        texts[CONFIG_FILE] = made
    found = parse_hub_config(texts[CONFIG_FILE], file, texts)
    if found != facts:
        raise RuntimeError(f"config.json is read as {found}, made of {facts}")
    return texts


def _says(carried: bytes, fields: dict[str, Any], facts: Step37Config, file: Path, texts: dict[str, bytes]) -> bool:
    """Whether a `config.json` is of the same model, dtype and layout."""
    try:
        found, values = parse_hub_config(carried, file, texts), parse_json_object(carried, file)
    except ConfigError:
        return False
    in_transformers = "rope_parameters" in fields["text_config"]
    dtypes = [values.get(name) for name in ("dtype", "torch_dtype") if name in values]
    same_dtype = all(dtype == fields.get("dtype", fields.get("torch_dtype")) for dtype in dtypes)
    return found == facts and same_dtype and ("rope_parameters" in values["text_config"]) == in_transformers


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
