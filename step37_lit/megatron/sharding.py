"""Which part of each whole tensor a rank has: weights, and the optimizer's state of them.

A tensor's whole shape follows from the config alone (the name table), and a rank's part must fit into it: a weight that
is split in a way that is not known here is an error, never taken for a replicated one. The optimizer's shards are flat
ranges of a rank's weights; a range of a row-major array is a few boxes of it, and boxes are what checkpoints hold.
So a state of any layout can be read into any other one, and no rank needs more than its own share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from step37_lit.checkpoint.tensors import Part, Sharded, TensorFolder
from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError
from step37_lit.hub.load import loadable_weights
from step37_lit.hub.names import name_table
from step37_lit.megatron.initialize import global_name
from step37_lit.megatron.optimizer import ForwardingOptimizer
from step37_lit.model.step37_model import Step37Model

MODEL, OPTIMIZER = "model", "optimizer"  # folders of a checkpoint
MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "main_param"  # fp32 weights behind bf16 ones

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """`shape` numbers from `start` on, in each dimension."""

    start: Shape
    shape: Shape

    def overlap(self, other: Box) -> Box | None:
        start = tuple(map(max, self.start, other.start))
        shape = tuple(
            min(a + n, b + m) - s
            for a, n, b, m, s in zip(self.start, self.shape, other.start, other.shape, start, strict=True)
        )
        return Box(start, shape) if min(shape, default=1) > 0 else None

    def moved(self, by: Shape) -> Shape:
        return tuple(map(sum, zip(self.start, by, strict=True)))


@dataclass(frozen=True)
class Placement:
    """Where a rank's weight lies in the whole one.

    Args:
        shape: Of the whole weight.
        blocks: Boxes of the rank's weight, and how far each is moved in the whole one.
        replica: Number of this rank among those that have the same part.
        replicas: Their number.
    """

    shape: Shape
    blocks: tuple[tuple[Box, Shape], ...]
    replica: int
    replicas: int


def place(name: str, weight: Tensor, shape: Shape) -> Placement:
    """Where this rank's `weight` lies in the whole one of `shape`.

    Raises:
        RuntimeError: the weight is split in a way that its marks do not tell.
    """
    own: Shape = tuple(weight.shape)
    marks: Any = weight
    if not getattr(weight, "allreduce", True):  # megatron's mark of routed experts
        ranks = parallel_state.get_expert_tensor_parallel_world_size()
        blocks = _blocks(own, marks, parallel_state.get_expert_tensor_parallel_rank(), ranks)
        first = (parallel_state.get_expert_model_parallel_rank() * own[0], *(0 for _ in own[1:]))
        blocks = [(box, tuple(map(sum, zip(by, first, strict=True)))) for box, by in blocks]
        split = {0: parallel_state.get_expert_model_parallel_world_size(), marks.partition_dim: ranks}
        replica = parallel_state.get_expert_data_parallel_rank()
        replicas = parallel_state.get_expert_data_parallel_world_size()
    else:
        rank = parallel_state.get_tensor_model_parallel_rank()
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        if getattr(weight, "tensor_model_parallel", False):
            blocks, split = _blocks(own, marks, rank, ranks), {marks.partition_dim: ranks}
        else:
            origin = (0,) * len(own)
            blocks, split = [(Box(origin, own), origin)], {}
            replica, replicas = rank * replicas + replica, ranks * replicas
    if tuple(size * split.get(dim, 1) for dim, size in enumerate(own)) != shape:
        found = f"{own} on rank {dist.get_rank()}, marked as split by {split} (dimension: ranks)"
        raise RuntimeError(f"{name}: {found}, is no part of {shape}")
    return Placement(shape, tuple(blocks), replica, replicas)


def _blocks(own: Shape, marks: Any, rank: int, ranks: int) -> list[tuple[Box, Shape]]:
    """Boxes of a weight of shape `own` that ranks share as its marks tell, and how far each is moved in the whole."""
    dim, number_of_blocks = marks.partition_dim, marks.partition_stride if ranks > 1 else 1
    rows = own[dim] // number_of_blocks  # two blocks where gate and up are one matrix

    def along_dim(value: int, others: Shape) -> Shape:
        return (*others[:dim], value, *others[dim + 1 :])

    origin, blocks = (0,) * len(own), []
    for number in range(number_of_blocks):
        box = Box(along_dim(number * rows, origin), along_dim(rows, own))
        blocks.append((box, along_dim(number * rows * (ranks - 1) + rank * rows, origin)))
    return blocks


def boxes_of_range(shape: Shape, start: int, end: int) -> Iterator[tuple[Box, int]]:
    """The flat range [start, end) of a row-major array as boxes, each with where it begins in the range."""
    if not shape:
        yield Box((), ()), 0
        return
    row = math.prod(shape[1:])
    begin = start
    while begin < end:
        first, inside = divmod(begin, row)
        if inside == 0 and end - begin >= row:  # whole rows
            rows = (end - begin) // row
            yield Box((first,) + (0,) * (len(shape) - 1), (rows, *shape[1:])), begin - start
            begin += rows * row
        else:  # a part of one row
            stop = min(end, (first + 1) * row)
            for box, at in boxes_of_range(shape[1:], inside, stop - first * row):
                yield Box((first, *box.start), (1, *box.shape)), begin - start + at
            begin = stop


def whole_shapes(config: Step37Config) -> dict[str, Shape]:
    """Shape of every weight of the model, by its name in the whole model."""
    return {row.ours: row.shape for row in name_table(config) if row.ours is not None}


class OwnParts:
    """This rank's parts of the weights and of the optimizer's state.

    Args:
        chunks: The parts of the model on this rank.
    """

    def __init__(self, chunks: Sequence[Step37Model]):
        shapes = whole_shapes(chunks[0].step37)
        self.weights: dict[str, Tensor] = {}
        for chunk in chunks:
            for local, weight in loadable_weights(chunk).items():
                self.weights[global_name(chunk, local)] = weight
        unknown = sorted(set(self.weights) - set(shapes))
        if unknown:
            raise RuntimeError(f"weights that the name table does not know: {unknown}")
        self.places = {name: place(name, weight, shapes[name]) for name, weight in self.weights.items()}

    def model(self, writing: bool = False, writers: Mapping[str, int] | None = None) -> dict[str, Sharded]:
        """The weights; for writing only those that no other rank with the same part writes.

        Args:
            writing: Whether they are to be written, and not read.
            writers: Number of the replica that writes a weight, by name; others are shared out.
        """
        names = self._share_of_writing(writers or {}) if writing else list(self.weights)
        return {name: self._whole(name) for name in names}

    def optimizer(self, optimizer: ForwardingOptimizer, writing: bool = False) -> dict[str, Sharded]:
        """Moments and fp32 main weights of this rank's shards, as far as the optimizer has them."""
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        tensor_size = parallel_state.get_tensor_model_parallel_world_size()
        names = {id(weight): name for name, weight in self.weights.items()}
        turns = {name: number % tensor_size for number, name in enumerate(sorted(self.weights))}
        found: dict[str, Sharded] = {}
        for shard in optimizer.shards():
            name = names[id(shard.parameter)]
            place = self.places[name]
            # Replicated weights have the same shards on all tensor ranks: these take turns in writing.
            repeated = place.replicas > parallel_state.get_data_parallel_world_size(with_context_parallel=True)
            repeated &= getattr(shard.parameter, "allreduce", True)
            if writing and repeated and turns[name] != tensor_rank:
                continue
            tensors = {key: shard.state[key] for key in MOMENTS if key in shard.state}
            if shard.main.dtype != shard.parameter.dtype:  # else it is a view of the parameter
                tensors[MAIN] = shard.main
            for key, flat in tensors.items():
                parts = tuple(self._parts_of_range(name, flat.detach(), shard.start, shard.end))
                found[f"{key}.{name}"] = Sharded(place.shape, parts)
        return found

    def _whole(self, name: str) -> Sharded:
        weight, place = self.weights[name].detach(), self.places[name]
        return Sharded(place.shape, tuple(Part.of(_view(weight, box), box.moved(by)) for box, by in place.blocks))

    def _parts_of_range(self, name: str, flat: Tensor, start: int, end: int) -> Iterator[Part]:
        for box, at in boxes_of_range(tuple(self.weights[name].shape), start, end):
            numbers = flat[at : at + math.prod(box.shape)].view(box.shape)
            for block, by in self.places[name].blocks:
                common = box.overlap(block)
                if common is not None:
                    inside = Box(tuple(a - b for a, b in zip(common.start, box.start, strict=True)), common.shape)
                    yield Part.of(_view(numbers, inside), common.moved(by))

    def _share_of_writing(self, writers: Mapping[str, int]) -> list[str]:
        """Names of the weights that this rank writes: each to the replica that has the least to write so far."""
        share: list[str] = []
        loads: dict[int, list[int]] = {}
        for name in sorted(self.weights, key=lambda name: (-self.weights[name].nbytes, name)):
            place = self.places[name]
            load = loads.setdefault(place.replicas, [0] * place.replicas)
            writer = writers[name] if name in writers else load.index(min(load))
            load[writer] += self.weights[name].nbytes
            if writer == place.replica:
                share.append(name)
        return share


