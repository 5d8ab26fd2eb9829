"""Stages of `FreezeSchedule`: factors, groups, and what is refused before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from freeze_runs import PROJECTOR, TEXT, VISION, fit

from callbacks.freeze_schedule import FreezeSchedule
from callbacks.freeze_stages import factor_at, parse_stages
from step37_lit import ConfigError, Step37Config, Step37LitModule
from step37_lit.parameter_groups import layer_depths, split_parameters


def test_factors_are_a_function_of_the_step() -> None:
    gradual = {"factor": 0.5, "gradual": {"every_steps": 10}}
    stages = parse_stages(
        [
            {"name": "a", "until": {"step": 4}, "train": {"projector": 1.0}, "warmup_steps": 2},
            {"name": "b", "until": {"step": 20}, "train": {"projector": 0.2, "text_decoder": gradual}},
            {"name": "c", "train": {"text_decoder": gradual}, "warmup_steps": 4},
        ]
    )
    starts = [0, 4, 20]

    def factors(group: str, depth: int, steps: list[int]) -> list[float]:
        return [factor_at(stages, [s for s in starts if s <= step], step, group, depth) for step in steps]

    assert factors("projector", 0, [0, 1, 3, 4, 19, 20]) == [0.5, 1.0, 1.0, 0.2, 0.2, 0.0]
    assert factors("text_decoder", 0, [3, 4, 19, 20]) == [0.0, 0.5, 0.5, 0.5]  # trains on: no warm-up from 0
    assert factors("text_decoder", 1, [4, 13, 14, 20]) == [0.0, 0.0, 0.5, 0.5]
    # Two layers had not begun when the stage was over: they wait from the start of the next one.
    assert factors("text_decoder", 2, [19, 20, 39, 40, 41, 43, 99]) == [0.0, 0.0, 0.0, 0.125, 0.25, 0.5, 0.5]
    assert factors("vision_tower", 0, [0, 50]) == [0.0, 0.0]


def test_warmup_begins_at_the_factor_that_was_reached() -> None:
    stages = parse_stages(
        [
            {"name": "a", "until": {"epoch": 1}, "train": {"projector": 1.0}, "warmup_steps": 10},
            {"name": "left out", "until": {"step": 3}, "train": {"vision_tower": 1.0}},
            {"name": "c", "train": {"projector": 0.1}, "warmup_steps": 4},
        ]
    )
    starts = [0, 5, 5]  # the middle stage was over as it began
    found = [factor_at(stages, starts, step, "projector", 0) for step in (5, 6, 8, 9)]
    assert found == pytest.approx([0.4, 0.3, 0.1, 0.1])
    assert factor_at(stages, starts, 5, "vision_tower", 0) == 0


def test_groups_of_parameters() -> None:
    config = Step37Config.preset("tiny_moe")
    whole = split_parameters(config, ["text_decoder", "projector", "vision_tower"], "stages")
    parted = split_parameters(config, ["text_decoder", "router"], "stages")
    routers = {name for name in whole["text_decoder"] if ".router." in name}
    assert routers and set(parted["router"]) == routers == set(whole["text_decoder"]) - set(parted["text_decoder"])
    lit = Step37LitModule(preset="tiny_moe")
    lit.configure_model()
    assert {name for names in whole.values() for name in names} == {name for name, _ in lit.model.named_parameters()}
    depths = layer_depths(whole["text_decoder"])
    assert depths is not None
    last = config.text.num_layers - 1
    assert depths["output_layer.weight"] == depths[f"decoder.layers.{last}.input_layernorm.weight"] == 0
    assert depths["embedding.word_embeddings.weight"] == depths["decoder.layers.0.input_layernorm.weight"] == last
    tower = layer_depths(whole["vision_tower"])
    assert tower is not None and tower["vision_model.vit_downsampler2.weight"] == 0
    assert tower["vision_model.conv1.weight"] == config.vision.num_layers - 1
    assert layer_depths(whole["projector"]) is None


ONE = {"name": "a", "train": {"projector": 1.0}}
PLATEAU = {"metric": "val/loss", "patience": 1}


def until(**end: Any) -> list[dict[str, Any]]:
    return [{**ONE, "until": end}, {"name": "b", "train": {"projector": 1.0}}]


def train(groups: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": "a", "train": groups}]


UNREADABLE: list[tuple[list[dict[str, Any]], str]] = [
    ([], "stages: expected at least one stage"),
    ([{"train": {"projector": 1.0}}], "stages[0].name"),
    (train({}), "stages[0].train: expected at least one group"),
    (train({"projector": 0}), "stages[0].train[projector]: expected a factor above 0"),
    (train({"projector": float("nan")}), "stages[0].train[projector]"),
    (train({"projector": {"factr": 1.0}}), "stages[0].train[projector].factr: expected one of factor, gradual (did"),
    (train({"text_decoder": {"gradual": {"every_steps": 0}}}), "stages[0].train[text_decoder].gradual.every_steps"),
    ([{**ONE, "warmup": 3}], "(did you mean warmup_steps?)"),
    ([{**ONE, "warmup_steps": -1}], "stages[0].warmup_steps"),
    ([ONE, {**ONE, "name": "b"}], "stages[0].until: expected step, epoch or plateau"),
    ([{**ONE, "until": {"step": 3}}], "stages[0].until: expected none: the last stage has no end"),
    ([*until(step=3)[:1], ONE], "names: expected different ones"),
    (until(step=3, epoch=1), "stages[0].until: expected one of step, epoch, plateau"),
    (until(step=0), "stages[0].until.step"),
    (until(stop=3), "(did you mean step?)"),
    (until(plateau={"metric": "val/loss"}), "stages[0].until.plateau.patience"),
    (until(plateau={**PLATEAU, "mode": "down"}), "stages[0].until.plateau.mode"),
    (until(plateau={**PLATEAU, "min_delta": -1}), "stages[0].until.plateau.min_delta"),
    ([{**PROJECTOR}, {**TEXT, "until": {"step": 4}}, VISION], "stages[1].until.step: expected more than 4"),
]


@pytest.mark.parametrize(("stages", "named"), UNREADABLE, ids=[named for _, named in UNREADABLE])
def test_unreadable_stages_are_refused(stages: list[dict[str, Any]], named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        FreezeSchedule(stages)
    assert named in str(refused.value) and "\n" not in str(refused.value)


MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"stages": train({"vision_towr": 1.0})}, "did you mean vision_tower?"),
    ({"stages": train({"decoder.layers.9.*": 1.0})}, "that matches a parameter's whole name"),
    ({"stages": train({"decoder(": 1.0})}, "or a regular expression ("),
    ({"stages": train({"router": 1.0})}, "it has no routed experts"),
    ({"stages": train({"mtp": 1.0})}, "its MTP layers are not built"),
    ({"stages": train({"text_decoder": 1.0, "decoder.layers.0.*": 0.1})}, "is in 'text_decoder' too"),
    ({"stages": train({"projector": {"gradual": {"every_steps": 2}}})}, "a group with one stack of layers"),
    ({"stages": [ONE], "module": {"freeze_vision_model": True}}, "model.freeze_*: expected false"),
    ({"stages": until(plateau={**PLATEAU, "metric": "val/los"}), "limit_val_batches": 1}, "did you mean val/loss?"),
    ({"stages": until(plateau=PLATEAU), "limit_val_batches": 0}, "trainer.limit_val_batches"),
]


@pytest.mark.parametrize(("changes", "named"), MISFITS, ids=[named for _, named in MISFITS])
def test_a_schedule_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    class Started(pl.Callback):
        def on_fit_start(self, trainer: Any, lit: Any) -> None:
            raise AssertionError("training was set up")

    with pytest.raises(ConfigError) as refused:
        fit(tmp_path, callbacks=[Started()], **changes)
    assert named in str(refused.value) and "\n" not in str(refused.value)


def test_a_metric_that_a_validation_lacks_is_refused(tmp_path: Path) -> None:
    stages = until(plateau={**PLATEAU, "metric": "val/attribute_accuracy/size"})
    with pytest.raises(ConfigError, match=r"plateau\.metric: expected a value of this validation: .*val/loss"):
        fit(tmp_path, stages, limit_val_batches=1, val_check_interval=2)


def test_the_command_line_refuses_before_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from step37_lit import cli

    stages = "[{name: a, train: {projectr: 1.0}}]"
    arguments = ["fit", "--model.preset", "tiny", "--data", "datamodules.scenes.ScenesDataModule"]
    arguments += ["--data.preset", "tiny", "--trainer.default_root_dir", str(tmp_path / "run")]
    arguments += ["--trainer.max_steps", "200", "--trainer.callbacks"]
    arguments += ["callbacks.freeze_schedule.FreezeSchedule", "--trainer.callbacks.stages", stages]
    assert cli.run(arguments) == 2
    assert "did you mean projector?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
