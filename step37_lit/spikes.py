"""When a step's loss or gradient norm is a spike: a multiple of its median over the last steps. A pure decision."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from step37_lit.errors import require

SpikeAction = Literal["stop", "skip"]
WATCHED = {"loss": "loss", "grad_norm": "gradient norm"}  # what a factor may be given for, and what it is called
WINDOW = 100  # steps that the median is over
LEAST_HISTORY = 20  # steps before any is called a spike
MOST_SKIPS = 3  # steps left out one behind the other; the next spike stops the run


@dataclass(frozen=True)
class Spike:
    """A value that is too large.

    Args:
        name: Of `WATCHED`.
        value: What the step has.
        median: Of the last `steps` steps.
        steps: Their number.
        factor: Times the median, the largest value that is none.
    """

    name: str
    value: float
    median: float
    steps: int
    factor: float

    @property
    def limit(self) -> float:
        return self.factor * self.median

    def __str__(self) -> str:
        ratio = self.value / self.median if self.median > 0 else math.inf
        times = f"{ratio:.3g}" if ratio < 1000 else f"{ratio:.0f}"
        compared = f"{times} times the median {self.median:.4g} of the last {self.steps} steps (limit {self.factor:g})"
        return f"{WATCHED[self.name]} {self.value:.4g} is {compared}"


@dataclass
class SpikeWatch:
    """Values of the last steps, and what is done about a spike.

    The values are the same on all ranks, so all of them decide alike. Those of spikes do not join the history.

    Args:
        factors: For `loss` and `grad_norm`: a value above this many times its median is a spike. One that is not named
            is not watched.
        action: `stop` ends the run, `skip` leaves the step out, up to `MOST_SKIPS` in a row.
    """

    factors: Mapping[str, float] = field(default_factory=dict)
    action: SpikeAction = "stop"

    def __post_init__(self) -> None:
        for name, factor in self.factors.items():
            require(name in WATCHED, "model.spike_factors", f"factors of {' and '.join(WATCHED)}", name)
            require(factor > 1, f"model.spike_factors[{name}]", "a factor above 1", factor)
        allowed = ("stop", "skip")
        require(self.action in allowed, "model.spike_action", " or ".join(allowed), self.action)
        self._values = {name: deque[float](maxlen=WINDOW) for name in WATCHED}
        self.skipped = self.skipped_in_a_row = 0

    def find(self, values: Mapping[str, float]) -> Spike | None:
        """The first of a step's values that is a spike; all are finite."""
        for name, factor in self.factors.items():
            history = self._values[name]
            if len(history) >= LEAST_HISTORY:
                spike = Spike(name, values[name], statistics.median(history), len(history), factor)
                if spike.value > spike.limit:
                    return spike
        return None

    def add(self, values: Mapping[str, float]) -> None:
        """A step that the optimizer takes."""
        for name, history in self._values.items():
            history.append(values[name])
        self.skipped_in_a_row = 0

    def may_skip(self) -> bool:
        """Whether a spike's step is left out, which is counted; else it is to stop the run."""
        if self.action == "stop" or self.skipped_in_a_row == MOST_SKIPS:
            return False
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        return True

    def state_dict(self) -> dict[str, Any]:
        values = {name: list(history) for name, history in self._values.items()}
        return {"values": values, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, history in self._values.items():
            history.clear()
            history.extend(state["values"][name])
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
