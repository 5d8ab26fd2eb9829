"""`SafetensorsWriter`: a safetensors file tensor by tensor, hashed while it is written."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from step37_lit.hub.safetensors_file import DTYPE_NAMES, contiguous_bytes

ALIGNMENT = 8


class TensorSpec(NamedTuple):
    """A tensor that is to be written: name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """A new file; a context manager. Its tensors are written in the order of `specs`, which makes the header.

    Args:
        file: Path; overwritten.
        specs: Every tensor. Wide dtypes first, so that each tensor is aligned.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, file: Path, specs: Iterable[TensorSpec]):
        self._waiting = list(specs)
        self._waiting.reverse()
        self._hash = hashlib.sha256()
        self._file = file.open("wb", buffering=0)
        self._write(_header(self._waiting[::-1]))

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor, on the CPU: any view, written in row-major order and converted to the dtype of its spec."""
        spec = self._waiting.pop()
        if (spec.name, math.prod(spec.shape)) != (name, tensor.numel()):
            raise ValueError(f"expected {spec}, found {name} {list(tensor.shape)}")
        for block in contiguous_bytes(tensor.to(spec.dtype)):
            self._write(block)

    def finish(self) -> str:
        """The whole file is on the disk; returns its SHA-256, in hexadecimal."""
        if self._waiting:
            raise ValueError(f"{self._waiting[-1].name} and {len(self._waiting) - 1} more have not been written")
        os.fsync(self._file.fileno())
        return self._hash.hexdigest()

    def _write(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:  # a raw write takes 2 GiB at most
            left = left[self._file.write(left) :]
        self._hash.update(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _header(specs: list[TensorSpec]) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}  # which transformers asks for
    at = 0
    for spec in specs:
        offsets = [at, at + spec.nbytes]
        fields[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        at += spec.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
