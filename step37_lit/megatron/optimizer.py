"""megatron's optimizer for Lightning: parameter groups, and a torch `Optimizer` that forwards to it.

megatron-core falls back to torch's AdamW where neither Apex nor Transformer Engine is there, and its own
`state_dict` then has three faults: it refuses an optimizer that has not stepped, it forgets `step`, and after loading
all parameters share one `step` tensor. Here the state of the inner torch optimizers is saved and loaded itself, so
none of that code runs.

Freezing: a part of the model (`part_of`) that needs no gradient keeps its place in megatron's buffers and groups, so
that state and layouts stay as they are. Its gradients there are zeros; torch's AdamW is shown none at all and skips its
shards: no decay, no moments. The moments are dropped, so that a part that trains again starts with fresh ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from torch import Tensor, nn

from step37_lit.config import ConfigError, Step37Config, require
from step37_lit.hub.names import name_table
from step37_lit.megatron import cuda_names
from step37_lit.megatron.chunks import whole_names


@dataclass(frozen=True)
class AdamWSettings:
    """AdamW with decoupled weight decay (arXiv:1711.05101).

    Args:
        lr: Peak learning rate; a scheduler multiplies it.
        weight_decay: On matrices; norms, biases and gains (one-dimensional parameters) have none.
        betas: Decay of the averages of the gradient and of its square.
        eps: Added to the root of the second average.
        lr_factors: Factor on `lr` by pattern of the parameter's name (`vision_model.*`); the first match counts.
    """

    lr: float
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    lr_factors: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.lr > 0, "model.lr", "a positive number", self.lr)
        require(self.weight_decay >= 0, "model.weight_decay", "0 or more", self.weight_decay)
        require(all(0 <= beta < 1 for beta in self.betas), "model.betas", "in [0, 1)", self.betas)
        require(self.eps > 0, "model.eps", "a positive number", self.eps)
        for pattern, factor in self.lr_factors.items():
            require(factor > 0, f"model.lr_factors[{pattern}]", "a positive number (or freeze the part)", factor)


class ForwardingOptimizer(torch.optim.Optimizer):
    """Stands in Lightning's list for megatron's optimizer.

    `param_groups` are megatron's own dictionaries, so a torch scheduler that writes `lr` reaches megatron, and
    `LearningRateMonitor` reads what is used. Gradients are zeroed where they are made (the schedule), so `zero_grad`
    does nothing: Lightning calls it between forward and backward, which megatron has already run both.

    Args:
        ddps: megatron's DDP around each chunk of this rank's stage (`data_parallel.wrap`).
        settings: Learning rates, weight decay, betas.
        clip_grad: Norm over all ranks that gradients are clipped to; 0 does not clip.
        dtype: Of the model's parameters.
        part_of: Part of the model that each parameter is in, by its name in the whole model; parts are frozen and
            trained as one by `train_parts`. None is one part that always trains.
    """

    def __init__(
        self,
        ddps: Sequence[DistributedDataParallel],
        settings: AdamWSettings,
        clip_grad: float,
        dtype: torch.dtype,
        part_of: Mapping[str, str] | None = None,
    ):
        config = OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=0.0,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=ddps[0].ddp_config.overlap_param_gather,
            clip_grad=clip_grad,
        )
        with cuda_names.cpu_for_cuda():
            self.megatron = get_megatron_optimizer(config, list(ddps), _overrides(settings, ddps, part_of or {}))
        self.grad_norm: float | None = None
        self._ddps, self._part_of = list(ddps), part_of
        self._training: frozenset[str] | None = None  # parts; None before the first `train_parts`
        super().__init__([{"params": []}], {})
        self._share_groups()
        for group in self.param_groups:
            if part_of is not None:
                group["name"] = _group_name(group, settings)
            group["lr"] = group["max_lr"]
            group["weight_decay"] = settings.weight_decay * group["wd_mult"]
            group["fused"] = True  # one kernel for a group, where megatron's choice is a loop over parameters
        for optimizer in self.inner:
            optimizer.register_step_pre_hook(self._hide_frozen)

    @property
    def inner(self) -> list[torch.optim.Optimizer]:
        """The torch optimizers that hold this rank's shards; none where all parameters are frozen."""
        chained = self.megatron.chained_optimizers
        return [optimizer.optimizer for optimizer in chained if optimizer.optimizer is not None]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Runs the closure (Lightning's forward and backward), then clips and updates."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with cuda_names.cpu_for_cuda():
            _, self.grad_norm, _ = self.megatron.step()
        return loss

    def train_parts(self, factors: Mapping[str, float], rates: Sequence[float]) -> None:
        """Sets what trains from the next step on, and how fast.

        Args:
            factors: Factor of every part on its learning rate; 0 freezes it. A part that was frozen begins with
                fresh moments.
            rates: The scheduler's learning rate of each group in `param_groups`, before these factors.
        """
        training = frozenset(part for part, factor in factors.items() if factor > 0)
        if training != self._training:
            self._set_training(training)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate * factors[group["part"]]

    def _set_training(self, training: frozenset[str]) -> None:
        assert self._part_of is not None, "train_parts of an optimizer that was built without part_of"
        # megatron's overlapped reduction waits for the gradient of every parameter of a bucket.
        assert not self._ddps[0].ddp_config.overlap_grad_reduce, "freezing with overlap_grad_reduce"
        self._training = training
        for name, parameter in _whole_names(self._ddps):
            parameter.requires_grad_(self._part_of.get(name) in training)
        for optimizer in self.inner:
            # Apex and Transformer Engine count steps by group: a part's moments could not begin anew.
            assert isinstance(optimizer, torch.optim.AdamW), f"freezing with {type(optimizer).__name__}"
            for group in optimizer.param_groups:
                if group["part"] not in training:
                    for shard in group["params"]:
                        optimizer.state.pop(shard, None)

    def _hide_frozen(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Before a step of torch's AdamW: megatron gave frozen shards their part of a gradient buffer of zeros."""
        for group in optimizer.param_groups:
            if self._training is not None and group["part"] not in self._training:
                for shard in group["params"]:
                    shard.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing; see the class."""

    def clear_gradients(self) -> None:
        """Zeroes the gradients of this rank's shards."""
        self.megatron.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """This rank's share: the inner optimizers' states, and the fp32 main parameters where the model is not fp32."""
        return {
            "inner": [optimizer.state_dict() for optimizer in self.inner],
            "main_params": [[p.detach().clone() for p in shards] for shards in self._main_params()],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave on the same rank of the same layout.

        Raises:
            ConfigError: the state belongs to other parameters.
        """
        for optimizer, state in zip(self.inner, state_dict["inner"], strict=True):
            _check_groups(optimizer, state)
            optimizer.load_state_dict(state)
        self._share_groups()
        self._training = None  # the next `train_parts` is to see to the loaded state
        with torch.no_grad():
            for shards, saved in zip(self._main_params(), state_dict["main_params"], strict=True):
                for shard, value in zip(shards, saved, strict=True):
                    shard.copy_(value)

    def take_over_model_weights(self) -> None:
        """Copies the model's weights to the fp32 main parameters, after they were loaded from elsewhere."""
        self.megatron.reload_model_params()

    def _main_params(self) -> list[list[Tensor]]:
        chained = [optimizer for optimizer in self.megatron.chained_optimizers if optimizer.optimizer is not None]
        return [
            [shard for group in optimizer.shard_fp32_from_float16_groups for shard in group if shard is not None]
            for optimizer in chained
        ]

    def _share_groups(self) -> None:
        self.param_groups = self.megatron.param_groups


def check_patterns(config: Step37Config, lr_factors: Mapping[str, float]) -> None:
    """Raises `ConfigError` for a pattern in `lr_factors` that no weight of the model matches."""
    names = [row.ours for row in name_table(config) if row.ours is not None]
    for pattern in lr_factors:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"model.lr_factors[{pattern}]", "a pattern that matches a parameter's name", pattern)


def _whole_names(ddps: Sequence[DistributedDataParallel]) -> Iterator[tuple[str, nn.Parameter]]:
    for ddp in ddps:
        yield from whole_names(ddp.module)


def _overrides(
    settings: AdamWSettings, ddps: Sequence[DistributedDataParallel], part_of: Mapping[str, str]
) -> dict[ParamKey, dict[str, float | str]]:
    """megatron's description of the groups: no decay on one-dimensional parameters, a learning rate by name, parts."""
    no_decay = ParamWithNamePredicate(name="no_decay", fn=lambda param, name: param.dim() <= 1)
    overrides: dict[ParamKey, dict[str, float | str]] = {ParamKey(with_name_predicate=no_decay): {"wd_mult": 0.0}}
    patterns = list(settings.lr_factors)
    # megatron hands over names within a chunk, where a layer has another number.
    whole_name = {id(parameter): name for name, parameter in _whole_names(ddps)}

    def first_match(param: Tensor) -> str | None:
        return next((pattern for pattern in patterns if fnmatchcase(whole_name[id(param)], pattern)), None)

    for pattern, factor in settings.lr_factors.items():
        predicate = ParamWithNamePredicate(
            name=f"lr of {pattern}", fn=lambda param, name, pattern=pattern: first_match(param) == pattern
        )
        overrides[ParamKey(with_name_predicate=predicate)] = {"max_lr": settings.lr * factor}
    for part in dict.fromkeys(part_of.values()):
        predicate = ParamWithNamePredicate(
            name=f"part {part}", fn=lambda param, name, part=part: part_of.get(whole_name[id(param)]) == part
        )
        overrides[ParamKey(with_name_predicate=predicate)] = {"part": part}
    return overrides


def _group_name(group: dict[str, Any], settings: AdamWSettings) -> str:
    """What a learning-rate monitor calls a group of a part."""
    factor = group["max_lr"] / settings.lr
    kinds = [group["part"], "" if factor == 1.0 else f"x{factor:g}", "" if group["wd_mult"] else "no_decay"]
    return "/".join(kind for kind in (*kinds, "experts" if group["is_expert_parallel"] else "") if kind)


def _check_groups(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    parts, saved = (
        [group.get("part") for group in groups] for groups in (optimizer.param_groups, state["param_groups"])
    )
    require(parts == saved, "checkpoint: groups of a freezing schedule", parts, saved)
    own = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"]]
    indices = [i for group in state["param_groups"] for i in group["params"]]
    require(len(indices) == len(own), "checkpoint: optimizer parameters", len(own), len(indices))
    for index, shape in zip(indices, own, strict=True):
        if index in state["state"]:  # none before the first step
            found = tuple(state["state"][index]["exp_avg"].shape)
            require(found == shape, f"checkpoint: optimizer state {index}", f"shape {shape}", found)
