"""One global step through megatron's forward-backward schedule, and the same schedule for evaluation.

The loss of a step is the sum over learnt tokens divided by their number in the global batch, so it depends neither on
the layout nor on how samples fell into packs. Each MTP layer's loss is such a mean over the tokens that it learns,
which are fewer; what is differentiated is the main loss + `mtp_loss_weight` x the mean of the MTP layers' losses.
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
from step37_lit.errors import require
from step37_lit.megatron import cuda_names
from step37_lit.megatron.context import gather_row, split_row
from step37_lit.megatron.finite import StepWatch
from step37_lit.model.packing import following
from step37_lit.signals import Stop


@dataclass(frozen=True)
class StepResult:
    """What one global step was, the same numbers on every rank.

    Args:
        loss: Sum over the learnt tokens of the global batch / their number, 0-dim float64; without MTP.
        mtp_losses: The same of each MTP layer, [layers] float64; nan where no sample is long enough for it.
        learnt_tokens: Tokens with a loss.
        tokens: Tokens of the samples, without padding.
        row_tokens: Tokens of the packs, with padding.
        images: Images of all sizes.
        stop: Whether and why any rank asked to end training.
        finite: Whether all that the ranks' `watch` saw is finite.
    """

    loss: Tensor
    mtp_losses: Tensor
    learnt_tokens: int
    tokens: int
    row_tokens: int
    images: int
    stop: Stop
    finite: bool


def run_schedule(
    chunks: Sequence[nn.Module],
    microbatches: Sequence[PackedBatch],
    forward: Callable[[nn.Module, PackedBatch], Tensor],
    finish: Callable[[PackedBatch, Tensor], tuple[Tensor, Tensor, Any]],
    forward_only: bool,
) -> list[Any]:
    """Runs the microbatches through this rank's stage.

    Args:
        chunks: What this stage holds, in the model's order (several with virtual stages): megatron's DDP around each
            for training, the models themselves for evaluation.
        microbatches: This data-parallel rank's packs; the same list on all ranks that share a pack.
        forward: On every stage: what the model computes for a pack.
        finish: On the last stage: (scalar to differentiate, number of tokens (int32), anything to hand back).
        forward_only: No backward.

    Returns:
        What `finish` handed back for each microbatch; empty on all stages but the last.
    """
    count, stages = len(microbatches), parallel_state.get_pipeline_model_parallel_world_size()
    require(count > 0, "microbatches of a step", "at least one", 0)
    whole = len(chunks) == 1 or count % stages == 0
    require(whole, "microbatches of a step", f"a multiple of {stages} stages (virtual pipeline)", count)

    def step(iterator: Iterator[PackedBatch], model: nn.Module) -> tuple[Tensor, Callable]:
        pack = next(iterator)
        with cuda_names.native_names():
            return forward(model, pack), partial(finish, pack)

    with cuda_names.cpu_for_cuda():
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(microbatches) for _ in chunks],  # each chunk sees every pack
            model=list(chunks),
            num_microbatches=count,
            seq_length=microbatches[0].input_ids.shape[1],
            micro_batch_size=1,
            forward_only=forward_only,
        )


def train_step(
    chunks: Sequence[nn.Module],
    microbatches: Sequence[PackedBatch],
    stop: Stop = Stop.NONE,
    watch: StepWatch | None = None,
) -> StepResult:
    """Forward and backward of a global step; gradients end up in megatron's buffers, reduced and normalised.

    Args:
        chunks: megatron's DDP around each chunk of this rank's stage (`data_parallel.wrap`).
        microbatches: This data-parallel rank's packs.
        stop: This rank asks to end training; the answer of all ranks travels with the counts, so all end together.
        watch: Sees the step; its answer travels with the counts too.
    """
    config: Any = chunks[0].config
    text = config.step37.text
    layers = text.num_built_mtp_layers
    weights = loss_weights(microbatches, layers, text.mtp_loss_weight)

    def forward(model: nn.Module, pack: PackedBatch) -> Tensor:
        output = model(**pack.model_inputs(), with_mtp=True)
        if watch is not None:
            watch.see_output(model, output)
        return output

    if watch is not None:
        watch.begin()
    sums = run_schedule(chunks, microbatches, forward, partial(loss_sum, weights), forward_only=False)
    counts = torch.zeros(4 + len(Stop), dtype=torch.float64, device=microbatches[0].input_ids.device)
    heads = torch.zeros(2, 1 + layers, dtype=torch.float64, device=counts.device)  # sums of the losses, tokens
    if sums and parallel_state.get_tensor_model_parallel_rank() == 0:  # tensor ranks have the same losses
        heads = torch.stack([torch.stack(of_pack) for of_pack in sums]).double().sum(0)
    if sums and parallel_state.get_tensor_and_context_parallel_rank() == 0:  # one of the ranks that share the packs
        counts[0] = sum(pack.num_tokens for pack in microbatches)
        counts[1] = sum(pack.input_ids.numel() for pack in microbatches)
        counts[2] = sum(pack.num_images for pack in microbatches)
    if watch is not None:
        counts[3] = watch.end(sums)
    counts[4 + stop] = 1.0
    if dist.get_world_size() > 1:
        flat = torch.cat((counts, heads.flatten()))
        dist.all_reduce(flat)
        counts, heads = flat[: len(counts)], flat[len(counts) :].view_as(heads)
    tokens, row_tokens, images, wrong, *stops = counts.tolist()
    learnt = int(heads[1, 0])
    require(learnt > 0, "loss_mask of the global batch", "at least one learnt token", 0)
    means = heads[0] / heads[1]
    asked = max(reason for reason, ranks in zip(Stop, stops, strict=True) if ranks)
    numbers = (learnt, int(tokens), int(row_tokens), int(images))
    return StepResult(means[0], means[1:], *numbers, asked, wrong == 0)


def evaluate_step(
    chunks: Sequence[nn.Module], microbatches: Sequence[PackedBatch]
) -> list[tuple[PackedBatch, Tensor, Tensor]]:
    """Teacher-forced evaluation.

    Returns:
        On the last stage, for each pack: the pack, the loss of each token [1, T] in fp32, and the most likely next
        token [1, T] int64 over the whole vocabulary. Empty on other stages.
    """
    return run_schedule(chunks, microbatches, _logits, _loss_and_argmax, forward_only=True)


def loss_weights(microbatches: Sequence[PackedBatch], layers: int, mtp_loss_weight: float) -> Tensor:
    """[1 + layers] fp32: what the sum of each head's losses counts in the sum that is differentiated.

    megatron divides that sum by the learnt tokens of the main head, so an MTP layer's is scaled to its own, which are
    known from the masks before the forward pass.
    """
    weights = torch.ones(1 + layers, device=microbatches[0].input_ids.device)
    if layers == 0:
        return weights
    tokens = torch.stack([_learnt(pack, layers).sum(1) for pack in microbatches]).double().sum(0)
    dist.all_reduce(tokens, group=parallel_state.get_data_parallel_group())
    # A layer that learns nothing in this batch has no losses either: any finite weight will do.
    weights[1:] = mtp_loss_weight / layers * tokens[0] / tokens[1:].clamp(min=1)
    return weights


def _learnt(pack: PackedBatch, layers: int) -> Tensor:
    """[1 + layers, T], 1 where the main head and each MTP layer learn the token that they predict."""
    masks = [pack.loss_mask[0]]
    for _ in range(layers):
        masks.append(following(masks[-1], pack.cu_seqlens))
    return torch.stack(masks)


def loss_sum(weights: Tensor, pack: PackedBatch, losses: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """What the model's losses [1 + layers, T] of a pack come to: the scalar that is differentiated, the learnt tokens
    of the main head (int32), and for each head the sum of its losses and its tokens."""
    learnt = split_row(_learnt(pack, len(losses) - 1), dim=1)
    totals, tokens = (losses * learnt).sum(1), learnt.sum(1)
    return (totals * weights).sum(), tokens[0].to(torch.int32), (totals.detach(), tokens)


def _logits(model: nn.Module, pack: PackedBatch) -> Tensor:
    return model(**pack.model_inputs(labels=False))


def _loss_and_argmax(pack: PackedBatch, logits: Tensor) -> tuple[Tensor, Tensor, tuple[PackedBatch, Tensor, Tensor]]:
    predictions = _vocab_parallel_argmax(logits)  # first: the cross entropy overwrites the logits
    labels = split_row(pack.labels, dim=1)
    losses = vocab_parallel_cross_entropy(logits.float().transpose(0, 1), labels.transpose(0, 1)).transpose(0, 1)
    losses, predictions = (gather_row(row[0])[None] for row in (losses, predictions))
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
