"""Differences between this model's MTP layers and the oracle's."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from step37_lit.batch import PackedBatch, Sample
from step37_lit.config import Step37Config
from step37_lit.hub.load import load_hub_model
from step37_lit.hub.names import name_table
from step37_lit.model.step37_model import Step37Model
from tests.parity.cases import KINDS, MIXED, SLIDING, Case
from tests.parity.compare import COSINE_TOLERANCE, LOGITS_TOLERANCE, NORM_TOLERANCE, SEED, compare_gradients
from tests.parity.mtp_oracle import build_mtp_oracle, mtp_results
from tests.parity.oracle import make_samples

LAYERS = 3
LOSS_TOLERANCE = 1e-6  # relative, of a sample's loss
MTP = {"num_nextn_predict_layers": LAYERS, "layer_types": [*KINDS, *[SLIDING] * LAYERS]}
CASES = {
    case.name: case
    for case in (
        Case("images", MTP, samples=(*MIXED, (4, "image", "image", 6), (1,), (3,))),
        Case("words", MTP, samples=((40,), (17,), (4,))),
    )
}


@dataclass(frozen=True)
class Reference:
    """What the oracle says of a case."""

    folder: Path
    samples: list[Sample]
    logits: list[list[Tensor]]
    losses: list[list[float]]
    gradients: dict[str, Tensor]
    keep: tempfile.TemporaryDirectory


@functools.cache
def reference(name: str) -> Reference:
    keep = tempfile.TemporaryDirectory(prefix="step37-mtp-")
    folder = Path(keep.name)
    oracle = build_mtp_oracle(CASES[name], folder / "model", SEED)
    tokens = Step37Config.from_hub(folder / "model").tokens
    samples = make_samples(CASES[name], tokens, SEED + 1)
    return Reference(folder / "model", samples, *mtp_results(oracle, samples, tokens, folder / "gradients"), keep)


def with_mtp(config: Step37Config) -> Step37Config:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, mtp=True))


def our_model(expected: Reference) -> Step37Model:
    return load_hub_model(expected.folder, config=with_mtp(Step37Config.from_hub(expected.folder)))


def per_sample(rows: Tensor, batch: PackedBatch) -> list[Tensor]:
    """[1 + layers, T, ...] -> [1 + layers, n, ...] of each sample."""
    return list(rows.split(batch.cu_seqlens.diff().tolist(), dim=1))


@dataclass(frozen=True)
class Differences:
    """From the oracle: relative logits and flipped argmax of each head, loss, and the worst gradient."""

    logits: list[float]
    argmax: int
    loss: float
    cosine: float
    norm: float

    @property
    def within(self) -> bool:
        near = max(self.logits) <= LOGITS_TOLERANCE and self.argmax == 0 and self.loss <= LOSS_TOLERANCE
        return near and self.cosine <= COSINE_TOLERANCE and self.norm <= NORM_TOLERANCE


def differences(expected: Reference, model: nn.Module) -> Differences:
    """The pack of all samples against the oracle on each alone."""
    batch = PackedBatch.from_samples(expected.samples)
    with torch.no_grad():
        logits = per_sample(model(**batch.model_inputs(labels=False), with_mtp=True), batch)
    worst, flips = [0.0] * (1 + LAYERS), 0
    for ours, theirs in zip(logits, expected.logits, strict=True):
        for head, known in enumerate(theirs):
            if len(known):
                own = ours[head, : len(known)]
                worst[head] = max(worst[head], float((own - known).abs().max() / known.abs().max()))
                flips += int((own.argmax(-1) != known.argmax(-1)).sum())
    model.zero_grad(set_to_none=True)
    losses = model(**batch.model_inputs(), with_mtp=True)
    losses.sum().backward()
    sums = torch.stack([rows.double().sum(1) for rows in per_sample(losses.detach(), batch)])
    known_sums = torch.tensor(expected.losses, dtype=torch.float64)
    cosines, norms = [], []
    for name, gradient in hub_gradients(model).items():
        cosine, norm = compare_gradients(gradient.double().flatten(), expected.gradients[name].double().flatten())
        cosines.append(cosine), norms.append(norm)
    loss = float(((sums - known_sums).abs() / known_sums.clamp(min=1)).max())
    return Differences(worst, flips, loss, max(cosines), max(norms))


def hub_gradients(model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    gradients: dict[str, Tensor] = {}
    for row in name_table(model.step37):
        if row.ours in parameters:
            weight = parameters[row.ours]
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            parts = row.conversion.to_hub(gradient, [tensor.shape for tensor in row.hub])
            gradients |= {tensor.name: part for tensor, part in zip(row.hub, parts, strict=True)}
    return gradients
