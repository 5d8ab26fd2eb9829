"""`MegatronStrategy` under Lightning's Trainer on one rank: groups of parameters, callbacks, refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger

sys.path.insert(0, str(Path(__file__).parent))
from training import Record, TinyData, module_arguments, trainer_arguments

from step37_lit import MegatronStrategy, Step37LitModule
from step37_lit.errors import ConfigError
from step37_lit.faults import TrainingFault
from tests.reliability.exact_resume import fit, save_at


def test_a_run_that_lost_its_optimizer_state_is_noticed(tmp_path: Path) -> None:
    """The comparison above can fail: training without moments goes on differently."""

    class Forgets(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, lit: Any) -> None:
            for inner in trainer.optimizers[0].inner:
                inner.state.clear()

    _, _, straight = fit(tmp_path, 6)
    fit(tmp_path, 3, [save_at(3, tmp_path)], enable_checkpointing=True)
    _, _, second = fit(tmp_path, 6, [Forgets()], ckpt_path=tmp_path / "at3.ckpt")
    assert second[0][0] == straight[3][0]  # the weights are there
    assert second != straight[3:]


def test_loss_does_not_depend_on_how_samples_are_packed(tmp_path: Path) -> None:
    """One global batch as 4 packs in one step; loss per token of the global batch, by hand from the model."""
    _, _lit, rows = fit(tmp_path, 1)
    fresh = Step37LitModule(**module_arguments())
    fresh.configure_model()
    data = TinyData()
    data.trainer = type("Share", (), {"strategy": MegatronStrategy()})()
    packs = next(iter(data.train_dataloader()))
    with torch.no_grad():
        losses = [(fresh.model(**pack.model_inputs()) * pack.loss_mask).sum().double() for pack in packs]
    expected = sum(losses) / sum(pack.loss_mask.sum() for pack in packs)
    assert rows[0][0] == pytest.approx(float(expected), rel=1e-6)


def test_clipping_honours_the_trainers_value(tmp_path: Path) -> None:
    moved = {}
    for clip in (None, 1e-6):
        # With AdamW a smaller gradient gives the same first step; a large epsilon makes the step follow the gradient.
        changes = {"eps": 1.0, "weight_decay": 0.0, "warmup_steps": 0}
        _, lit, rows = fit(tmp_path, 1, module=changes, gradient_clip_val=clip)
        start = Step37LitModule(**module_arguments(**changes))
        start.configure_model()
        ends = dict(lit.model.named_parameters())
        moved[clip] = max(float((p - ends[name]).abs().max()) for name, p in start.model.named_parameters())
        assert rows[0][1] > 0.1  # the norm is reported as it was before clipping
    assert moved[1e-6] < moved[None] / 1e3


def test_parameter_groups(tmp_path: Path) -> None:
    module = {"lr_factors": {"vision_model.*": 0.1}, "weight_decay": 0.3, "warmup_steps": 0}
    trainer, lit, _ = fit(tmp_path, 1, module=module)
    optimizer = trainer.optimizers[0]
    assert {(round(g["initial_lr"], 9), round(g["weight_decay"], 9)) for g in optimizer.param_groups} == {
        (1e-3, 0.3), (1e-3, 0.0), (1e-4, 0.3), (1e-4, 0.0)
    }  # fmt: skip
    sizes = dict.fromkeys((True, False), 0)
    for name, parameter in lit.model.named_parameters():
        sizes[parameter.dim() > 1] += parameter.numel()
        if name.endswith(("norm.weight", "bias", "gamma")):
            assert parameter.dim() == 1, name
    decayed = sum(p.numel() for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"])
    assert decayed == sizes[True]


def test_frozen_parts_do_not_move(tmp_path: Path) -> None:
    _, lit, _ = fit(tmp_path, 2, module={"freeze_vision_model": True})
    start = Step37LitModule(**module_arguments())
    start.configure_model()
    before = dict(start.model.named_parameters())
    for name, parameter in lit.model.named_parameters():
        same = torch.equal(parameter, before[name])
        assert same == name.startswith("vision_model."), name


def test_lightnings_callbacks_and_loggers_work(tmp_path: Path) -> None:
    stopping = EarlyStopping("val/loss", patience=0, min_delta=100.0)  # nothing improves that much
    checkpoint = ModelCheckpoint(tmp_path / "kept", monitor="val/loss", save_top_k=1, filename="best")
    logger = CSVLogger(tmp_path, name="", version="")
    callbacks = [stopping, checkpoint, LearningRateMonitor()]
    trainer, _, rows = fit(
        tmp_path, 40, callbacks, logger=logger, enable_checkpointing=True, val_check_interval=4, max_epochs=5
    )
    assert trainer.global_step == len(rows) == 8 == stopping.stopped_epoch * 40 + 8
    assert (tmp_path / "kept" / "best.ckpt" / "manifest.json").is_file()
    assert float(checkpoint.best_model_score) == pytest.approx(min(float(v) for v in [checkpoint.best_model_score]))
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    for name in ("train/loss", "train/grad_norm", "train/tokens_per_second", "train/mfu", "val/loss"):
        assert name in columns
    losses = [line.split(",")[columns.index("train/loss")] for line in lines[1:]]
    assert [float(value) for value in losses if value] == pytest.approx([loss for loss, _, _ in rows], rel=1e-6)
    assert any(column.startswith("lr-") for column in columns)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches"),
    ({"gradient_clip_algorithm": "value"}, "trainer.gradient_clip_algorithm"),
    ({"precision": "16-mixed"}, "trainer.precision"),
    ({"callbacks": [StochasticWeightAveraging(1e-3)]}, "none that averages weights"),
    ({"strategy": {"tensor": 2}}, "strategy.tensor"),
    ({"strategy": {"pipeline": 3}}, "strategy"),
    ({"strategy": {"expert": 2}}, "strategy.expert"),
    ({"module": {"decay_steps": None}, "steps": -1}, "model.decay_steps"),
    ({"module": {"warmup_steps": 41}}, "model.warmup_steps"),
    ({"module": {"lr_factors": {"vison_model.*": 0.1}}}, "vison_model"),
    ({"module": {"lr": -1.0}}, "model.lr"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_refuses_what_cannot_work(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        fit(tmp_path, **changes)
    assert named in str(refused.value)
    assert "expected" in str(refused.value) and "\n" not in str(refused.value)


def test_another_strategy_is_refused(tmp_path: Path) -> None:
    trainer = pl.Trainer(**trainer_arguments(tmp_path))
    with pytest.raises(ConfigError, match=r"trainer\.strategy: expected step37_lit\.MegatronStrategy"):
        trainer.fit(Step37LitModule(**module_arguments()), datamodule=TinyData())


def test_a_loss_that_is_not_a_number_stops_before_the_step(tmp_path: Path) -> None:
    class Poison(pl.Callback):
        def on_train_batch_start(self, trainer: Any, lit: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                with torch.no_grad():
                    lit.model.output_layer.weight[3, 3] = float("nan")

    with pytest.raises(
        TrainingFault, match=r"step 3: weight output_layer\.weight not finite \(1 of .*; samples '24', '25'"
    ):
        fit(tmp_path, 5, [Poison()])


def test_two_fits_with_one_module(tmp_path: Path) -> None:
    """A notebook trains on: the second fit starts from the first one's weights and reduces each gradient once."""
    lit = Step37LitModule(**module_arguments(decay_steps=40))
    losses = []
    for _ in range(2):
        record = Record()
        arguments = trainer_arguments(tmp_path, max_steps=3)
        trainer = pl.Trainer(strategy=MegatronStrategy(), callbacks=[record], **arguments)
        trainer.fit(lit, datamodule=TinyData())
        losses.append(record.rows)
    fresh = Step37LitModule(**module_arguments(decay_steps=40))
    fresh.configure_model()
    record = Record()
    trainer = pl.Trainer(strategy=MegatronStrategy(), callbacks=[record], **trainer_arguments(tmp_path, max_steps=3))
    trainer.fit(fresh, datamodule=TinyData())
    assert record.rows == losses[0]
    assert losses[1][0][0] != losses[0][0][0]
    assert losses[1][0][1] == pytest.approx(losses[0][0][1], rel=0.2)  # twice the norm if hooks ran twice
