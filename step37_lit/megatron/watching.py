"""How `MegatronStrategy` watches the ranks of a run (`rank_watch`), and says how far this one has come."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from step37_lit.megatron.first_rank_watch import FirstRankWatch
from step37_lit.megatron.launch import LaunchError
from step37_lit.megatron.other_rank_watch import OtherRankWatch
from step37_lit.megatron.rank_verdict import Member, Progress
from step37_lit.megatron.rank_watch import RankWatch
from step37_lit.signals import Stopped

# Short name -> rank and size, in the order in which people name them.
GROUPS: dict[str, tuple[Callable[[], int], Callable[[], int]]] = {
    "DP": (parallel_state.get_data_parallel_rank, parallel_state.get_data_parallel_world_size),
    "PP": (parallel_state.get_pipeline_model_parallel_rank, parallel_state.get_pipeline_model_parallel_world_size),
    "TP": (parallel_state.get_tensor_model_parallel_rank, parallel_state.get_tensor_model_parallel_world_size),
    "CP": (parallel_state.get_context_parallel_rank, parallel_state.get_context_parallel_world_size),
    "EP": (parallel_state.get_expert_model_parallel_rank, parallel_state.get_expert_model_parallel_world_size),
}


class WatchHooks:
    """Mixed into `MegatronStrategy`."""

    hang_timeout: float | None
    cluster_environment: Any
    gather_from_all_ranks: Callable[[Any], list[Any]]

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.progress = Progress()
        self._watch: RankWatch | None = None

    def begin_watch(self) -> None:
        """For all ranks, when the parallel groups are there."""
        if dist.get_world_size() == 1:
            return
        own = Member(dist.get_rank(), socket.gethostname(), os.getpid(), role())
        address = self.cluster_environment.main_address
        try:
            self._watch = watch_ranks(
                own, dist.get_world_size(), address, self.progress, self.hang_timeout, self.gather_from_all_ranks
            )
        except OSError as error:
            raise LaunchError(f"watch: {error}") from error

    @property
    def watching(self) -> bool:
        return self._watch is not None

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)  # type: ignore[misc]
        if self._watch is not None and not isinstance(exception, Stopped):
            self._watch.failed(exception)

    def end_watch(self) -> None:
        """This rank needs the others no more."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None


def role() -> str:
    """This rank's place in the groups that have several ranks: "DP 1, PP 0"."""
    return ", ".join(f"{name} {rank()}" for name, (rank, size) in GROUPS.items() if size() > 1)


def watch_ranks(
    member: Member,
    world_size: int,
    address: str,
    progress: Progress,
    hang_timeout: float | None,
    gather: Callable[[Any], list[Any]],
) -> RankWatch:
    """Begins to watch; collective.

    Args:
        member: This rank.
        world_size: Ranks.
        address: At which the others reach rank 0.
        progress: How far this rank has come.
        hang_timeout: See `RankWatch`.
        gather: A value of each rank on every rank.

    Raises:
        OSError: on all ranks where one cannot connect.
    """
    own: RankWatch | None = FirstRankWatch(member, progress, hang_timeout, world_size) if member.rank == 0 else None
    where: Mapping[str, Any] | None = None
    if isinstance(own, FirstRankWatch):
        where = {"address": address, "port": own.port, "token": own.token}
        own.start()
    told = gather((member, where))
    members, where = [each for each, _ in told], told[0][1]
    error = None
    if own is None:
        assert where is not None
        lowest = min(each.rank for each in members if each.host == member.host and each.rank > 0)
        try:
            own = OtherRankWatch(member, progress, hang_timeout, members[0], **where, speaks=lowest == member.rank)
            own.start()
        except OSError as found:
            error = f"rank {member.rank} on {member.host} cannot reach rank 0 at {address}:{where['port']}: {found}"
    errors = [each for each in gather(error) if each is not None]
    if errors:
        raise OSError(errors[0])
    assert own is not None
    return own