def _view(tensor: Tensor, box: Box) -> Tensor:
    return tensor[tuple(slice(start, start + n) for start, n in zip(box.start, box.shape, strict=True))]


def load_weights(chunks: Sequence[Step37Model], checkpoint: Path) -> None:
    """Reads this rank's weights from a checkpoint of any layout and dtype; `verify` must have passed it.

    Raises:
        ConfigError: the checkpoint is of another model.
    """
    tensors = OwnParts(chunks).model()
    folder = TensorFolder(checkpoint / MODEL)
    expected = set(whole_shapes(chunks[0].step37))
    if folder.names() != expected:
        missing, unexpected = sorted(expected - folder.names()), sorted(folder.names() - expected)
        found = f"missing {missing[:3]}, unexpected {unexpected[:3]}"
        raise ConfigError("checkpoint", f"the {len(expected)} weights of the model", found, folder.folder)
    with torch.no_grad():
        folder.read(tensors)


def load_optimizer(
    chunks: Sequence[Step37Model], optimizer: ForwardingOptimizer, checkpoint: Path, steps: Mapping[str, int]
) -> None:
    """Reads this rank's shards of the optimizer's state from a checkpoint of any layout.

    Args:
        chunks: The parts of the model on this rank, with the checkpoint's weights.
        optimizer: Is filled.
        checkpoint: Its folder.
        steps: Optimizer steps behind the moments of each weight that has some, by its name in the whole model.
    """
    own = OwnParts(chunks)
    names = {id(weight): name for name, weight in own.weights.items()}
    for shard in optimizer.shards():
        shard.begin(steps.get(names[id(shard.parameter)]))
    tensors = own.optimizer(optimizer)
    if tensors:
        with torch.no_grad():
            TensorFolder(checkpoint / OPTIMIZER).read(tensors)
    optimizer.loaded()


def steps_by_name(chunks: Sequence[Step37Model], optimizer: ForwardingOptimizer) -> dict[str, int]:
    """Of this rank's shards: optimizer steps behind the moments of each weight that has some."""
    names = {id(weight): name for name, weight in OwnParts(chunks).weights.items()}
    found = ((names[id(shard.parameter)], shard.step) for shard in optimizer.shards())
    return {name: step for name, step in found if step is not None}
