"""Both ends of the decoder where tensor ranks share the work: the fused row, loss over a split vocabulary.

T = tokens of the pack, H = hidden.
"""

from __future__ import annotations

from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def scatter_to_sequence_ranks(fused: Tensor, config: TransformerConfig) -> Tensor:
    """[T, 1, H] -> this rank's [T / tensor ranks, 1, H] under sequence parallelism, else unchanged.

    After fusion and not in the embedding: every rank needs the whole row to put the images in.
    """
    if not config.sequence_parallel:
        return fused
    return tensor_parallel.scatter_to_sequence_parallel_region(fused)


def gather_from_sequence_ranks(hidden: Tensor, config: TransformerConfig) -> Tensor:
    """The reverse of `scatter_to_sequence_ranks`, for what every rank computes with in the same way."""
    if not config.sequence_parallel:
        return hidden
    # False: the gradient is whole and equal on every rank, so each keeps its rows of it.
    return tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)


def loss_per_token(
    output_layer: tensor_parallel.ColumnParallelLinear, hidden: Tensor, labels: Tensor, loss_mask: Tensor | None
) -> Tensor:
    """Cross entropy of each position, [1, T] in fp32, over the vocabulary split among the tensor ranks.

    Most positions of a caption pack are image or prompt: where `loss_mask` is 0 nothing is computed and the loss
    is 0. Under sequence parallelism the head gathers the row itself, so all positions are computed.

    Args:
        output_layer: Gives vocabulary-parallel logits.
        hidden: [T, 1, H] ([T / tensor ranks, 1, H] under sequence parallelism).
        labels: [1, T] int64.
        loss_mask: [1, T] or None for all.
    """
    if loss_mask is None:
        return _cross_entropy(output_layer, hidden, labels)
    if output_layer.sequence_parallel:
        return _cross_entropy(output_layer, hidden, labels) * (loss_mask != 0)
    learnt = loss_mask[0].nonzero().squeeze(1)
    losses = _cross_entropy(output_layer, hidden.index_select(0, learnt), labels.index_select(1, learnt))
    return losses.new_zeros(labels.shape).index_copy(1, learnt, losses)


def _cross_entropy(output_layer: tensor_parallel.ColumnParallelLinear, hidden: Tensor, labels: Tensor) -> Tensor:
    logits, _ = output_layer(hidden)
    losses = tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels.transpose(0, 1).contiguous())
    return losses.transpose(0, 1)
