"""Context and vision parallelism with one thing wrong each; a comparison with one rank must notice."""

from __future__ import annotations

from collections.abc import Callable

BREAKS: dict[str, Callable[[], None]] = {}
