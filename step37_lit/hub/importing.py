"""`convert import`: a hub folder -> a checkpoint of weights, one tensor at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from step37_lit import saved_model
from step37_lit.checkpoint import folder as checkpoint_folder
from step37_lit.checkpoint.tensors import Part, Sharded, write_tensors
from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError, require
from step37_lit.hub.config_json import read_hub_config
from step37_lit.hub.load import check_folder
from step37_lit.hub.names import Row, name_table
from step37_lit.hub.progress import Advance, byte_bar
from step37_lit.hub.safetensors_folder import SafetensorsFolder
from step37_lit.hub.text_files import TEMPLATE_FILE, TOKENIZER_FILE, text_files
from step37_lit.processor import Step37Processor
from step37_lit.text_file import read_text
from step37_lit.tokenizer import Step37Tokenizer

TEXT_FOLDER = "hub"  # in a checkpoint: the hub folder's text files, as they are
WEIGHTS_FOLDER = "model"


@dataclass(frozen=True)
class Imported:
    """What an import has done.

    Args:
        tensors: Tensors of the hub folder, each used once.
        num_bytes: Their bytes.
        text_files: Names of the files that were carried.
        left: Names of the files that were not.
    """

    tensors: int
    num_bytes: int
    text_files: tuple[str, ...]
    left: tuple[str, ...]


def import_hub(hub: str | Path, output: str | Path) -> Imported:
    """Writes the checkpoint of a hub folder, whole or not at all.

    Tensors keep their dtype; the routers' biases are fp32. MTP layers are taken where the folder has their tensors, and
    the checkpoint's config then builds them.

    Args:
        hub: Folder in either layout.
        output: The checkpoint's folder, which must not be there.

    Raises:
        ConfigError: the folder is inconsistent in any way, or the checkpoint cannot be written.
        FileNotFoundError: a file is missing.
    """
    source, target = Path(hub), Path(output)
    require(not target.exists(), "--output", "a path where nothing is", str(target))
    config = read_hub_config(source)
    with SafetensorsFolder(source) as folder:
        config = with_mtp_of(config, folder)
        check_folder(config, folder)
        rows = [row for row in name_table(config) if row.ours is not None]
        dtypes = {str(row.ours): stored_dtype(row, folder) for row in rows}
        processor = hub_processor(source, config)
        texts, left = text_files(source)
        names = [tensor.name for row in rows for tensor in row.hub]
        total = sum(folder.entry(name).nbytes for name in names)
        with checkpoint_folder.staging(target) as staged, byte_bar("import", total) as advance:
            checkpoint_folder.check_space(target.parent, total)
            tensors = {str(row.ours): _lazy(row, dtypes[str(row.ours)], folder, advance) for row in rows}
            write_tensors(staged / WEIGHTS_FOLDER, tensors)
            saved_model.write_description(staged, config, processor, None)
            (staged / TEXT_FOLDER).mkdir()
            for name, content in texts.items():
                if processor is None or name not in (TOKENIZER_FILE, TEMPLATE_FILE):  # which are written already
                    (staged / TEXT_FOLDER / name).write_bytes(content)
            main = max(set(dtypes.values()), key=lambda dtype: list(dtypes.values()).count(dtype))
            checkpoint_folder.commit(target, "weights", step=0, dtype=str(main).removeprefix("torch."))
    return Imported(len(names), total, tuple(texts), tuple(left))


def with_mtp_of(config: Step37Config, folder: SafetensorsFolder) -> Step37Config:
    """The config with its MTP layers built where the folder has tensors of them."""
    mtp = {tensor.name for row in name_table(config) if row.ours is None for tensor in row.hub}
    if not mtp & folder.names():
        return config
    return dataclasses.replace(config, text=dataclasses.replace(config.text, mtp=True))


def stored_dtype(row: Row, folder: SafetensorsFolder) -> torch.dtype:
    """Of our weight: the hub tensors'; fp32 where the table says so.

    Raises:
        ConfigError: tensors that are one weight here have different dtypes.
    """
    if row.fp32:
        return torch.float32
    first, *others = row.hub
    expected = folder.entry(first.name).dtype
    for tensor in others:
        found = folder.entry(tensor.name).dtype
        if found != expected:
            raise ConfigError(tensor.name, f"{expected} as {first.name}", str(found), folder.file_of(tensor.name))
    return expected


def hub_processor(hub: Path, config: Step37Config) -> Step37Processor | None:
    """Made of the folder's tokenizer and chat template, with local patches as the published model; None where it has no
    tokenizer."""
    if not (hub / TOKENIZER_FILE).is_file():
        return None
    template = hub / TEMPLATE_FILE
    text = read_text(template) if template.is_file() else None
    return Step37Processor(Step37Tokenizer.from_file(hub / TOKENIZER_FILE), config, text, multicrop=True)


def _lazy(row: Row, dtype: torch.dtype, folder: SafetensorsFolder, advance: Advance) -> Sharded:
    read: Callable[[], Tensor] = partial(_read, row, dtype, folder, advance)
    return Sharded(row.shape, (Part(read, (0,) * len(row.shape), row.shape, dtype),))


def _read(row: Row, dtype: torch.dtype, folder: SafetensorsFolder, advance: Advance) -> Tensor:
    weight = torch.empty(row.shape, dtype=dtype)
    views = row.conversion.views(weight, [tensor.shape for tensor in row.hub])
    for tensor, view in zip(row.hub, views, strict=True):
        folder.read(tensor.name, view)
        advance(folder.entry(tensor.name).nbytes)
    return weight
