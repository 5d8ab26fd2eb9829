"""Tensors of a checkpoint: parts of whole tensors, written and read by torch's distributed checkpoint (DCP).

A rank has parts (boxes) of tensors by name. Which ranks, and how a tensor is cut, may differ between writing and
reading: DCP reads the overlaps.
"""

from __future__ import annotations

import errno
import math
import queue
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from step37_lit.checkpoint.metadata import read_metadata
from step37_lit.errors import ConfigError

Offsets = tuple[int, ...]
MAX_FILE_BYTES = 512 * 2**20  # torch's writer keeps the tensors of a file until it is written


@dataclass(frozen=True)
class Part:
    """A box of a tensor.

    Args:
        data: The box's numbers; for writing also a function that gives them when they are written.
        offsets: Where the box begins in the whole tensor.
        shape: Of the box.
        dtype: Of the numbers.
    """

    data: Tensor | Callable[[], Tensor]
    offsets: Offsets
    shape: Offsets
    dtype: torch.dtype

    @classmethod
    def of(cls, data: Tensor, offsets: Sequence[int]) -> Part:
        return cls(data, tuple(offsets), tuple(data.shape), data.dtype)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), torch.Size(self.shape))

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Sharded:
    """What this process has of a tensor.

    Args:
        shape: Of the whole tensor.
        parts: This process's boxes; they do not overlap with each other's.
    """

    shape: Offsets
    parts: tuple[Part, ...]


Tensors = Mapping[str, Sharded]


def write_tensors(folder: Path, tensors: Tensors, group: dist.ProcessGroup | None = None) -> None:
    """Writes the parts of all ranks of `group` into a folder; a box that several have is written once.

    Args:
        folder: Is made where it is absent.
        tensors: By name, a rank's own; together they must be whole.
        group: A gloo group, which must not be used by another thread at the same time; None is this process alone.

    Raises:
        OSError: a file cannot be written, on any rank; names it.
        RuntimeError: anything else; names the ranks.
    """
    writer, planner = _Writer(folder), _SavePlanner()
    if group is None:
        planner.set_up_planner(dict(tensors), is_coordinator=True)
        writer.set_up_storage_writer(True)
        plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
        (plan,) = writer.prepare_global_plan(plans)
        writer.finish(metadata, [writer.write_data(planner.finish_plan(plan), planner).value()])
        return
    try:
        dcp.save(dict(tensors), storage_writer=writer, planner=planner, process_group=group)
    except dcp.CheckpointException as error:  # not an Exception
        causes = {rank: cause for rank, (cause, _) in error.failures.items()}
        of_files = [cause for cause in causes.values() if isinstance(cause, OSError)]
        raise (of_files[0] if of_files else RuntimeError(f"writing {folder}, by rank: {causes}")) from error


