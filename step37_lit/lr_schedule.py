"""Learning-rate factor by optimizer step: linear warm-up, then a cosine (arXiv:1608.03983) down to a floor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from step37_lit.errors import require


@dataclass(frozen=True)
class WarmupCosine:
    """Factor on the peak learning rate for step 0, 1, ...; for `torch.optim.lr_scheduler.LambdaLR`.

    Args:
        warmup_steps: Steps of the linear rise; the first one already learns (factor 1 / warmup_steps).
        total_steps: Step at which the floor is reached; it stays there.
        min_factor: The floor.
    """

    warmup_steps: int
    total_steps: int
    min_factor: float = 0.1

    def __post_init__(self) -> None:
        require(self.total_steps > 0, "model.decay_steps", "a positive number", self.total_steps)
        expected = f"in 0..{self.total_steps} (steps of the run)"
        require(0 <= self.warmup_steps <= self.total_steps, "model.warmup_steps", expected, self.warmup_steps)
        require(0 <= self.min_factor <= 1, "model.min_lr_factor", "in [0, 1]", self.min_factor)

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step >= self.total_steps:
            return self.min_factor
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.min_factor + (1 - self.min_factor) * 0.5 * (1 + math.cos(math.pi * progress))
