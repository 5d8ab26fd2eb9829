"""Reading weights in any layout: this rank's part of what is split, and errors that all ranks must know of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from megatron.core.utils import get_pg_rank, get_pg_size

from step37_lit.errors import ConfigError
from step37_lit.model.step37_model import Step37Model


class RankPart(NamedTuple):
    """Which of `ranks` equal parts of a weight this rank holds, along the dimension that its layer splits."""

    rank: int
    ranks: int


def parts(chunk: Step37Model) -> dict[str, RankPart]:
    """This rank's place among the ranks that share a matrix (`tensor`), the experts (`expert`) and the matrices of an
    expert (`expert_tensor`)."""
    collection = chunk.pg_collection
    groups = {"tensor": collection.tp, "expert": collection.ep, "expert_tensor": collection.expt_tp}
    return {name: RankPart(get_pg_rank(group), get_pg_size(group)) for name, group in groups.items()}


def on_first_rank(check: Callable[[], object], device: torch.device) -> None:
    """Runs `check` on rank 0; a `ConfigError` of it is raised on every rank (see `raise_together`)."""
    error: ConfigError | None = None
    try:
        if torch.distributed.get_rank() == 0:
            check()
    except ConfigError as found:
        error = found
    raise_together(error, device)


def raise_together(error: Exception | None, device: torch.device) -> None:
    """Raises on every rank where one of them has an error, so that none waits for the others' next message.

    Raises:
        ConfigError: on the ranks without an error of their own.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        if error is not None:
            raise error
        return
    failed = torch.tensor([float(error is not None)], device=device)
    torch.distributed.all_reduce(failed)
    if error is not None:
        raise error
    if failed.item() > 0:
        raise ConfigError("weights", "all ranks to read theirs", f"{int(failed.item())} that could not")
