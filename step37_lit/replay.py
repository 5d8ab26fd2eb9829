"""A step that was not taken, run again on one process: losses of its samples, gradients by module, where it breaks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from step37_lit import saved_model
from step37_lit.batch import PackedBatch
from step37_lit.checkpoint.manifest import verify
from step37_lit.errors import ConfigError
from step37_lit.fault_dump import WEIGHTS, Dump
from step37_lit.faults import Fault
from step37_lit.megatron import process
from step37_lit.megatron.build import build_model
from step37_lit.megatron.checkpointing import check_same_model
from step37_lit.megatron.chunks import whole_names
from step37_lit.megatron.schedule import loss_sum, loss_weights
from step37_lit.megatron.sharding import MODEL, load_weights
from step37_lit.model.step37_model import Step37Model


@dataclass(frozen=True)
class SampleLoss:
    """A sub-sequence's mean loss over the tokens that it learns."""

    pack: int
    key: str
    loss: float
    tokens: int


@dataclass(frozen=True)
class Replay:
    """What came of the step this time.

    Args:
        samples: Losses of the samples.
        loss: Over the learnt tokens of all packs.
        mtp_losses: The same of each MTP layer.
        gradients: Norm of the gradient of each part of the model, over the learnt tokens.
        weight: The first weight that is not finite.
        picture: The first pack whose pixels are not finite.
        output: The module and the pack where the first output is not finite.
        gradient: The module (or weight) where the first gradient is not finite, as the backward pass goes.
    """

    samples: Sequence[SampleLoss]
    loss: float
    mtp_losses: Sequence[float]
    gradients: dict[str, float]
    weight: str | None
    picture: int | None
    output: tuple[str, int] | None
    gradient: str | None

    @property
    def grad_norm(self) -> float:
        return math.sqrt(sum(norm * norm for norm in self.gradients.values()))

    def reproduces(self, fault: Fault) -> bool:
        """Whether what was wrong in the run is wrong here."""
        if fault.kind == "spike":
            assert fault.limit is not None
            return (self.loss if fault.watched == "loss" else self.grad_norm) > fault.limit
        if fault.kind == "weight":
            return self.weight is not None
        if fault.kind in ("output", "loss"):
            return self.output is not None
        if fault.kind == "gradient":
            return self.gradient is not None
        return not self.grad_norm**2 <= torch.finfo(torch.float32).max  # as megatron sums up squares


def load_model(dump: Dump, weights: Path | None) -> tuple[Step37Model, Path]:
    """The model, whole on this process, and the checkpoint that its weights are of.

    Args:
        dump: A dump.
        weights: A checkpoint's or a run's folder of any layout; None is the dump's own.

    Raises:
        ConfigError: there is no such checkpoint, or it is damaged or of another model.
    """
    if weights is None and not (dump.folder / WEIGHTS).is_dir():
        raise ConfigError("--weights", f"a checkpoint (the dump has no {WEIGHTS}/)", None, dump.folder)
    checkpoint = saved_model.find_checkpoint(dump.folder / WEIGHTS if weights is None else weights)
    verify(checkpoint, only=MODEL)
    check_same_model(saved_model.read_config(checkpoint), dump.config, checkpoint)
    process.initialize()
    model = build_model(dump.config, dtype=getattr(torch, dump.circumstances.dtype), seed=None)
    load_weights([model], checkpoint)
    for name, parameter in whole_names(model):
        parameter.requires_grad_(name not in dump.circumstances.frozen)
    return model, checkpoint


def run_again(model: Step37Model, packs: Sequence[PackedBatch]) -> Replay:
    """Forward and backward of all packs, as a step of one rank."""
    device = next(model.parameters()).device
    packs = [pack.to(device) for pack in packs]
    layers = model.step37.text.num_built_mtp_layers
    factors = loss_weights(packs, layers, model.step37.text.mtp_loss_weight)
    watch = _FirstNotFinite(model)
    samples: list[SampleLoss] = []
    totals = torch.zeros(2, 1 + layers, dtype=torch.float64)
    for number, pack in enumerate(packs):
        watch.pack = number
        losses = model(**pack.model_inputs(), with_mtp=True)
        samples += _of_samples(number, pack, losses[0].detach())
        total, _, sums = loss_sum(factors, pack, losses)
        totals += torch.stack(sums).double().cpu()
        if total.requires_grad:
            total.backward()
    tokens = float(totals[1, 0])
    means = (totals[0] / totals[1]).tolist()
    weights = [name for name, weight in _weights(model) if not weight.isfinite().all()]
    pictures = [number for number, pack in enumerate(packs) if not all(map(_finite, _pixels(pack)))]
    return Replay(
        samples, means[0], means[1:], _gradients(model, tokens), next(iter(weights), None),
        next(iter(pictures), None), watch.output, watch.gradient or _last_gradient(model),
    )  # fmt: skip


def _of_samples(number: int, pack: PackedBatch, losses: Tensor) -> Iterator[SampleLoss]:
    lengths = pack.cu_seqlens.diff().tolist()
    masks = pack.loss_mask[0].split(lengths)
    for key, own, mask in zip(pack.sample_keys, losses.split(lengths), masks, strict=False):  # the padding has no key
        tokens = int(mask.sum())
        yield SampleLoss(number, key, float((own.double() * mask).sum() / tokens) if tokens else 0.0, tokens)


def _weights(model: Step37Model) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point())


def _pixels(pack: PackedBatch) -> Iterator[Tensor]:
    for image in pack.images:
        yield from (each for each in (image.images, image.image_features) if each is not None)


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _gradients(model: Step37Model, tokens: float) -> dict[str, float]:
    """Norms by part of the model: each layer of the decoder, and what is beside them."""
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts = name.split(".")
            part = ".".join(
                parts[:3] if parts[:2] == ["decoder", "layers"] else parts[: 1 + (parts[0] in ("decoder", "mtp"))]
            )
            norm = float(torch.linalg.vector_norm(parameter.grad.double())) / tokens
            squares[part] = squares.get(part, 0.0) + norm * norm
    return {part: math.sqrt(square) for part, square in squares.items()}


def _last_gradient(model: Step37Model) -> str | None:
    """Of a weight, where every output has a gradient that is finite."""
    named = [(name, weight.grad) for name, weight in model.named_parameters() if weight.grad is not None]
    return next((name for name, gradient in reversed(named) if not _finite(gradient)), None)


class _FirstNotFinite:
    """Names the modules where the first output, and the first gradient of one, is not finite."""

    def __init__(self, model: nn.Module):
        self.pack = 0
        self.output: tuple[str, int] | None = None
        self.gradient: str | None = None
        for name, module in model.named_modules():
            module.register_forward_hook(partial(self._see, name or "the model"))

    def _see(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            if self.output is None and not _finite(tensor.detach()):
                self.output = (name, self.pack)
            if tensor.requires_grad:
                tensor.register_hook(partial(self._see_gradient, name))

    def _see_gradient(self, name: str, gradient: Tensor) -> None:
        if self.gradient is None and not _finite(gradient):
            self.gradient = name
