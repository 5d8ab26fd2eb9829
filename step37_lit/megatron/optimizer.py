"""megatron's optimizer for Lightning: parameter groups, and a torch `Optimizer` that forwards to it.

megatron-core falls back to torch's AdamW where neither Apex nor Transformer Engine is there, and its own
`state_dict` then has three faults: it refuses an optimizer that has not stepped, it forgets `step`, and after loading
all parameters share one `step` tensor. Here checkpoints read and write the shards of the inner torch optimizers
(`ForwardingOptimizer.shards`), so none of that code runs.

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
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from torch import Tensor, nn

from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError, require
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


@dataclass(frozen=True)
class OptimizerShard:
    """The part of a weight that this rank's optimizer updates.

    Args:
        parameter: The model's.
        start: First number of the part in the flat parameter.
        end: Behind its last number.
        main: [end - start] fp32: a view of an fp32 parameter, or a copy of its own.
        optimizer: The inner torch optimizer.
        group: Index in its `param_groups`.
    """

    parameter: Tensor
    start: int
    end: int
    main: Tensor
    optimizer: torch.optim.Optimizer
    group: int

    @property
    def state(self) -> dict[str, Any]:
        """Moments; empty before the first step and where the weight is frozen."""
        return self.optimizer.state.get(self.main, {})

    @property
    def step(self) -> int | None:
        """Optimizer steps behind the moments; None where there are none."""
        if not self.state:
            return None
        # Apex and Transformer Engine count by group.
        return int(self.state["step"] if "step" in self.state else self.optimizer.param_groups[self.group]["step"])

    def begin(self, step: int | None) -> None:
        """Makes room for moments of `step` steps, or drops what is there where it is None."""
        self.optimizer.state.pop(self.main, None)
        if step is None:
            return
        moments = {name: torch.zeros_like(self.main) for name in ("exp_avg", "exp_avg_sq")}
        if isinstance(self.optimizer, torch.optim.AdamW):
            counted = torch.tensor(float(step), device=self.main.device)
            self.optimizer.state[self.main] = {"step": counted, **moments}
        else:
            self.optimizer.param_groups[self.group]["step"] = step
            self.optimizer.state[self.main] = moments


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
        # Asked with the gradient norm over all ranks whether to step; the same answer on all of them, or an exception.
        self.admits: Callable[[float], bool] = lambda grad_norm: True
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
        """Runs the closure (Lightning's forward and backward), then clips and updates where `admits` says so."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with cuda_names.cpu_for_cuda():
            self.megatron.prepare_grads()
            self.grad_norm = self.megatron.get_grad_norm()
        if self.admits(self.grad_norm):
            with cuda_names.cpu_for_cuda():
                self._clip_and_update()
        return loss

    def _clip_and_update(self) -> None:
        """The rest of megatron's own `step`, which does not stop between the norm and the update."""
        clip_grad = self.megatron.config.clip_grad
        for optimizer in self.megatron.chained_optimizers:
            parameters = optimizer.get_parameters()
            if parameters and clip_grad > 0.0:
                clip_grad_by_total_norm_fp32(parameters, clip_grad, self.grad_norm)
        self.megatron.step_with_ready_grads()

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

    def shards(self) -> Iterator[OptimizerShard]:
        """What this rank updates: of each weight a flat range, or nothing."""
        for distributed in self.megatron.chained_optimizers:
            if distributed.optimizer is not None:
                for parameter, (group, number) in distributed.model_param_group_index_map.items():
                    inside = distributed._get_model_param_range_map(parameter)["param"]
                    main = distributed.optimizer.param_groups[group]["params"][number]
                    yield OptimizerShard(parameter, inside.start, inside.end, main, distributed.optimizer, group)

    @property
    def parts(self) -> list[str] | None:
        """Parts of the model that freeze and train as one; None without them."""
        return None if self._part_of is None else sorted(set(self._part_of.values()))

    def loaded(self) -> None:
        """The shards have other moments now: the next `train_parts` is to see to them."""
        self._training = None

    def take_over_model_weights(self) -> None:
        """Copies the model's weights to the fp32 main parameters, after they were loaded from elsewhere."""
        self.megatron.reload_model_params()

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
