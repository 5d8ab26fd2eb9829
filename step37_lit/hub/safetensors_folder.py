"""`SafetensorsFolder`: the tensors of a hub folder, whether one file or many, without loading them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from step37_lit.errors import ConfigError
from step37_lit.hub.fields import read_json_object
from step37_lit.hub.names import HubTensor
from step37_lit.hub.safetensors_file import Cut, Entry, SafetensorsFile

LONGEST_NAME = 255  # characters of a file's name
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


class SafetensorsFolder:
    """Open safetensors files of a folder; a context manager.

    Args:
        folder: Has `model.safetensors`, or `model.safetensors.index.json` and the shards that it names.

    Raises:
        ConfigError: both forms are there, the index and the shards differ, a tensor stands in two shards, or a file is
            no safetensors.
        FileNotFoundError: neither form is there, or a shard is missing.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.files: list[SafetensorsFile] = []
        self._file_of: dict[str, SafetensorsFile] = {}
        self._stack = ExitStack()
        single, index = self.folder / SINGLE_FILE, self.folder / INDEX_FILE
        if single.is_file() and index.is_file():
            raise ConfigError(str(self.folder), f"{SINGLE_FILE} or {INDEX_FILE}", "both")
        if not single.is_file() and not index.is_file():
            raise FileNotFoundError(f"{self.folder}: no {SINGLE_FILE} and no {INDEX_FILE}")
        with ExitStack() as opening:
            if single.is_file():
                self._open(single, opening)
            else:
                self._open_shards(index, opening)
            self._stack = opening.pop_all()

    def _open_shards(self, index: Path, opening: ExitStack) -> None:
        weight_map = read_json_object(index).get("weight_map")
        named = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
        if not weight_map or not named:
            raise ConfigError("weight_map", "an object of tensor names and file names", weight_map, index)
        present = {path.name for path in self.folder.iterdir()}
        for name in sorted(set(weight_map.values())):
            plain = Path(name).name == name and name.endswith(".safetensors") and len(name) <= LONGEST_NAME
            if not plain:
                raise ConfigError("weight_map", "names of safetensors files in this folder", name, index)
            if name not in present:
                raise FileNotFoundError(f"{self.folder / name}: no such file (the index names it)")
            self._open(self.folder / name, opening)
        listed, found = set(weight_map), set(self._file_of)
        differing = sorted(listed ^ found)
        if differing:
            where = "no shard" if differing[0] in listed else "a shard, but not in the index"
            raise ConfigError("weight_map", f"the tensors of the shards ({len(differing)} differ)",
                              f"{differing[0]} in {where}", index)  # fmt: skip
        for name, file in weight_map.items():
            if self._file_of[name].file.name != file:
                raise ConfigError(f"weight_map.{name}", self._file_of[name].file.name, file, index)

    def _open(self, path: Path, opening: ExitStack) -> None:
        file = SafetensorsFile(path)
        opening.callback(file.close)
        self.files.append(file)
        for name in file.entries:
            if name in self._file_of:
                found = f"another in {self._file_of[name].file.name}"
                raise ConfigError(name, "one tensor of this name", found, path)
            self._file_of[name] = file

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    def entry(self, name: str) -> Entry:
        """Dtype and shape of tensor `name`."""
        return self._file_of[name].entries[name]

    def file_of(self, name: str) -> Path:
        """The file that holds tensor `name`."""
        return self._file_of[name].file

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were read so far."""
        return sum(file.bytes_read for file in self.files)

    def check(self, tensor: HubTensor) -> None:
        """Raises `ConfigError` unless the tensor has the shape of the name table."""
        file = self._file_of[tensor.name]
        found = file.entries[tensor.name].shape
        if found != tensor.shape:
            raise ConfigError(tensor.name, f"shape {tensor.shape}", found, file.file)

    def read(self, name: str, target: Tensor, cuts: Sequence[Cut] = ()) -> None:
        """Fills a view with tensor `name`, or with a part of it (`SafetensorsFile.read`)."""
        self._file_of[name].read(name, target, cuts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
