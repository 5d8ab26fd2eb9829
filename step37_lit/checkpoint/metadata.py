"""`.metadata` of torch's distributed checkpoints, read so that nothing in it can run.

torch pickles this file and unpickles it with the full power of pickle. Here an unpickler knows nothing but the data
classes that torch writes, and what it made is checked: only tensors, whose bytes lie inside files of the folder.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from step37_lit.errors import ConfigError

METADATA = ".metadata"
_OF_METADATA = (
    "Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata",
    "MetadataIndex",
)  # fmt: skip
ALLOWED = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _OF_METADATA),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", name) for name in ("float32", "float64", "bfloat16", "float16")),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """Reads and checks `.metadata` of a folder that torch's FileSystemWriter wrote.

    Raises:
        ConfigError: it names anything but torch's data classes, or what it describes cannot be.
    """
    file = folder / METADATA
    if not file.is_file():
        raise ConfigError("checkpoint", "a file", "none", file)
    try:
        metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
    except pickle.UnpicklingError as error:
        raise ConfigError("checkpoint", "nothing but torch's metadata of tensors", str(error), file) from error
    except Exception as error:  # a damaged pickle raises nearly everything
        raise ConfigError("checkpoint", "torch's metadata of tensors", f"{type(error).__name__}", file) from error
    try:
        _check(metadata, folder, file)
    except (AttributeError, TypeError) as error:  # fields that are missing or of another type
        raise ConfigError("checkpoint", "torch's metadata of tensors", str(error), file) from error
    return metadata


def _check(metadata: Any, folder: Path, file: Path) -> None:
    def require(condition: bool, expected: object, found: object) -> None:
        if not condition:
            raise ConfigError("checkpoint", expected, found, file)

    require(type(metadata) is Metadata, "torch's Metadata", type(metadata).__name__)
    sizes: dict[str, int] = {}
    for index, info in metadata.storage_data.items():
        require(type(index) is MetadataIndex and type(info) is _StorageInfo, "where tensors lie", type(info).__name__)
        name = info.relative_path
        require(type(name) is str and name == Path(name).name != "", "names of files in the folder", name)
        if name not in sizes:
            path = folder / name
            require(path.is_file() and not path.is_symlink(), f"{name}: a file", "none")
            sizes[name] = path.stat().st_size
        inside = type(info.offset) is type(info.length) is int and 0 <= info.offset <= sizes[name] - info.length
        require(inside and info.length >= 0, f"{name}: places in {sizes[name]} bytes", (info.offset, info.length))
        require(not info.transform_descriptors, f"{name}: bytes as they are", info.transform_descriptors)
    for key, tensor in metadata.state_dict_metadata.items():
        is_tensor = type(key) is str and type(tensor) is TensorStorageMetadata
        require(is_tensor, "only tensors", (key, type(tensor).__name__))
        require(type(tensor.properties) is TensorProperties, f"{key}: a tensor's properties", type(tensor.properties))
        require(isinstance(tensor.properties.dtype, torch.dtype), f"{key}: a dtype", tensor.properties.dtype)
        _check_chunks(key, tensor, metadata, file)


def _check_chunks(key: str, tensor: TensorStorageMetadata, metadata: Metadata, file: Path) -> None:
    volume = 0
    for chunk in tensor.chunks:
        inside = type(chunk) is ChunkStorageMetadata and len(chunk.offsets) == len(chunk.sizes) == len(tensor.size)
        extents = zip(chunk.offsets, chunk.sizes, tensor.size, strict=True) if inside else ()
        inside = inside and all(first >= 0 and n > 0 and first + n <= size for first, n, size in extents)
        if not inside or MetadataIndex(key, chunk.offsets) not in metadata.storage_data:
            raise ConfigError("checkpoint", f"{key}: pieces of {list(tensor.size)} with a place", chunk, file)
        volume += math.prod(chunk.sizes)
    if volume != math.prod(tensor.size):
        raise ConfigError("checkpoint", f"{key}: {math.prod(tensor.size)} numbers", volume, file)
