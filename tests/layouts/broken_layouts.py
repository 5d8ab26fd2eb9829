"""What is wrong on purpose: one fault for each kind of parallelism, each with a layout in which it must show."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
from layout_parity import Layout
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch import Tensor

from step37_lit.megatron import data_parallel, schedule
from step37_lit.model.experts import GroupedExperts

Patch = pytest.MonkeyPatch
finalize = import_module("megatron.core.distributed.finalize_model_grads")  # the package gives the function this name


@dataclass(frozen=True)
class Broken:
    """A fault.

    Args:
        layout: Must notice it.
        patch: Makes it.
    """

    layout: Layout
    patch: Callable[[Patch], None]


def nothing(*args: Any, **kwargs: Any) -> None:
    pass


def function(owner: object, name: str, replacement: Callable) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(owner, name, replacement)


def experts_like_other_weights(patch: Patch) -> None:
    """Their gradients are summed over ranks that have other experts."""
    original = GroupedExperts.__init__

    def replaced(self: GroupedExperts, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.weight1.allreduce = self.weight2.allreduce = True

    patch.setattr(GroupedExperts, "__init__", replaced)


def counts_of_this_rank(patch: Patch) -> None:
    """The router's bias moves by what the rank itself has seen."""
    original = moe_utils.get_updated_expert_bias

    def replaced(tokens: Any, bias: Any, rate: float) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(moe_utils.torch.distributed, "all_reduce", nothing)
            return original(tokens, bias, rate)

    patch.setattr(finalize, "get_updated_expert_bias", replaced)


def chunks_share_an_iterator(patch: Patch) -> None:
    original = schedule.get_forward_backward_func

    def replaced() -> Callable:
        def run(data_iterator: list, **kwargs: Any) -> Any:
            shared = itertools.cycle(list(data_iterator[0]))
            return original()(data_iterator=[shared for _ in data_iterator], **kwargs)

        return run

    patch.setattr(schedule, "get_forward_backward_func", replaced)


def outputs_of_this_rank(patch: Patch) -> None:
    """An expert's output is what the rank's own share of its inner width gives."""

    def own_rows(rows: Tensor, group: Any, input_split_sizes: list[int]) -> Tensor:
        return rows.split(input_split_sizes)[group.rank()]

    patch.setattr(token_dispatcher, "reduce_scatter_to_sequence_parallel_region", own_rows)


def gate_and_up_as_one_block(patch: Patch) -> None:
    """The first rank has an expert's whole gate, the second its whole up."""
    original = GroupedExperts.__init__

    def replaced(self: GroupedExperts, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.weight1.partition_stride = 1

    patch.setattr(GroupedExperts, "__init__", replaced)


SP = {"tensor": 2, "sequence_parallel": True}
BROKEN: dict[str, Broken] = {
    "norms' gradients not summed over sequence ranks": Broken(
        Layout(2, SP), function(finalize, "_allreduce_non_tensor_model_parallel_grads", nothing)
    ),
    "experts' gradients not divided by the tensor ranks": Broken(
        Layout(2, {"tensor": 2, "expert": 2}), function(data_parallel, "_divide_repeated_gradients", nothing)
    ),
    "experts' gradients summed over expert ranks": Broken(Layout(2, {"expert": 2}), experts_like_other_weights),
    "router's bias moved by a rank's own counts": Broken(Layout(2, {"expert": 2}), counts_of_this_rank),
    "experts' outputs not summed over expert-tensor ranks": Broken(
        Layout(2, SP | {"expert_tensor": 2}), outputs_of_this_rank
    ),
    "an expert's gate on one rank, its up on the other": Broken(
        Layout(2, SP | {"expert_tensor": 2}), gate_and_up_as_one_block
    ),
    "virtual stages share a data iterator": Broken(
        Layout(2, {"pipeline": 2, "virtual_pipeline": 2}), chunks_share_an_iterator
    ),
}
