"""What a row of the reliability table came to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """What a promise came to: `good` of `tried`, and a sentence with the other figures."""

    good: int
    tried: int
    detail: str
