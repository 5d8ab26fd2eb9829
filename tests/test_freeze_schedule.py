"""`FreezeSchedule` on one rank: real freezing, exact resume, plateaus. Several ranks: layouts/test_freezing.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from freeze_runs import PROJECTOR, STAGES, TEXT, TEXT_PREFIXES, VISION, Parts, fit, in_groups
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from training import module_arguments

from callbacks.freeze_schedule import FreezeSchedule
from step37_lit import ConfigError, Step37LitModule


def moments(trainer: pl.Trainer) -> list[dict[str, torch.Tensor]]:
    """Of each weight; empty where it has none."""
    return [shard.state for shard in trainer.optimizers[0].shards()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run through all stages, with a checkpoint behind every step."""
    root, parts = tmp_path_factory.mktemp("straight"), Parts()
    every = ModelCheckpoint(root, "at{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
    changes = {"enable_checkpointing": True, "logger": CSVLogger(root, name="", version="")}
    trainer, lit, rows = fit(root, STAGES, callbacks=[parts, every, LearningRateMonitor()], **changes)
    lines = [line.split(",") for line in (root / "metrics.csv").read_text().splitlines()]
    return {"root": root, "parts": parts, "rows": rows, "columns": lines[0], "lines": lines[1:], "lit": lit} | {
        "optimizer": moments(trainer)
    }


def test_frozen_parameters_keep_their_bits(straight: dict[str, Any]) -> None:
    parts = straight["parts"]
    names = set(parts.weights[0])
    assert parts.changed(0, 4) == in_groups(names, "align_projector.")
    late = {name for name in names if name.startswith(("decoder.layers.1.", "decoder.final", "output_layer."))}
    assert parts.changed(4, 6) == in_groups(names, "align_projector.") | late  # the last layer first
    assert parts.changed(6, 8) == in_groups(names, "align_projector.", *TEXT_PREFIXES)
    assert parts.changed(8, 12) == in_groups(names, "vision_model.", *TEXT_PREFIXES)  # the projector is frozen again


def test_moments_are_fresh_and_go_with_freezing(straight: dict[str, Any]) -> None:
    moments = straight["parts"].moments
    assert moments[3] == {4.0}
    assert moments[4] == {5.0, 1.0}  # the projector, and the last layer in its first step
    assert moments[6] == {7.0, 3.0, 1.0}
    assert moments[7] == {4.0, 2.0}  # behind its last step the projector's are gone
    assert moments[8] == {5.0, 3.0, 1.0}
    states = [state for state in straight["optimizer"] if state]
    assert sorted({float(state["step"]) for state in states}) == [4.0, 6.0, 8.0]


def test_norm_is_that_of_what_trains(straight: dict[str, Any]) -> None:
    norms = [norm for _, norm, _ in straight["rows"]]
    assert norms == pytest.approx(straight["parts"].norms, rel=1e-5)
    assert max(norms[:4]) < min(norms[5:]) / 2  # a few parameters, then many


def test_a_monitor_shows_the_used_rates(straight: dict[str, Any]) -> None:
    peak, rates = 1e-3, straight["parts"].rates
    assert [rate["projector"] for rate in rates[:3]] == pytest.approx([peak / 3, peak * 2 / 3, peak])
    assert rates[4]["text_decoder/1"] == pytest.approx(0.25 * rates[4]["projector"])  # first of 2 warm-up steps
    assert rates[5]["text_decoder/1"] == pytest.approx(0.5 * rates[5]["projector"])
    assert rates[5]["text_decoder/0"] == 0
    assert rates[6]["text_decoder/0"] == pytest.approx(0.25 * rates[6]["projector"])
    assert rates[8]["projector"] == 0
    assert rates[8]["vision_tower"] == pytest.approx(rates[8]["text_decoder/0"] / 5)
    for name in ("projector", "text_decoder/1", "vision_tower/no_decay"):
        column = straight["columns"].index(f"lr-ForwardingOptimizer/{name}")
        logged = [float(line[column]) for line in straight["lines"] if line[column]]
        assert logged == pytest.approx([rate[name] for rate in rates])
    column = straight["columns"].index("train/stage")
    assert [float(line[column]) for line in straight["lines"] if line[column]] == [0.0] * 4 + [1.0] * 4 + [2.0] * 4


@pytest.mark.parametrize("stop", [2, 4, 5, 7, 8, 10])  # inside each stage, at each border, before a layer begins
def test_resume_is_exact(straight: dict[str, Any], tmp_path: Path, stop: int) -> None:
    path = straight["root"] / f"at{stop}.ckpt"
    trainer, lit, rows = fit(tmp_path, STAGES, ckpt_path=path, module={"seed": 77})
    assert rows == straight["rows"][stop:]  # loss, norm and rate, to the last bit
    expected = straight["parts"].weights[-1]
    assert all(torch.equal(p, expected[name]) for name, p in lit.model.named_parameters())
    for own, other in zip(moments(trainer), straight["optimizer"], strict=True):
        assert own.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in own.items())


