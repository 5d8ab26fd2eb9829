"""Whether what a global step computes on this rank is finite, and where it is not.

Seen of each chunk of the rank's stage:

    outputs     of each pack: the hidden states that the chunk hands on, or the losses
    gradients   the rank's own, before ranks sum them: when megatron begins to exchange a bucket
    weights     the buffers that the optimizer keeps up to date, and the routers' biases

That is one pass over each, and nothing waits for the device: the answer travels with the step's counts. Only where a
rank's is no are names looked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from step37_lit.batch import PackedBatch
from step37_lit.faults import NotFinite, RankReport
from step37_lit.megatron.chunks import whole_names
from step37_lit.megatron.initialize import global_name
from step37_lit.model.step37_model import Step37Model

PackLosses = tuple[Tensor, Tensor]  # [1 + MTP layers]: sums of the losses, tokens


class StepWatch:
    """Sees every global step of a model that is trained.

    Args:
        ddps: megatron's DDP around each chunk of this rank's stage, in the model's order.
    """

    def __init__(self, ddps: Sequence[DistributedDataParallel]):
        self._ddps = list(ddps)
        self._biases = [dict(_router_biases(ddp.module)) for ddp in self._ddps]  # of each chunk, by name
        for chunk, ddp in enumerate(self._ddps):
            for group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
                self._see_before_exchange(group, chunk)
        self.begin()

    def _see_before_exchange(self, group: Any, chunk: int) -> None:
        exchange = group.start_grad_sync

        def see_and_exchange(*args: Any, **kwargs: Any) -> None:
            if group.grad_reduce_handle is None:  # else it is under way already
                self._norms[chunk] += [torch.linalg.vector_norm(bucket.grad_data) for bucket in group.buckets]
            exchange(*args, **kwargs)

        group.start_grad_sync = see_and_exchange

    def begin(self) -> None:
        """A step begins. Keeps the routers' biases, which move as gradients are finalised: before the optimizer."""
        # Of torch's generators, by device type.
        self.random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            self.random["cuda"] = torch.cuda.get_rng_state()
        self._outputs: list[list[Tensor]] = [[] for _ in self._ddps]
        self._norms: list[list[Tensor]] = [[] for _ in self._ddps]
        self._losses: list[PackLosses] = []
        self._kept_biases = [{name: bias.clone() for name, bias in chunk.items()} for chunk in self._biases]

    def see_output(self, ddp: Any, output: Tensor) -> None:
        """Of a chunk for a pack; packs come in their order."""
        self._outputs[self._ddps.index(ddp)].append(output.detach().sum(dtype=torch.float32))

    def end(self, losses: Sequence[PackLosses]) -> Tensor:
        """Forward and backward are done.

        Args:
            losses: Of each pack, on the last stage.

        Returns:
            0-dim float64: 1 where anything of this rank is not finite, 0 where all is.
        """
        self._losses = list(losses)
        weights = [
            buffer.param_data.sum() for ddp in self._ddps for buffer in ddp.buffers + ddp.expert_parallel_buffers
        ]
        biases = [bias.sum() for chunk in self._kept_biases for bias in chunk.values()]
        seen = [*weights, *biases, *(each for chunk in (*self._outputs, *self._norms) for each in chunk)]
        return 1.0 - torch.stack([each.float() for each in seen]).isfinite().all().double()

    def take_back(self) -> None:
        """Undoes what the step has changed: the optimizer does not take it."""
        for biases, kept in zip(self._biases, self._kept_biases, strict=True):
            for name, bias in biases.items():
                bias.copy_(kept[name])

    # ---- where it is not finite ----

    @torch.no_grad()
    def report(self, packs: Sequence[PackedBatch]) -> RankReport:
        """What this rank has to say about the step, whose packs these are."""
        norms = [float(norm) for chunk in self._norms for norm in chunk]
        losses = [tuple(zip(*(each.double().tolist() for each in of_pack), strict=True)) for of_pack in self._losses]
        parameters = [pair for ddp in self._ddps for pair in whole_names(ddp.module)]
        return RankReport(
            rank=dist.get_rank(),
            data_rank=parallel_state.get_data_parallel_rank(),
            stage=parallel_state.get_pipeline_model_parallel_rank(),
            keys=tuple(pack.sample_keys for pack in packs),
            losses=tuple(losses),
            counts=bool(losses) and parallel_state.get_tensor_model_parallel_rank() == 0,
            weight=self._first_weight(),
            output=self._first_output(),
            gradient=self._last_gradient(),
            own_gradient=not all(map(math.isfinite, norms)),
            gradient_square=sum(norm * norm for norm in norms),
            frozen=tuple(name for name, parameter in parameters if not parameter.requires_grad),
        )

    def _piece(self, chunk: int) -> int:
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        return chunk * stages + parallel_state.get_pipeline_model_parallel_rank()

    def _first_weight(self) -> NotFinite | None:
        for chunk, ddp in enumerate(self._ddps):
            weights = [*whole_names(ddp.module), *self._kept_biases[chunk].items()]
            for place, (name, weight) in enumerate(weights):
                found = self._look_at(chunk, place, name, weight)
                if found is not None:
                    return found
        return None

    def _last_gradient(self) -> NotFinite | None:
        for chunk, ddp in reversed(list(enumerate(self._ddps))):
            for place, (name, weight) in reversed(list(enumerate(whole_names(ddp.module)))):
                if hasattr(weight, "main_grad"):
                    found = self._look_at(chunk, place, name, weight.main_grad)
                    if found is not None:
                        return found
        return None

    def _look_at(self, chunk: int, place: int, name: str, numbers: Tensor) -> NotFinite | None:
        count = numbers.numel() - int(numbers.isfinite().sum())
        return NotFinite(self._piece(chunk), place, name, count, numbers.numel()) if count else None

    def _first_output(self) -> tuple[int, tuple[int, ...]] | None:
        for chunk, outputs in enumerate(self._outputs):
            packs = tuple(pack for pack, output in enumerate(outputs) if not math.isfinite(output))
            if packs:
                return self._piece(chunk), packs
        return None


def _router_biases(model: Step37Model) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, TopKRouter) and module.expert_bias is not None:
            yield global_name(model, f"{name}.expert_bias"), module.expert_bias
