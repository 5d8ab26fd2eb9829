"""Activations that are computed again in the backward pass instead of being kept.

    none        everything is kept
    selective   a layer keeps what its matrices read and gave; core attention (its masks and softmax) and the SwiGLUs
                are computed again: little work, as much memory as the matrices' own
    full        a layer keeps its input only

The model draws no random numbers, so computing again gives the same bits. The checkpoints are torch's without
re-entrance: megatron's would lose the gradients of a layer whose input needs none (a frozen embedding).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
from torch.utils.checkpoint import checkpoint

from step37_lit.errors import require

RecomputeMode = Literal["none", "selective", "full"]
Result = TypeVar("Result")

_RECOMPUTING: ContextVar[bool] = ContextVar("recomputing", default=False)


@dataclass(frozen=True)
class Recompute:
    """What is computed again.

    Args:
        mode: See above; of the decoder's layers and the MTP layers.
        layers: Only the first layers of each (virtual) pipeline stage, this many; None is all. MTP layers follow `mode`
            alone.
        vision: Each block of the vision tower keeps its input only.
    """

    mode: RecomputeMode = "none"
    layers: int | None = None
    vision: bool = False

    def validate(self, most_layers: int) -> None:
        """Raises `ConfigError` for a mode that there is not, or a count that no stage has.

        Args:
            most_layers: Decoder layers of the longest (virtual) stage.
        """
        require(self.mode in get_args(RecomputeMode), "strategy.recompute", "none, selective or full", self.mode)
        if self.layers is not None:
            field = "strategy.recompute_layers"
            require(self.mode != "none", field, "null with strategy.recompute none", self.layers)
            advice = f"in 1..{most_layers} (layers of the longest stage)"
            require(1 <= self.layers <= most_layers, field, advice, self.layers)

    def of_layer(self, number: int) -> RecomputeMode:
        """Mode of the stage's layer `number`, from 0."""
        return self.mode if self.layers is None or number < self.layers else "none"


def run(recompute: bool, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """`function(*args, **kwargs)`; with `recompute` only its arguments are kept for the backward pass."""
    if not (recompute and torch.is_grad_enabled()):
        return function(*args, **kwargs)
    again: Any = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)
    return again(*args, **kwargs)


def is_recomputing() -> bool:
    """Whether this is the second time, so that what counts tokens does not count them twice."""
    return _RECOMPUTING.get()


def _contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    return contextlib.nullcontext(), _recomputing()


@contextlib.contextmanager
def _recomputing() -> Iterator[None]:
    token = _RECOMPUTING.set(True)
    try:
        yield
    finally:
        _RECOMPUTING.reset(token)