def test_a_resume_with_other_moments_is_noticed(straight: dict[str, Any], tmp_path: Path) -> None:
    """The comparison above can fail: other step counts of the moments change the weights."""

    class Older(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, lit: Any) -> None:
            for state in moments(trainer):
                if state:
                    state["step"].fill_(100.0)

    _, _, rows = fit(tmp_path, STAGES, callbacks=[Older()], ckpt_path=straight["root"] / "at5.ckpt")
    assert rows[0] == straight["rows"][5]  # weights, and so loss and norm of the first step, are the same
    assert rows[1] != straight["rows"][6]


def test_bf16(tmp_path: Path) -> None:
    """fp32 main parameters: frozen ones keep the bits of both, also where they trained before."""
    stages = [
        {"name": "a", "until": {"step": 2}, "train": {"text_decoder": 1.0}},
        {"name": "b", "until": {"step": 4}, "train": {"vision_tower": 1.0}},
        {"name": "c", "train": {"text_decoder": 1.0}},
    ]
    parts = Parts()
    save = ModelCheckpoint(tmp_path, "at{step}", every_n_train_steps=3, save_top_k=-1, auto_insert_metric_name=False)
    changes = {"precision": "bf16-true", "module": {"warmup_steps": 0}}
    _, lit, rows = fit(tmp_path, stages, 6, [parts, save], enable_checkpointing=True, **changes)
    names = set(parts.weights[0])
    assert parts.weights[0]["align_projector.weight"].dtype == torch.bfloat16
    assert parts.changed(0, 2) <= in_groups(names, *TEXT_PREFIXES) and len(parts.changed(0, 2)) > 8
    assert parts.changed(2, 4) <= in_groups(names, "vision_model.") and len(parts.changed(2, 4)) > 8
    assert parts.changed(4, 6) <= in_groups(names, *TEXT_PREFIXES) and len(parts.changed(4, 6)) > 8
    assert parts.moments[-1] == {2.0}
    _, resumed, second = fit(tmp_path, stages, 6, ckpt_path=tmp_path / "at3.ckpt", **changes)
    assert second == rows[3:]
    for (name, p), q in zip(lit.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_stage_equals_the_simple_form(tmp_path: Path) -> None:
    """Frozen in the optimizer (the tower trains later) or left out of it: the same weights, bit for bit."""
    later = {"name": "later", "train": {"vision_tower": 1.0}}
    first = {"name": "first", "until": {"step": 6}, "train": {"projector": 1.0, "text_decoder": 1.0}}
    weights = []
    for stages, module in (([first, later], {}), (None, {"freeze_vision_model": True})):
        _, lit, _ = fit(tmp_path, stages, 6, module=module, gradient_clip_val=None)
        weights.append(dict(lit.model.named_parameters()))
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def test_a_frozen_tower_is_outside_of_the_graph(tmp_path: Path) -> None:
    class Graph(pl.Callback):
        seen: list[bool]

        def on_train_start(self, trainer: Any, lit: Any) -> None:
            self.seen = []
            lit.model.vision_model.register_forward_hook(lambda m, args, out: self.seen.append(out.requires_grad))

    graph = Graph()
    stages = [{**PROJECTOR, "until": {"step": 1}}, {"name": "all", "train": {"projector": 1.0, "vision_tower": 1.0}}]
    fit(tmp_path, stages, 2, [graph])
    assert graph.seen == [False] * 4 + [True] * 4  # four packs a step


def test_a_frozen_router_keeps_its_bias(tmp_path: Path) -> None:
    def biases(lit: Step37LitModule) -> dict[str, torch.Tensor]:
        return {name: b.clone() for name, b in lit.model.named_buffers() if name.endswith("expert_bias")}

    stages = [
        {"name": "without", "until": {"step": 1}, "train": {"text_decoder": 1.0, "projector": 1.0}},
        {"name": "with", "train": {"router": 1.0}},
    ]
    module = {"preset": "tiny_moe", "lr": 1e-4}
    start = Step37LitModule(**module_arguments(**module))
    start.configure_model()
    expected = biases(start)
    for steps, same in ((1, True), (2, False)):
        parts = Parts()
        _, lit, _ = fit(tmp_path, stages, steps, [parts], module=module)
        found = biases(lit)
        assert found and all(torch.equal(found[name], expected[name]) == same for name in found)
        assert any(".router." in name for name in parts.changed(0, steps)) != same
    _, lit, _ = fit(tmp_path, None, 1, module=module | {"freeze_language_model": True})
    assert all(torch.equal(bias, expected[name]) for name, bias in biases(lit).items())


def test_a_later_fit_without_a_schedule_trains_everything(tmp_path: Path) -> None:
    _, lit, _ = fit(tmp_path, [{"name": "only", "train": {"align_projector.*": 1.0}}], 2)
    before = {name: p.detach().clone() for name, p in lit.model.named_parameters()}
    fit(tmp_path, None, 2, lit=lit)
    assert all(not torch.equal(p, before[name]) for name, p in lit.model.named_parameters())


# ---- ends of stages that are not known before ----


def test_epochs_end_a_stage(tmp_path: Path) -> None:
    stages = [
        {"name": "a", "until": {"epoch": 1}, "train": {"projector": 1.0}},
        {"name": "late", "until": {"step": 30}, "train": {"vision_tower": 1.0}},
        {"name": "c", "train": {"text_decoder": 1.0}, "warmup_steps": 2},
    ]
    parts, save = Parts(), ModelCheckpoint(tmp_path, "end{epoch}", save_top_k=-1, auto_insert_metric_name=False)
    with pytest.warns(UserWarning, match="stage 'late' is over as it begins"):
        trainer, _, rows = fit(tmp_path, stages, 44, [parts, save], max_epochs=3, enable_checkpointing=True)
    schedule = next(callback for callback in trainer.callbacks if isinstance(callback, FreezeSchedule))
    assert schedule.starts == [0, 40, 40]
    names = set(parts.weights[0])
    assert parts.changed(0, 40) == in_groups(names, "align_projector.")
    assert parts.changed(40, 44) == in_groups(names, *TEXT_PREFIXES)
    with pytest.warns(UserWarning, match="stage 'late' is over as it begins"):
        _, _, second = fit(tmp_path, stages, 44, ckpt_path=tmp_path / "end0.ckpt", max_epochs=3)
    assert second == rows[40:]


def test_plateaus_end_a_stage_and_resume(tmp_path: Path) -> None:
    stages = [
        {
            "name": "a",
            "until": {"plateau": {"metric": "val/loss", "patience": 2, "min_delta": 100.0}},
            "train": {"projector": 1.0},
        },
        {
            "name": "b",
            "until": {"plateau": {"metric": "val/attribute_accuracy", "patience": 1, "mode": "max"}},
            "train": {"text_decoder": 0.5},
            "warmup_steps": 3,
        },
        {"name": "c", "train": {"vision_tower": 1.0}},
    ]
    validate = {"limit_val_batches": 1, "val_check_interval": 2, "num_sanity_val_steps": 1}
    # Written behind each validation, or behind each step and ahead of the validation that follows it.
    changes = {"save_top_k": -1, "auto_insert_metric_name": False, "save_on_train_epoch_end": False}
    saves: list[pl.Callback] = [
        ModelCheckpoint(tmp_path, "behind{step}", monitor="val/loss", **changes),
        ModelCheckpoint(tmp_path, "ahead{step}", every_n_train_steps=1, **changes),
    ]
    trainer, lit, rows = fit(tmp_path, stages, 14, saves, enable_checkpointing=True, **validate)
    schedule = next(callback for callback in trainer.callbacks if isinstance(callback, FreezeSchedule))
    # The first validation sets the best; the sanity check and the loss's slow fall do not count as improvement.
    assert schedule.starts[:2] == [0, 6]
    assert len(schedule.starts) == 3 and schedule.starts[2] >= 10
    last = schedule.starts[2]
    for name in ("behind2", "ahead3", "ahead4", "behind4", "ahead6", "behind6", f"ahead{last}", f"behind{last}"):
        stop = int(name.removeprefix("ahead").removeprefix("behind"))
        resumed, other, second = fit(tmp_path, stages, 14, ckpt_path=tmp_path / f"{name}.ckpt", **validate)
        again = next(callback for callback in resumed.callbacks if isinstance(callback, FreezeSchedule))
        assert again.state_dict() == schedule.state_dict(), name
        assert second == rows[stop:], name
        for p, q in zip(lit.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(p, q), name


def test_another_schedules_checkpoint_is_refused(straight: dict[str, Any], tmp_path: Path) -> None:
    path = straight["root"] / "at5.ckpt"
    with pytest.raises(ConfigError, match="that were reached: expected"):
        fit(tmp_path, [PROJECTOR, {**TEXT, "name": "words"}, VISION], ckpt_path=path)
    flat = {**TEXT, "train": {"projector": 1.0, "text_decoder": 0.5}}
    with pytest.raises(ConfigError, match="groups of a freezing schedule"):
        fit(tmp_path, [PROJECTOR, flat, VISION], ckpt_path=path)
    with pytest.raises(ConfigError, match="groups of a freezing schedule"):
        fit(tmp_path, None, ckpt_path=path)
