"""Both ends of the decoder where ranks share the work: the fused row, loss over a split vocabulary.

T = tokens of the pack, H = hidden. A rank's share of a row is T / context ranks, and under sequence parallelism that
over the tensor ranks.
"""

from __future__ import annotations

from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from step37_lit.megatron.context import gather_row, split_row


def scatter_to_sequence_ranks(fused: Tensor, config: TransformerConfig) -> Tensor:
    """[T, 1, H] -> this rank's share of the row.

    After fusion and not in the embedding: every rank needs the whole row to put the images in.
    """
    own = split_row(fused)
    return tensor_parallel.scatter_to_sequence_parallel_region(own) if config.sequence_parallel else own


def gather_from_sequence_ranks(hidden: Tensor, config: TransformerConfig) -> Tensor:
    """The reverse of `scatter_to_sequence_ranks`; tensor ranks must go on with the row in the same way."""
    if config.sequence_parallel:
        # False: the gradient is whole and equal on every rank, so each keeps its rows of it.
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    return gather_row(hidden)


def loss_per_token(
    output_layer: tensor_parallel.ColumnParallelLinear, hidden: Tensor, labels: Tensor, loss_mask: Tensor | None
) -> Tensor:
    """Cross entropy of each position, [1, T / context ranks] in fp32, over the vocabulary split among tensor ranks.

    Most positions of a caption pack are image or prompt: where `loss_mask` is 0 nothing is computed and the loss
    is 0. Under sequence parallelism the head gathers the row itself, so all positions are computed.

    Args:
        output_layer: Gives vocabulary-parallel logits.
        hidden: This rank's share of [T, 1, H].
        labels: [1, T] int64, of the whole pack.
        loss_mask: [1, T] of the whole pack, or None for all.
    """
    labels = split_row(labels, dim=1)
    if loss_mask is None:
        return _cross_entropy(output_layer, hidden, labels)
    loss_mask = split_row(loss_mask, dim=1)
    if output_layer.sequence_parallel:
        return _cross_entropy(output_layer, hidden, labels) * (loss_mask != 0)
    learnt = loss_mask[0].nonzero().squeeze(1)
    losses = _cross_entropy(output_layer, hidden.index_select(0, learnt), labels.index_select(1, learnt))
    return losses.new_zeros(labels.shape).index_copy(1, learnt, losses)


def _cross_entropy(output_layer: tensor_parallel.ColumnParallelLinear, hidden: Tensor, labels: Tensor) -> Tensor:
    logits, _ = output_layer(hidden)
    losses = tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels.transpose(0, 1).contiguous())
    return losses.transpose(0, 1)
