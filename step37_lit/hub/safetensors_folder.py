"""`SafetensorsFolder`: the tensors of a hub folder, whether one file or many, without loading them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from step37_lit.config import ConfigError
from step37_lit.hub.fields import read_json_object

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
FLOAT_DTYPES = ("F32", "F16", "BF16")


class SafetensorsFolder:
    """Open safetensors files of a folder; a context manager.

    Args:
        folder: Has `model.safetensors`, or `model.safetensors.index.json` and the shards that it names.

    Raises:
        ConfigError: both forms are there, the index and the shards differ, or a tensor stands in two shards.
        FileNotFoundError: neither form is there, or a shard is missing.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}
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
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ConfigError("weight_map", "an object of tensor names and file names", weight_map, index)
        for name in sorted(set(weight_map.values())):
            if Path(name).name != name:
                raise ConfigError("weight_map", "names of files in this folder", name, index)
            self._open(self.folder / name, opening)
        listed, found = set(weight_map), set(self._files)
        differing = sorted(listed ^ found)
        if differing:
            where = "no shard" if differing[0] in listed else "a shard, but not in the index"
            raise ConfigError("weight_map", f"the tensors of the shards ({len(differing)} differ)",
                              f"{differing[0]} in {where}", index)  # fmt: skip
        for name, file in weight_map.items():
            if self._files[name][0].name != file:
                raise ConfigError(f"weight_map.{name}", self._files[name][0].name, file, index)

    def _open(self, file: Path, opening: ExitStack) -> None:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        try:
            handle = opening.enter_context(safe_open(file, framework="pt"))
        except SafetensorError as error:
            raise ConfigError("the file", "safetensors", str(error), file) from error
        for name in handle.keys():  # noqa: SIM118 (a handle is no dictionary)
            if name in self._files:
                raise ConfigError(name, "one tensor of this name", f"another in {self._files[name][0].name}", file)
            self._files[name] = (file, handle)

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises `ConfigError` unless tensor `name` is floating point and has `shape`."""
        file, handle = self._files[name]
        entry = handle.get_slice(name)
        found = tuple(entry.get_shape())
        if found != shape:
            raise ConfigError(name, f"shape {shape}", found, file)
        if entry.get_dtype() not in FLOAT_DTYPES:
            raise ConfigError(name, " or ".join(FLOAT_DTYPES), entry.get_dtype(), file)

    def tensor(self, name: str) -> Tensor:
        """Tensor `name`, as stored."""
        return self._files[name][1].get_tensor(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
