"""Differences between this model and the oracle, and what they may be at most."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from step37_lit.batch import PackedBatch, Sample
from step37_lit.config import Step37Config
from step37_lit.hub.load import load_hub_model
from step37_lit.model.step37_model import Step37Model
from tests.parity.cases import CASES
from tests.parity.oracle import build_oracle, make_samples, oracle_results, our_results

# Of weights and samples. The gradient jumps where a clamped value lies within rounding of its limit; with this seed
# none does (with 7 one value of 150,000 did: one row of one gradient was off, and nothing else).
SEED = 8
# Behind each: the largest value over all cases.
LOGITS_TOLERANCE = 2e-5  # measured 3.0e-6
COSINE_TOLERANCE = 1e-5  # measured 1.4e-11
NORM_TOLERANCE = 1e-4  # measured 2.1e-6


@dataclass(frozen=True)
class Differences:
    """What was measured.

    Args:
        logits: Largest |difference| over the largest |logit|, of the worst sample.
        argmax: Positions whose most likely token differs.
        cosine: 1 - cosine of a weight's two gradients, of the worst weight.
        norm: Relative difference of their norms, of the worst weight.
        worst: Names of the weights with the worst cosine and norm.
    """

    logits: float
    argmax: int
    cosine: float
    norm: float
    worst: tuple[str, str]

    @property
    def within(self) -> bool:
        return (
            self.logits <= LOGITS_TOLERANCE
            and self.argmax == 0
            and self.cosine <= COSINE_TOLERANCE
            and self.norm <= NORM_TOLERANCE
        )


@dataclass(frozen=True)
class Reference:
    """An oracle's model on disk, its samples and results.

    Args:
        folder: The saved model.
        samples: The case's samples.
        logits: Of each sample alone, [n, V].
        gradients: Of the summed loss, by hub name.
        keep: Holds the temporary folder.
    """

    folder: Path
    samples: list[Sample]
    logits: list[Tensor]
    gradients: dict[str, Tensor]
    keep: tempfile.TemporaryDirectory

    def model(self) -> Step37Model:
        """Our model with the oracle's weights."""
        return load_hub_model(self.folder)


@functools.cache
def reference(name: str) -> Reference:
    """The oracle's results for the case of that name; made once a process."""
    case = next(case for case in CASES if case.name == name)
    keep = tempfile.TemporaryDirectory(prefix="step37-parity-")
    folder = Path(keep.name)
    oracle = build_oracle(case, folder / "model", SEED)
    tokens = Step37Config.from_hub(folder / "model").tokens
    samples = make_samples(case, tokens, SEED + 1)
    logits, gradients = oracle_results(oracle, samples, tokens, folder / "gradients")
    return Reference(folder / "model", samples, logits, gradients, keep)


def differences(expected: Reference, model: torch.nn.Module, whole: bool = True) -> Differences:
    """`model` on the case's pack against the oracle on its samples alone.

    Args:
        expected: The oracle's results.
        model: Ours.
        whole: Every parameter of the oracle must be there; a mutation may have taken some out.
    """
    logits, gradients = our_results(model, PackedBatch.from_samples(expected.samples))
    if whole:
        assert set(gradients) == {name for name in expected.gradients if not name.endswith("router_bias")}
    largest = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(logits, expected.logits, strict=True)]
    flips = sum(int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in zip(logits, expected.logits, strict=True))
    angles, norms = {}, {}
    for name, gradient in gradients.items():
        angles[name], norms[name] = compare_gradients(
            gradient.double().flatten(), expected.gradients[name].double().flatten()
        )
    worst = max(angles, key=angles.__getitem__), max(norms, key=norms.__getitem__)
    return Differences(max(largest), flips, angles[worst[0]], norms[worst[1]], worst)


def compare_gradients(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """1 - cosine and the relative difference of the norms; a gradient that should be zero must be."""
    norm = float(theirs.norm())
    if norm == 0.0 or float(ours.norm()) == 0.0:
        same = float(ours.norm()) == norm
        return (0.0, 0.0) if same else (float("inf"), float("inf"))
    cosine = float(torch.dot(ours, theirs) / (ours.norm() * theirs.norm()))
    return 1 - cosine, abs(float(ours.norm()) / norm - 1)
