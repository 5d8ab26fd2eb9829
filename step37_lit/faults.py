"""What is wrong with a step, and on which rank it began: from the reports of all ranks, a pure decision.

A value that is not finite spreads: a weight's to every output behind it, an output's to the losses of its pack and to
the gradients of all stages, a gradient's to the ranks that it is summed with. So the first of these that any rank has
is the cause: a weight, the output of the earliest piece of the model, the gradient of the latest one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from step37_lit.spikes import Spike

Kind = Literal["weight", "output", "loss", "gradient", "grad_norm", "spike"]
MOST_KEYS_SHOWN = 32  # in the line; the dump has all of them


@dataclass(frozen=True)
class NotFinite:
    """A weight, or a weight's gradient, with numbers that are not finite.

    Args:
        piece: Piece of the model (pipeline stages x virtual stages, in the model's order) that it is in.
        place: Its number among the piece's weights.
        name: In the whole model.
        count: Numbers that are not finite.
        size: All of its numbers on this rank.
    """

    piece: int
    place: int
    name: str
    count: int
    size: int

    def __str__(self) -> str:
        return f"{self.name} not finite ({self.count} of {self.size} numbers)"


@dataclass(frozen=True)
class RankReport:
    """What a rank has to say about a step.

    Args:
        rank: Global rank.
        data_rank: Its data-parallel rank.
        stage: Its pipeline stage, from 0.
        keys: Sample keys of each of its packs.
        losses: On the last stage, of each pack: for the main head and each MTP layer, sum of the losses and tokens.
        counts: Whether its losses are those of its part of the data (other tensor ranks have the same).
        weight: The first weight that is not finite.
        output: The first piece with an output that is not finite, and the packs that have one.
        gradient: The last gradient that is not finite, as a backward pass goes from the last to the first.
        own_gradient: Whether gradients were not finite before they were summed over ranks.
        gradient_square: Of the norm of this rank's own gradients, summed over its tokens.
        frozen: Names of its weights that do not train.
    """

    rank: int
    data_rank: int
    stage: int
    keys: tuple[tuple[str, ...], ...]
    losses: tuple[tuple[tuple[float, float], ...], ...] = ()
    counts: bool = False
    weight: NotFinite | None = None
    output: tuple[int, tuple[int, ...]] | None = None
    gradient: NotFinite | None = None
    own_gradient: bool = False
    gradient_square: float = 0.0
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """Why a step is not taken.

    Args:
        step: The step, counted from 1 as checkpoints count.
        kind: What is wrong: not finite, but for `spike`.
        what: The same in words.
        rank: Global rank where it began; of a spike, where it is largest.
        data_rank: Its data-parallel rank.
        stage: Its pipeline stage, from 0.
        stages: Number of stages.
        keys: Keys of the samples that are concerned.
        packs: Packs of the data-parallel rank that they are in.
        limit: Of a spike's value.
        watched: Of a spike: `loss` or `grad_norm`.
    """

    step: int
    kind: Kind
    what: str
    rank: int
    data_rank: int
    stage: int
    stages: int
    keys: tuple[str, ...]
    packs: tuple[int, ...]
    limit: float | None = None
    watched: str | None = None

    def __str__(self) -> str:
        """What and where, without the samples."""
        of_stages = f"pipeline stage {self.stage} of {self.stages}"
        where = f"{', largest' if self.kind == 'spike' else ''} on rank {self.rank}"
        return f"step {self.step}: {self.what}{where} (data-parallel rank {self.data_rank}, {of_stages})"

    @property
    def samples(self) -> str:
        """The keys, as a line shows them."""
        shown = ", ".join(map(repr, self.keys[:MOST_KEYS_SHOWN]))
        more = f" and {len(self.keys) - MOST_KEYS_SHOWN} more" if len(self.keys) > MOST_KEYS_SHOWN else ""
        return f"samples {shown}{more}"


class TrainingFault(Exception):
    """Ends a run before the optimizer takes a step; raised on all ranks with the same line."""

    def __init__(self, fault: Fault, line: str):
        super().__init__(line)
        self.fault = fault


def find_fault(step: int, reports: Sequence[RankReport], loss: float, grad_norm: float) -> Fault | None:
    """What is not finite and where it began; None where all is finite.

    Args:
        step: The step, from 1.
        reports: Of all ranks.
        loss: Of the global batch.
        grad_norm: Over all ranks.
    """
    weights = [(each.weight.piece, each.weight.place, each.rank, each) for each in reports if each.weight is not None]
    if weights:
        report = min(weights, key=_all_but_last)[-1]
        return _fault(step, reports, report, "weight", f"weight {report.weight}")
    outputs = [(each.output[0], each.rank, each) for each in reports if each.output is not None]
    if outputs:
        return _fault_of_output(step, reports, min(outputs, key=_all_but_last)[-1])
    # Where only sums over ranks are not finite, those of the ranks that keep them are looked at.
    own = [each for each in reports if each.own_gradient and each.gradient is not None]
    gradients = [
        (-each.gradient.piece, -each.gradient.place, each.rank, each)
        for each in own or reports
        if each.gradient is not None
    ]
    if gradients:
        report = min(gradients, key=_all_but_last)[-1]
        return _fault(step, reports, report, "gradient", f"gradient of {report.gradient}")
    if not math.isfinite(loss):
        raise RuntimeError(f"loss {loss} of losses that are finite: {[each.losses for each in reports]}")
    if not math.isfinite(grad_norm):
        report = max(reports, key=lambda each: each.gradient_square)
        what = f"gradient norm {grad_norm} (no gradient is, but the sum of their squares)"
        return _fault(step, reports, report, "grad_norm", what)
    return None


def _all_but_last(candidate: tuple) -> tuple:
    return candidate[:-1]


def _fault_of_output(step: int, reports: Sequence[RankReport], report: RankReport) -> Fault:
    assert report.output is not None
    _, packs = report.output
    losses = [report.losses[pack] for pack in packs] if report.losses else []
    wrong = [(head, total) for of_pack in losses for head, (total, _) in enumerate(of_pack) if not math.isfinite(total)]
    if not wrong:
        what = f"output of pipeline stage {report.stage} not finite"
        return _fault(step, reports, report, "output", what, packs)
    head, value = wrong[0]
    of_head = f" of MTP layer {head}" if head else ""
    return _fault(step, reports, report, "loss", f"loss{of_head} {value}", packs)


def fault_of_spike(step: int, reports: Sequence[RankReport], spike: Spike) -> Fault:
    """A spike, with the data-parallel rank whose own loss or gradient, by its own tokens, is the largest.

    The value of the global batch is a mean of theirs, so that of the largest is above the limit as well.
    """
    share = _own_loss if spike.name == "loss" else _own_gradient
    ranks = {each.data_rank for each in reports}
    data_rank = max(sorted(ranks), key=lambda rank: share([each for each in reports if each.data_rank == rank]))
    own = [each for each in reports if each.data_rank == data_rank]
    if spike.name == "loss":
        report = next(each for each in own if each.counts)
    else:
        report = max(own, key=lambda each: each.gradient_square)
    return _fault(step, reports, report, "spike", str(spike), limit=spike.limit, watched=spike.name)


def _own_loss(reports: Sequence[RankReport]) -> float:
    mains = [pack[0] for each in reports if each.counts for pack in each.losses]
    tokens = sum(tokens for _, tokens in mains)
    return sum(total for total, _ in mains) / tokens if tokens else 0.0


def _own_gradient(reports: Sequence[RankReport]) -> float:
    tokens = sum(pack[0][1] for each in reports if each.counts for pack in each.losses)
    return math.sqrt(sum(each.gradient_square for each in reports)) / tokens if tokens else 0.0


def _fault(
    step: int,
    reports: Sequence[RankReport],
    report: RankReport,
    kind: Kind,
    what: str,
    packs: Sequence[int] | None = None,
    limit: float | None = None,
    watched: str | None = None,
) -> Fault:
    chosen = tuple(range(len(report.keys)) if packs is None else packs)
    keys = tuple(key for pack in chosen for key in report.keys[pack])
    stages = 1 + max(each.stage for each in reports)
    where = (report.rank, report.data_rank, report.stage, stages)
    return Fault(step, kind, what, *where, keys, chosen, limit, watched)
