"""One global step through megatron's forward-backward schedule, and the same schedule for evaluation.

The loss of a step is the sum over learnt tokens divided by their number in the global batch, so it depends neither on
the layout nor on how samples fell into packs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor, nn

from step37_lit.batch import PackedBatch
from step37_lit.config import require
from step37_lit.megatron import cuda_names


@dataclass(frozen=True)
class StepResult:
    """What one global step was, the same numbers on every rank.

    Args:
        loss: Sum over the learnt tokens of the global batch / their number, 0-dim float64.
        learnt_tokens: Tokens with a loss.
        tokens: Tokens of the samples, without padding.
        row_tokens: Tokens of the packs, with padding.
        images: Images of all sizes.
        stop: Whether any rank asked to end training.
    """

    loss: Tensor
    learnt_tokens: int
    tokens: int
    row_tokens: int
    images: int
    stop: bool


def run_schedule(
    model: nn.Module,
    microbatches: Sequence[PackedBatch],
    forward: Callable[[nn.Module, PackedBatch], Tensor],
    finish: Callable[[PackedBatch, Tensor], tuple[Tensor, Tensor, Any]],
    forward_only: bool,
) -> list[Any]:
    """Runs the microbatches through this rank's stage.

    Args:
        model: megatron's DDP around the model for training, the model for evaluation.
        microbatches: This data-parallel rank's packs; the same list on all ranks that share a pack.
        forward: On every stage: what the model computes for a pack.
        finish: On the last stage: (scalar to differentiate, number of tokens (int32), anything to hand back).
        forward_only: No backward.

    Returns:
        What `finish` handed back for each microbatch; empty on all stages but the last.
    """
    require(len(microbatches) > 0, "microbatches of a step", "at least one", 0)

    def step(iterator: Iterator[PackedBatch], model: nn.Module) -> tuple[Tensor, Callable]:
        pack = next(iterator)
        with cuda_names.native_names():
            return forward(model, pack), partial(finish, pack)

    with cuda_names.cpu_for_cuda():
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(microbatches),
            model=[model],
            num_microbatches=len(microbatches),
            seq_length=microbatches[0].input_ids.shape[1],
            micro_batch_size=1,
            forward_only=forward_only,
        )


def train_step(model: nn.Module, microbatches: Sequence[PackedBatch], stop: bool = False) -> StepResult:
    """Forward and backward of a global step; gradients end up in megatron's buffers, reduced and normalised.

    Args:
        model: megatron's DDP.
        microbatches: This data-parallel rank's packs.
        stop: This rank asks to end training; the answer of all ranks travels with the counts, so all end together.
    """
    sums = run_schedule(model, microbatches, _losses, _loss_sum, forward_only=False)
    counts = torch.zeros(6, dtype=torch.float64, device=microbatches[0].input_ids.device)
    if sums and parallel_state.get_tensor_model_parallel_rank() == 0:  # others see the same packs: counted once
        counts[0] = torch.stack([loss for loss, _ in sums]).double().sum()
        counts[1] = torch.stack([tokens for _, tokens in sums]).sum()
        counts[2] = sum(pack.num_tokens for pack in microbatches)
        counts[3] = sum(pack.input_ids.numel() for pack in microbatches)
        counts[4] = sum(pack.num_images for pack in microbatches)
    counts[5] = float(stop)
    if dist.get_world_size() > 1:
        dist.all_reduce(counts)
    _, learnt, tokens, row_tokens, images, stops = counts.tolist()
    require(learnt > 0, "loss_mask of the global batch", "at least one learnt token", 0)
    return StepResult(counts[0] / counts[1], int(learnt), int(tokens), int(row_tokens), int(images), stops > 0)


def evaluate_step(model: nn.Module, microbatches: Sequence[PackedBatch]) -> list[tuple[PackedBatch, Tensor, Tensor]]:
    """Teacher-forced evaluation.

    Returns:
        On the last stage, for each pack: the pack, the loss of each token [1, T] in fp32, and the most likely next
        token [1, T] int64 over the whole vocabulary. Empty on other stages.
    """
    return run_schedule(model, microbatches, _logits, _loss_and_argmax, forward_only=True)


def _losses(model: nn.Module, pack: PackedBatch) -> Tensor:
    return model(**pack.model_inputs())


def _loss_sum(pack: PackedBatch, losses: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    total = (losses * pack.loss_mask).sum()
    tokens = pack.loss_mask.sum().to(torch.int32)
    return total, tokens, (total.detach(), tokens)


def _logits(model: nn.Module, pack: PackedBatch) -> Tensor:
    return model(**pack.model_inputs(labels=False))


def _loss_and_argmax(pack: PackedBatch, logits: Tensor) -> tuple[Tensor, Tensor, tuple[PackedBatch, Tensor, Tensor]]:
    predictions = _vocab_parallel_argmax(logits)  # first: the cross entropy overwrites the logits
    losses = vocab_parallel_cross_entropy(logits.float().transpose(0, 1), pack.labels.transpose(0, 1)).transpose(0, 1)
    tokens = pack.loss_mask.sum().to(torch.int32)
    return (losses * pack.loss_mask).sum(), tokens, (pack, losses, predictions)


def _vocab_parallel_argmax(logits: Tensor) -> Tensor:
    """Index of the largest of logits [1, T, V / ranks] in the whole vocabulary; the lowest one where several tie."""
    group = parallel_state.get_tensor_model_parallel_group()
    best, index = logits.float().max(dim=-1)
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return index
    index = index + dist.get_rank(group) * logits.shape[-1]
    bests = best.new_empty((ranks, best.shape[1]))
    indices = index.new_empty((ranks, index.shape[1]))
    dist.all_gather_into_tensor(bests, best.contiguous(), group=group)
    dist.all_gather_into_tensor(indices, index.contiguous(), group=group)
    return indices.gather(0, bests.argmax(dim=0, keepdim=True))
