"""One rank of a model-parallel group reads its packs; the others get them from it.

So a picture is decoded once, and the ranks agree on a pack also where a sample could not be read. Token tensors go to
every rank, pixels only to the first pipeline stage, which has the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from step37_lit.batch import ImageForInsert, PackedBatch


def is_reader() -> bool:
    """Whether this rank reads for its group: the first tensor and context rank of the first stage."""
    shares_stage = parallel_state.get_tensor_and_context_parallel_rank()
    return shares_stage == 0 and parallel_state.is_pipeline_first_stage(ignore_virtual=True)


def share_packs(packs: Sequence[PackedBatch]) -> list[PackedBatch]:
    """The reader's packs on every rank of its group; collective.

    Args:
        packs: What this rank's loader gave, on its device; only the reader's counts.

    Returns:
        The same packs everywhere. Behind the first stage, pixels are zeros of the same shape that take no memory.
    """
    of_stage = parallel_state.get_tensor_and_context_parallel_group()
    stages = parallel_state.get_pipeline_model_parallel_group()
    if dist.get_world_size(of_stage) == dist.get_world_size(stages) == 1:
        return list(packs)
    held = [[_without_pixels(pack) for pack in packs] if is_reader() else None]
    is_first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    if is_first:
        dist.broadcast_object_list(held, group=of_stage, group_src=0)
    dist.broadcast_object_list(held, group=stages, group_src=0)
    shared = held[0]
    assert shared is not None
    if not is_first:
        return shared
    given = packs if is_reader() else [None] * len(shared)
    return [_with_pixels(pack, own) for pack, own in zip(shared, given, strict=True)]


def _without_pixels(pack: PackedBatch) -> PackedBatch:
    """On the CPU, to be pickled: shapes and dtypes of the pixels stay."""

    def hollow(image: ImageForInsert) -> ImageForInsert:
        pixels = image.images
        assert pixels is not None, "loaders hand over pixels"
        return replace(image, images=torch.zeros(1, dtype=pixels.dtype).expand(pixels.shape))

    return replace(replace(pack, images=[]).to("cpu"), images=[hollow(image) for image in pack.images])


def _with_pixels(hollow: PackedBatch, own: PackedBatch | None) -> PackedBatch:
    group = parallel_state.get_tensor_and_context_parallel_group()
    images = []
    for number, image in enumerate(hollow.images):
        pixels: Tensor | None = image.images if own is None else own.images[number].images
        assert pixels is not None
        received = torch.empty(pixels.shape, dtype=pixels.dtype) if own is None else pixels
        received = received.to(_device()).contiguous()
        dist.broadcast(received, group=group, group_src=0)
        images.append(replace(image, images=received))
    return replace(hollow, images=images)


def _device() -> torch.device:
    """Where the process groups' collectives work."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
