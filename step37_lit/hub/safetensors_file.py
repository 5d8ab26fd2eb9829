"""`SafetensorsFile`: a safetensors file whose header is checked in full, read by slices into tensors that are there.

The format: 8 bytes, little endian, length of the header; the header, JSON: name -> dtype, shape, data_offsets; the
data, tensors behind each other without holes (https://github.com/huggingface/safetensors#format).

Read with `pread` and not mapped: a file that is cut short meanwhile is then an error and not SIGBUS, pages that were
read are not counted as this process's memory, and `bytes_read` is what was asked for.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from step37_lit.errors import ConfigError
from step37_lit.hub.fields import parse_json_object

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes; as the reference implementation
MOST_DIMENSIONS = 8  # the product of a million sizes takes hours
FOREIGN = {b"PK": "a zip file, as torch.save writes", b"\x80": "a pickle"}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Args:
        dtype: Its dtype.
        shape: Its shape.
        start: Its first byte in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Cut(NamedTuple):
    """Part number `part` (from 0) of `parts` equal ones along dimension `dim`."""

    dim: int
    part: int
    parts: int

    def of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the part of a tensor of `shape`.

        Raises:
            ValueError: the dimension does not divide.
        """
        if shape[self.dim] % self.parts:
            raise ValueError(f"dimension {self.dim} of {list(shape)} in {self.parts} parts")
        return (*shape[: self.dim], shape[self.dim] // self.parts, *shape[self.dim + 1 :])


class SafetensorsFile:
    """An open file.

    Args:
        file: Its path.

    Raises:
        ConfigError: it is no safetensors file: a header that is no JSON, names a tensor twice, or whose tensors
            overlap, leave holes or do not end with the file; a tensor that is not floating point; a file that cannot
            be read.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, file: Path):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        self.file = file
        self.bytes_read = 0
        try:
            self._handle = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise ConfigError("the file", "a file that can be read", error.strerror, file) from error
        try:
            self.entries = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._handle)

    def _read_header(self) -> dict[str, Entry]:
        size = os.fstat(self._handle).st_size
        head = os.pread(self._handle, 8, 0)
        length = int.from_bytes(head, "little")
        if size < 8 or not 2 <= length <= min(size - 8, LONGEST_HEADER):
            kinds = [kind for magic, kind in FOREIGN.items() if head.startswith(magic)]
            kinds.append(f"a header of {length} bytes in a file of {size}")
            raise ConfigError("the file", "safetensors", kinds[0], self.file)
        header = parse_json_object(os.pread(self._handle, length, 8), self.file)
        header.pop("__metadata__", None)
        data = 8 + length
        found = {name: self._entry(name, value, data) for name, value in header.items()}
        at = data
        for name, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if entry.start != at:
                raise ConfigError(name, f"data from byte {at - data} on (no overlap, no hole)", entry.start - data,
                                  self.file)  # fmt: skip
            at += entry.nbytes
        if at != size:
            raise ConfigError("the file", f"{at} bytes (header and {len(found)} tensors)", size, self.file)
        return found

    def _entry(self, name: str, value: Any, data: int) -> Entry:
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise ConfigError(name, "dtype, shape and data_offsets", value, self.file)
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ConfigError(name, " or ".join(DTYPES), dtype, self.file)
        for field, numbers in (("shape", shape), ("data_offsets", offsets)):
            sizes = isinstance(numbers, list) and len(numbers) <= MOST_DIMENSIONS
            if not sizes or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
                raise ConfigError(f"{name}: {field}", "a list of sizes", numbers, self.file)
        if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ConfigError(f"{name}: data_offsets", f"the bytes of {dtype} {shape}", offsets, self.file)
        return Entry(DTYPES[dtype], tuple(shape), data + offsets[0])

    def read(self, name: str, target: Tensor, cuts: Sequence[Cut] = ()) -> None:
        """Fills `target` with tensor `name`, or with the part that `cuts` leave of it, converted to its dtype.

        Args:
            name: The tensor.
            target: Any view with as many elements as the part, filled in row-major order.
            cuts: Of different dimensions.

        Raises:
            ConfigError: the file has become shorter, or cannot be read.
            ValueError: the part and `target` do not have the same number of elements.
        """
        entry = self.entries[name]
        if target.numel() * math.prod(cut.parts for cut in cuts) != math.prod(entry.shape):
            raise ValueError(f"{name}: {list(cuts)} of {list(entry.shape)} into {list(target.shape)}")
        direct = target.dtype == entry.dtype and target.device.type == "cpu"
        # A plain tensor where elements must be converted or moved on.
        place = target if direct else torch.empty(target.shape, dtype=entry.dtype)
        self._fill(name, _runs(entry, cuts), contiguous_bytes(place))
        if not direct:
            target.copy_(place)

    def _fill(self, name: str, runs: Iterator[tuple[int, int]], blocks: Iterator[memoryview]) -> None:
        at = left = 0
        for block in blocks:
            done = 0
            while done < len(block):
                if left == 0:
                    at, left = next(runs)
                try:
                    count = os.preadv(self._handle, [block[done : done + left]], at)
                except OSError as error:
                    raise ConfigError(name, "data that can be read", error.strerror, self.file) from error
                if count == 0:
                    raise ConfigError(name, "a file of the size that it had", "its end", self.file)
                at, left, done = at + count, left - count, done + count
                self.bytes_read += count


def _runs(entry: Entry, cuts: Sequence[Cut]) -> Iterator[tuple[int, int]]:
    """Place and length in bytes of what is contiguous in the file."""
    shape, first = entry.shape, [0] * len(entry.shape)
    for cut in cuts:
        shape = cut.of(shape)
        first[cut.dim] = cut.part * shape[cut.dim]
    last = max((cut.dim for cut in cuts if cut.parts > 1), default=-1)  # behind it all is contiguous
    if last < 0:
        yield entry.start, entry.nbytes
        return
    strides = [math.prod(entry.shape[dim + 1 :]) * entry.dtype.itemsize for dim in range(last + 1)]
    outer = (range(first[dim], first[dim] + shape[dim]) for dim in range(last))
    for place in itertools.product(*outer):
        at = sum(index * stride for index, stride in zip((*place, first[last]), strides, strict=True))
        yield entry.start + at, shape[last] * strides[last]


def contiguous_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a CPU tensor in row-major order, without a copy: one view for each contiguous block."""
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous():
        yield memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    else:
        for block in tensor:
            yield from contiguous_bytes(block)
