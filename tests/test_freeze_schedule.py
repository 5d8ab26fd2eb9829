"""`FreezeSchedule` on one rank: stages, groups, factors, real freezing, exact resume, plateaus, refusals.

Several ranks are in tests/layouts/test_freezing.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

sys.path.insert(0, str(Path(__file__).parent))
from training import Record, TinyData, module_arguments, trainer_arguments

from callbacks.freeze_schedule import FreezeSchedule
from callbacks.freeze_stages import factor_at, parse_stages
from step37_lit import ConfigError, MegatronStrategy, Step37Config, Step37LitModule
from step37_lit.parameter_groups import layer_depths, split_parameters

PROJECTOR = {"name": "projector", "until": {"step": 4}, "train": {"projector": 1.0}}
TEXT = {
    "name": "text",
    "until": {"step": 8},
    "train": {"projector": 1.0, "text_decoder": {"factor": 0.5, "gradual": {"every_steps": 2}}},
    "warmup_steps": 2,
}
VISION = {"name": "vision", "train": {"text_decoder": 0.5, "vision_tower": 0.1}}
STAGES = [PROJECTOR, TEXT, VISION]
STEPS = 12


class Parts(pl.Callback):
    """Weights before each step, what torch's AdamW holds behind it, and the rates of the step by group."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.moments: list[set[float]] = []  # step counts of the shards with moments
        self.rates: list[dict[str, float]] = []
        self.norms: list[float] = []

    def on_train_batch_start(self, trainer: Any, lit: Any, batch: Any, batch_idx: int) -> None:
        self.weights.append({name: p.detach().clone() for name, p in lit.model.named_parameters()})
        self.rates.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})

    def on_before_zero_grad(self, trainer: Any, lit: Any, optimizer: Any) -> None:  # gradients are there, not clipped
        trained = [p.main_grad for p in lit.model.parameters() if p.requires_grad]
        self.norms.append(float(torch.stack([grad.double().square().sum() for grad in trained]).sum().sqrt()))

    def on_train_batch_end(self, trainer: Any, lit: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        states = [state for inner in trainer.optimizers[0].inner for state in inner.state.values()]
        self.moments.append({float(state["step"]) for state in states})

    def on_train_end(self, trainer: Any, lit: Any) -> None:
        self.weights.append({name: p.detach().clone() for name, p in lit.model.named_parameters()})

    def changed(self, first: int, last: int) -> set[str]:
        """Parameters that moved between the start of step `first` and the end of step `last - 1`."""
        before, after = self.weights[first], self.weights[last]
        return {name for name in before if not torch.equal(before[name], after[name])}


def fit(
    root: Path,
    stages: list[dict[str, Any]] | None,
    steps: int = STEPS,
    callbacks: list[pl.Callback] | None = None,
    module: dict[str, Any] | None = None,
    lit: Step37LitModule | None = None,
    ckpt_path: Path | None = None,
    **trainer_changes: Any,
) -> tuple[pl.Trainer, Step37LitModule, list]:
    record = Record()
    schedule = [FreezeSchedule(stages)] if stages is not None else []
    trainer = pl.Trainer(
        strategy=MegatronStrategy(),
        callbacks=[*schedule, record, *(callbacks or [])],
        **trainer_arguments(root, **({"max_steps": steps, "limit_val_batches": 0} | trainer_changes)),
    )
    lit = lit or Step37LitModule(**module_arguments(**({"decay_steps": 40} | (module or {}))))
    trainer.fit(lit, datamodule=TinyData(steps=40), ckpt_path=ckpt_path)
    return trainer, lit, record.rows


def in_groups(names: set[str], *prefixes: str) -> set[str]:
    return {name for name in names if name.startswith(prefixes)}


TEXT_PREFIXES = ("embedding.", "decoder.", "output_layer.")


# ---- stages and factors, without a model ----


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


# ---- freezing ----


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run through all stages, with a checkpoint behind every step."""
    root, parts = tmp_path_factory.mktemp("straight"), Parts()
    every = ModelCheckpoint(root, "at{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
    changes = {"enable_checkpointing": True, "logger": CSVLogger(root, name="", version="")}
    trainer, lit, rows = fit(root, STAGES, callbacks=[parts, every, LearningRateMonitor()], **changes)
    lines = [line.split(",") for line in (root / "metrics.csv").read_text().splitlines()]
    return {"root": root, "parts": parts, "rows": rows, "columns": lines[0], "lines": lines[1:], "lit": lit} | {
        "optimizer": trainer.optimizers[0].state_dict()
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
    states = straight["optimizer"]["inner"][0]["state"].values()
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
    for own, other in zip(trainer.optimizers[0].state_dict()["inner"], straight["optimizer"]["inner"], strict=True):
        assert own["state"].keys() == other["state"].keys()
        for index, state in own["state"].items():
            assert all(torch.equal(value, other["state"][index][name]) for name, value in state.items())


def test_a_resume_with_other_moments_is_noticed(straight: dict[str, Any], tmp_path: Path) -> None:
    """The comparison above can fail: other step counts of the moments change the weights."""
    checkpoint = torch.load(straight["root"] / "at5.ckpt", weights_only=True)
    for state in checkpoint["optimizer_states"][0]["data_parallel_ranks"][0]["inner"][0]["state"].values():
        state["step"].fill_(100.0)
    torch.save(checkpoint, tmp_path / "old.ckpt")
    _, _, rows = fit(tmp_path, STAGES, ckpt_path=tmp_path / "old.ckpt")
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


# ---- refusals ----

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


def test_another_schedules_checkpoint_is_refused(straight: dict[str, Any], tmp_path: Path) -> None:
    path = straight["root"] / "at5.ckpt"
    with pytest.raises(ConfigError, match="that were reached: expected"):
        fit(tmp_path, [PROJECTOR, {**TEXT, "name": "words"}, VISION], ckpt_path=path)
    flat = {**TEXT, "train": {"projector": 1.0, "text_decoder": 0.5}}
    with pytest.raises(ConfigError, match="groups of a freezing schedule"):
        fit(tmp_path, [PROJECTOR, flat, VISION], ckpt_path=path)
    with pytest.raises(ConfigError, match="groups of a freezing schedule"):
        fit(tmp_path, None, ckpt_path=path)


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
