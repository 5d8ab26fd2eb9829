"""Context and vision parallelism with one thing wrong each, as a table of what one step shows of it.

    python -m torch.distributed.run --standalone --nproc-per-node=2 tests/layouts/context_mutations.py \\
        '{"layout": {"context": 2}}'

A step's loss, gradient norm and number of encoded images are compared with one rank's by `test_context_mutations.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
from context_step_worker import one_step
from megatron.core import parallel_state
from torch import Tensor

from step37_lit.megatron import context, head, process, schedule, vision_parallel
from step37_lit.megatron.layout import ParallelLayout
from step37_lit.model import mtp, step37_model

Patch = pytest.MonkeyPatch
split_row, following, with_chunks = context.split_row, mtp.following, context.with_chunks


def _context() -> tuple[int, int]:
    group = parallel_state.get_context_parallel_group()
    return dist.get_rank(group), dist.get_world_size(group)


def label_over_a_seam(patch: Patch) -> None:
    """The last label of a rank's first chunk is of what follows on this rank, not of what follows in the row."""

    def split(row: Tensor, dim: int = 0) -> Tensor:
        own = split_row(row, dim).clone()
        seam = own.shape[1] // 2
        own[:, seam - 1] = own[:, seam]
        return own

    patch.setattr(head, "split_row", split)


def mtp_rolled_behind_the_split(patch: Patch) -> None:
    """MTP's inputs and labels at a seam are those of what follows on this rank."""

    def rolled(values: Tensor, cu_seqlens: Tensor) -> Tensor:
        out = following(values, cu_seqlens)
        chunks = 2 * _context()[1]
        length = len(values) // chunks
        out[length - 1 :: length] = 0
        for early in range(chunks // 2):
            out[(early + 1) * length - 1] = values[(chunks - 1 - early) * length]
        return out

    patch.setattr(mtp, "following", rolled)


def positions_of_another_rank(patch: Patch) -> None:
    def split(row: Tensor, dim: int = 0) -> Tensor:
        rank, ranks = _context()
        chunks = row.chunk(2 * ranks, dim)
        other = (rank + 1) % ranks
        return torch.cat((chunks[other], chunks[2 * ranks - 1 - other]), dim)

    patch.setattr(step37_model, "split_row", split)


def sees_its_own_chunk_only(patch: Patch) -> None:
    """Attention begins anew at each chunk's start."""

    def borders(packed: Any, rank: int, ranks: int) -> Any:
        length = int(packed.cu_seqlens_q[-1]) // (2 * ranks)
        seams = torch.arange(0, 2 * ranks + 1, dtype=torch.int32) * length
        packed.cu_seqlens_q = torch.cat((packed.cu_seqlens_q, seams)).unique()
        return with_chunks(packed, rank, ranks)

    patch.setattr(context, "with_chunks", borders)


def keys_of_this_rank_only_learn(patch: Patch) -> None:
    """Keys and values get the gradient of their own rank's queries, not of the others'."""

    def backward(ctx: Any, row: Tensor) -> tuple[Tensor, None]:
        return split_row(row), None

    patch.setattr(context._GatherRow, "backward", staticmethod(backward))


def encoded_twice(patch: Patch) -> None:
    """Every rank encodes all images, and the gradients of all ranks are added up."""

    class AddUp(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, features: Tensor) -> Tensor:
            return features.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            gradient = gradients[0].clone()
            dist.all_reduce(gradient, group=parallel_state.get_context_parallel_group())
            return gradient

    class EncodesAll(vision_parallel.SpreadImages):
        def __init__(self, images: Any, vision: Any):
            self.own = list(images)

        def gather(self, own: list[Tensor], like: Tensor, trains: bool) -> list[Tensor]:
            return [AddUp.apply(features) for features in own]

    patch.setattr(step37_model, "SpreadImages", EncodesAll)


def features_learn_from_this_rank_only(patch: Patch) -> None:
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.rank * ctx.longest :][: ctx.longest], None, None

    patch.setattr(vision_parallel._GatherFeatures, "backward", staticmethod(backward))


def images_swapped_between_ranks(patch: Patch) -> None:
    """Features of the ranks stand in each other's places."""

    def gathered(ctx: Any, padded: Tensor, anchor: Tensor, group: Any) -> Tensor:
        out = forward(ctx, padded, anchor, group)
        return out.view(dist.get_world_size(group), -1, out.shape[1]).flip(0).flatten(0, 1)

    forward = vision_parallel._GatherFeatures.forward
    patch.setattr(vision_parallel._GatherFeatures, "forward", staticmethod(gathered))


def tower_not_summed_over_tensor_ranks(patch: Patch) -> None:
    patch.setattr(vision_parallel, "sum_gradients", lambda modules: None)


def counted_on_every_rank(patch: Patch) -> None:
    """The loss is divided by the tokens of the whole pack on every context rank."""

    def loss_sum(weights: Tensor, pack: Any, losses: Tensor) -> Any:
        total, tokens, logged = original(weights, pack, losses)
        return total, pack.loss_mask.sum().to(tokens.dtype), logged

    original = schedule.loss_sum
    patch.setattr(schedule, "loss_sum", loss_sum)


NOTHING = "(nothing)"
CONTEXT: dict[str, Callable[[Patch], None]] = {
    "a label over a seam": label_over_a_seam,
    "MTP rolled behind the split": mtp_rolled_behind_the_split,
    "positions of another rank": positions_of_another_rank,
    "attention inside a chunk only": sees_its_own_chunk_only,
    "keys learn from their own rank only": keys_of_this_rank_only_learn,
    "tokens counted on every context rank": counted_on_every_rank,
    "images encoded twice": encoded_twice,
    "features learn from their own rank only": features_learn_from_this_rank_only,
    "features in each other's places": images_swapped_between_ranks,
}
TENSOR: dict[str, Callable[[Patch], None]] = {
    "images encoded twice": encoded_twice,
    "tower's gradients not summed over tensor ranks": tower_not_summed_over_tensor_ranks,
}


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    layout = ParallelLayout(**job["layout"])
    process.initialize(layout)
    found = {NOTHING: one_step(layout)}
    for name, change in (CONTEXT if layout.context > 1 else TENSOR).items():
        with pytest.MonkeyPatch.context() as patch:
            change(patch)
            found[name] = one_step(layout)
    if dist.get_rank() == 0:
        print("| wrong | loss | gradient norm | images |\n|---|---|---|---|")
        for name, values in found.items():
            print(f"| {name} | {values['loss']:.7f} | {values['norm']:.7f} | {values['images']:.0f} |")
        if "out" in job:
            Path(job["out"]).write_text(json.dumps(found))
    process.shutdown()


if __name__ == "__main__":
    main()
