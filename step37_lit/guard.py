"""`StepGuard`: asked between the gradients and the optimizer's step whether the step is taken.

    all finite, no spike     yes
    not finite, anywhere     the run stops: one line, a dump of the batch (`fault_dump`), `TrainingFault` on all ranks
    a spike                  the same, or the step is left out (`model.spike_action`)

What decides is the same on all ranks: it has been summed over them. Weights, moments and checkpoints stay as they are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from step37_lit.batch import PackedBatch
from step37_lit.checkpoint.folder import list_checkpoints
from step37_lit.config import Step37Config
from step37_lit.fault_dump import WEIGHTS, Circumstances, Dump, dump_folder, write_batch
from step37_lit.faults import Fault, RankReport, TrainingFault, fault_of_spike, find_fault
from step37_lit.megatron.checkpointing import print_once
from step37_lit.megatron.schedule import StepResult
from step37_lit.megatron.strategy import MegatronStrategy
from step37_lit.saved_model import CHECKPOINTS
from step37_lit.spikes import SpikeAction, SpikeWatch


class StepGuard:
    """See the module.

    Args:
        config: The model.
        spike_factors, spike_action: See `SpikeWatch`.
    """

    def __init__(self, config: Step37Config, spike_factors: Mapping[str, float], spike_action: SpikeAction):
        self.config = config
        self.spikes = SpikeWatch(spike_factors, spike_action)

    def admits(
        self, strategy: MegatronStrategy, packs: Sequence[PackedBatch], result: StepResult, grad_norm: float
    ) -> bool:
        """Whether the optimizer takes the step; all ranks must call it.

        Args:
            strategy: That has run forward and backward.
            packs: Of this rank.
            result: Of the step.
            grad_norm: Over all ranks.

        Raises:
            TrainingFault: the run is to stop.
        """
        values = {"loss": float(result.loss), "grad_norm": grad_norm}
        finite = result.finite and all(map(math.isfinite, values.values()))
        spike = self.spikes.find(values) if finite else None
        if finite and spike is None:
            self.spikes.add(values)
            return True
        assert strategy.step_watch is not None, "a step outside of fit"
        step = strategy.step
        reports = strategy.gather_from_all_ranks(strategy.step_watch.report(packs))
        fault = find_fault(step, reports, **values) if spike is None else fault_of_spike(step, reports, spike)
        if fault is None:  # a sum of finite numbers that was none
            self.spikes.add(values)
            return True
        strategy.step_watch.take_back()
        if spike is not None and self.spikes.may_skip():
            counts = f"{self.spikes.skipped_in_a_row} in a row, {self.spikes.skipped} in all"
            print_once(f"guard       {fault}; the step is left out ({counts}); {fault.samples}")
            return False
        with strategy.progress.untimed("the dump of a fault"):
            dump = self._dump(strategy, packs, values, reports, fault)
        raise TrainingFault(fault, f"{fault}; the optimizer has not stepped; {dump}; {fault.samples}")

    def _dump(
        self,
        strategy: MegatronStrategy,
        packs: Sequence[PackedBatch],
        values: Mapping[str, float],
        reports: Sequence[RankReport],
        fault: Fault,
    ) -> str:
        """Writes the dump; gives what the line says of it."""
        run = Path(strategy.lightning_module.trainer.default_root_dir)
        folder = dump_folder(run, fault)
        assert strategy.step_watch is not None
        random = strategy.step_watch.random

        def write() -> None:
            if strategy.reads_data and strategy.data_parallel_rank == fault.data_rank:
                frozen = {name for report in reports for name in report.frozen}
                circumstances = Circumstances(
                    dtype=str(strategy.dtype).removeprefix("torch."),
                    layout=strategy.described_layout(),
                    frozen=tuple(sorted(frozen)),
                    checkpoint=_newest_checkpoint(run, folder),
                    **values,
                )
                write_batch(Dump(folder, fault, circumstances, self.config, list(packs), random), strategy.recipe)

        # A failure here is one of all ranks alike, and must not hide the fault.
        try:
            strategy.saver.wait()  # for the newest checkpoint
            strategy.together(write)
        except Exception as error:
            return f"no dump: {error}"
        again = f"to run it again: python -m step37_lit replay {folder}"
        try:
            strategy.save_weights_of(fault.rank, folder / WEIGHTS)
        except Exception as error:
            return f"{again} --weights CKPT (its own could not be written: {error})"
        return again


def _newest_checkpoint(run: Path, folder: Path) -> str | None:
    """Of training, relative to `folder`."""
    found = [each.path for each in list_checkpoints(run / CHECKPOINTS) if each.manifest is not None]
    return os.path.relpath(found[0], folder) if found else None