class TensorFolder:
    """Tensors that `write_tensors` wrote.

    Args:
        folder: With `.metadata` and its files.

    Raises:
        ConfigError: see `read_metadata`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.metadata = read_metadata(folder)

    def names(self) -> set[str]:
        return set(self.metadata.state_dict_metadata)

    def shape(self, name: str) -> Offsets:
        return tuple(self._described(name).size)

    def dtype(self, name: str) -> torch.dtype:
        return self._described(name).properties.dtype

    def tensor(self, name: str) -> Tensor:
        """One whole tensor."""
        target = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.read({name: Sharded(self.shape(name), (Part.of(target, (0,) * target.dim()),))})
        return target

    def read(self, tensors: Tensors) -> None:
        """Fills the parts in place, in their dtype; only the pieces that overlap with them are read.

        Raises:
            ConfigError: a name is not there, or of another shape, or its bytes are not the tensor that is described.
        """
        planner, reader = _LoadPlanner(self.folder), FileSystemReader(self.folder)
        planner.set_up_planner(dict(tensors), self.metadata, is_coordinator=True)
        reader.set_up_storage_reader(self.metadata, True)
        plan = planner.create_local_plan()
        try:
            with warnings.catch_warnings(action="ignore"):  # of a pickle's protocol
                reader.read_data(plan, planner).wait()
        except Exception as error:  # torch and pickle raise nearly everything for bytes that are no tensor
            raise self._unreadable(error) from error

    def _unreadable(self, cause: BaseException) -> ConfigError:
        return ConfigError("checkpoint", "tensors as .metadata describes them", found_by_torch(cause), self.folder)

    def _described(self, name: str) -> TensorStorageMetadata:
        described = self.metadata.state_dict_metadata.get(name)
        if not isinstance(described, TensorStorageMetadata):
            raise ConfigError("checkpoint", f"a tensor {name}", f"{len(self.names())} others", self.folder)
        return described


class _Writer(FileSystemWriter):
    """torch's writer with files of a bounded size, which are synced by the commit."""

    def __init__(self, folder: Path):
        super().__init__(folder, sync_files=False, per_thread_copy_ahead=0)
        self.folder = folder

    def storage_meta(self) -> None:
        """Nothing about the folder: a checkpoint may be moved."""

    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, items in enumerate(_by_size(plan.items, MAX_FILE_BYTES)):
            name = f"{plan.storage_data.prefix}{number}.distcp"
            files: queue.Queue = queue.Queue()
            files.put((self.folder / name, name, items))
            checked = get_crc32_options()
            # torch sums up every tensor with the interpreter locked; the manifest has a better sum of every file.
            set_crc32_options(False)
            try:
                results += self._write_data(planner, files).value()
            except (OSError, RuntimeError) as error:
                raise _write_error(error, self.folder / name) from error
            finally:
                set_crc32_options(checked)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _write_error(error: BaseException, file: Path) -> OSError:
    """The system's error with the file's name, which neither a failed write nor torch's archive writer tells.

    torch gives up with "unexpected pos" when less was written than it asked for; the reason stands behind it.
    """
    reason: BaseException | None = error
    while reason is not None and not isinstance(reason, OSError):
        reason = reason.__cause__ or reason.__context__
    if reason is None:
        return OSError(errno.EIO, str(error).splitlines()[0], str(file))
    return OSError(reason.errno, reason.strerror, str(file))


def _by_size(items: Sequence[WriteItem], limit: int) -> Iterator[list[WriteItem]]:
    """The items in their order, in lists of at most `limit` bytes or of one item."""
    collected: list[WriteItem] = []
    size = 0
    for item in items:
        assert item.tensor_data is not None
        added = math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
        if collected and size + added > limit:
            yield collected
            collected, size = [], 0
        collected.append(item)
        size += added
    if collected:
        yield collected


class _SavePlanner(DefaultSavePlanner):
    """Plans `Sharded` values; torch's part removes what several ranks have and checks that tensors are whole."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self._parts: dict[tuple[str, Offsets], Part] = {}
        items = []
        for name, tensor in self.state_dict.items():
            for part in tensor.parts:
                index = MetadataIndex(name, part.offsets)
                properties = TensorProperties(dtype=part.dtype)
                data = TensorWriteData(part.chunk, properties, torch.Size(tensor.shape))
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
                self._parts[name, part.offsets] = part
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        index = write_item.index
        assert index.offset is not None
        part = self._parts[index.fqn, tuple(index.offset)]
        data = part.data if isinstance(part.data, Tensor) else part.data()
        if tuple(data.shape) != part.shape or data.dtype != part.dtype:
            given = f"{tuple(data.shape)} {data.dtype}"
            raise RuntimeError(f"{index.fqn}: announced {part.shape} {part.dtype}, given {given}")
        return data.detach().contiguous()


class _LoadPlanner(LoadPlanner):
    """Plans the pieces that overlap with the parts to be filled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self.tensors: Tensors = state_dict
        self.described = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for name, tensor in self.tensors.items():
            described = self.described.get(name)
            if not isinstance(described, TensorStorageMetadata) or tuple(described.size) != tensor.shape:
                found = list(described.size) if isinstance(described, TensorStorageMetadata) else None
                raise ConfigError("checkpoint", f"{name} of shape {list(tensor.shape)}", found, self.folder)
            items += create_read_items_for_chunk_list(name, described, [part.chunk for part in tensor.parts])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise RuntimeError(f"{read_item.dest_index.fqn}: bytes in place of a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index
        assert index.index is not None
        target = self.tensors[index.fqn].parts[index.index].data
        assert isinstance(target, Tensor)
        return narrow_tensor_by_index(target.detach(), read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


def found_by_torch(error: BaseException) -> str:
    """What `torch.load` found, without the advice in front of it to run what is in the file."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if "WeightsUnpickler error" in line), lines[0])
