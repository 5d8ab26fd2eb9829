"""Spikes of loss and gradient norm: what is one, and what becomes of its step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from step37_lit import spikes
from step37_lit.errors import ConfigError
from step37_lit.faults import TrainingFault
from step37_lit.spikes import LEAST_HISTORY, MOST_SKIPS, WINDOW, SpikeWatch
from tests.reliability.exact_resume import differences, fit, save_at
from tests.training import TEXT

EXPERTS = {"moe_layers": [1], "num_experts": 4, "top_k": 2, "expert_ffn_size": 32, "shared_expert_ffn_size": 32}


def watch(*values: float, factor: float = 2.0, action: Any = "stop") -> SpikeWatch:
    watch = SpikeWatch({"loss": factor}, action)
    for value in values:
        watch.add({"loss": value, "grad_norm": 1.0})
    return watch


def test_a_spike_is_a_multiple_of_the_median() -> None:
    history = [1.0, 9.0] + [3.0] * LEAST_HISTORY  # what is far away once does not move the median
    seen = watch(*history)
    assert seen.find({"loss": 6.0, "grad_norm": 100.0}) is None
    spike = seen.find({"loss": 6.1, "grad_norm": 100.0})
    assert spike is not None and (spike.name, spike.median, spike.limit) == ("loss", 3.0, 6.0)
    assert str(spike) == "loss 6.1 is 2.03 times the median 3 of the last 22 steps (limit 2)"


def test_no_spike_without_a_history_and_none_that_is_not_watched() -> None:
    assert watch(*[1.0] * (LEAST_HISTORY - 1)).find({"loss": 1e9, "grad_norm": 1.0}) is None
    assert watch(*[1.0] * LEAST_HISTORY).find({"loss": 1.0, "grad_norm": 1e9}) is None


def test_only_the_last_steps_count() -> None:
    seen = watch(*[8.0] * WINDOW, *[1.0] * (WINDOW // 2 + 1))
    spike = seen.find({"loss": 2.1, "grad_norm": 1.0})
    assert spike is not None and (spike.median, spike.steps) == (1.0, WINDOW)


def test_skips_are_counted_and_end() -> None:
    assert not watch().may_skip()
    seen = watch(action="skip")
    assert [seen.may_skip() for _ in range(MOST_SKIPS + 1)] == [True] * MOST_SKIPS + [False]
    seen.add({"loss": 1.0, "grad_norm": 1.0})
    assert seen.may_skip() and (seen.skipped, seen.skipped_in_a_row) == (MOST_SKIPS + 1, 1)
    other = watch(5.0, action="skip")
    other.load_state_dict(seen.state_dict())
    assert other.state_dict() == seen.state_dict()


@pytest.mark.parametrize(
    ("factors", "action", "named"),
    [
        ({"los": 2.0}, "stop", r"model\.spike_factors: expected factors of loss and grad_norm, found 'los'"),
        ({"loss": 1.0}, "stop", r"model\.spike_factors\[loss\]: expected a factor above 1"),
        ({}, "pass", r"model\.spike_action: expected stop or skip, found 'pass'"),
    ],
)
def test_refuses_what_watches_nothing(factors: dict[str, float], action: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        SpikeWatch(factors, action)


class Spikes(pl.Callback):
    """Makes the gradient norms of some steps (from 1) a thousand times as large, and keeps the state around them."""

    def __init__(self, *steps: int):
        self.steps, self.large = steps, False
        self.before: Any = None
        self.changed: dict[int, list[str]] = {}
        self.logged: dict[int, float] = {}

    def on_train_start(self, trainer: Any, lit: Any) -> None:
        for weight in lit.model.parameters():
            weight.register_hook(lambda gradient: 1000 * gradient if self.large else None)

    def on_train_batch_start(self, trainer: Any, lit: Any, batch: Any, batch_idx: int) -> None:
        if "train/skipped_steps" in trainer.callback_metrics:  # of the step before
            self.logged[trainer.global_step] = float(trainer.callback_metrics["train/skipped_steps"])
        self.large, self.before = trainer.global_step + 1 in self.steps, state(trainer, lit)

    def on_train_batch_end(self, trainer: Any, lit: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.changed[trainer.global_step] = differences(state(trainer, lit), self.before, "state")

    def on_exception(self, trainer: Any, lit: Any, exception: BaseException) -> None:
        self.changed[trainer.global_step + 1] = differences(state(trainer, lit), self.before, "state")


def state(trainer: Any, lit: Any) -> Any:
    weights = {name: tensor.clone() for name, tensor in lit.model.state_dict().items() if torch.is_tensor(tensor)}
    moments = [{name: tensor.clone() for name, tensor in s.state.items()} for s in trainer.optimizers[0].shards()]
    return weights, moments


def test_a_skipped_step_changes_nothing_and_a_row_of_them_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spikes, "LEAST_HISTORY", 3)
    callback = Spikes(2, 5, 7, 8, 9, 10)  # at step 2 there is no history yet
    module = {"spike_factors": {"grad_norm": 50.0}, "spike_action": "skip", "text": {**TEXT, **EXPERTS}}
    with pytest.raises(TrainingFault, match=r"^step 10: gradient norm .* times the median .* of the last 5 steps"):
        fit(tmp_path, 12, [callback], module=module, gradient_clip_val=0.0)
    taken = {step for step, changed in callback.changed.items() if changed}
    assert taken == {1, 2, 3, 4, 6}  # weights, router's biases and moments: to the last bit
    assert callback.logged == {1: 0, 2: 0, 3: 0, 4: 0, 5: 1, 6: 1, 7: 2, 8: 3, 9: 4}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("guard")]
    assert len(lines) == 4 and "left out (3 in a row, 4 in all); samples '96', '97'" in lines[-1]


def test_the_history_goes_on_in_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spikes, "LEAST_HISTORY", 3)
    module = {"spike_factors": {"grad_norm": 50.0}, "spike_action": "skip"}
    _, straight, _ = fit(tmp_path, 7, [Spikes(4, 6)], module=module)
    fit(tmp_path, 5, [Spikes(4, 6), save_at(5, tmp_path)], module=module, enable_checkpointing=True)
    _, resumed, _ = fit(tmp_path, 7, [Spikes(4, 6)], module=module, ckpt_path=tmp_path / "at5.ckpt")
    assert resumed.guard.spikes.state_dict() == straight.guard.spikes.state_dict()
    assert resumed.guard.spikes.skipped == 2
