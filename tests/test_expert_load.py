"""`ExpertLoad`: its counts against an independent count, over ranks, after a resume, and when it must keep quiet."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "layouts"))
import spawn
from training import TinyData, module_arguments, trainer_arguments

from callbacks.expert_load import FILE, ExpertLoad, load_figures
from step37_lit import ConfigError, MegatronStrategy, Step37LitModule
from step37_lit.megatron.expert_load import LayerLoad

WORKER = Path(__file__).parent / "layouts" / "expert_load_worker.py"
LAYERS, EXPERTS, TOP_K = (2, 3), 8, 2  # of the preset tiny_moe
POSITIONS = 4 * 72  # of a step: packs x length


class CountRoutes(pl.Callback):
    """Counts every step's tokens from the routing maps that the routers return, and keeps the bias behind the step."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[int, int], torch.Tensor] = defaultdict(lambda: torch.zeros(EXPERTS))
        self.bias: dict[tuple[int, int], list[float]] = {}
        self.calls = 0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        for layer in LAYERS:
            router = module.model.decoder.layers[layer].mlp.router

            def count(_: Any, __: Any, out: tuple, layer: int = layer) -> None:
                if trainer.training:
                    self.calls += 1
                    self.tokens[trainer.global_step + 1, layer] += out[1].sum(dim=0)

            router.register_forward_hook(count)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        for layer in LAYERS:
            bias = module.model.decoder.layers[layer].mlp.router.expert_bias
            self.bias[trainer.global_step, layer] = bias.tolist()


def train(folder: Path, *callbacks: pl.Callback, ckpt_path: Path | None = None, **changed: Any) -> pl.Trainer:
    arguments = trainer_arguments(folder, logger=CSVLogger(folder, "", ""), max_steps=6, **changed)
    trainer = pl.Trainer(strategy=MegatronStrategy(), callbacks=list(callbacks), **arguments)
    module = Step37LitModule(**module_arguments(preset="tiny_moe"))
    trainer.fit(module, datamodule=TinyData(), ckpt_path=ckpt_path)
    return trainer


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_counts_equal_those_of_the_routing_maps(tmp_path: Path) -> None:
    counted = CountRoutes()
    changed = {"val_check_interval": 2, "num_sanity_val_steps": 1}  # evaluation routes tokens too: not counted
    train(tmp_path, ExpertLoad(2), counted, **changed)
    rows = read(tmp_path)
    assert counted.calls == 6 * 4 * len(LAYERS)
    assert [(row["step"], row["layer"]) for row in rows] == [(step, layer) for step in (2, 4, 6) for layer in LAYERS]
    for row in rows:
        place = row["step"], row["layer"]
        assert row["tokens"] == counted.tokens[place].tolist()
        assert sum(row["tokens"]) == POSITIONS * TOP_K
        assert row["bias"] == pytest.approx(counted.bias[place], rel=1e-6)
        assert any(row["bias"])


def test_what_is_logged(tmp_path: Path) -> None:
    train(tmp_path, ExpertLoad(3))
    rows = {(row["step"], row["layer"]): row for row in read(tmp_path)}
    with (tmp_path / "metrics.csv").open(newline="") as file:
        logged = [row for row in csv.DictReader(file) if row["train/dropped_tokens"]]
    assert [int(row["step"]) for row in logged] == [2, 5]  # the third and the sixth, counted from 0 as the loss is
    for row in logged:
        assert float(row["train/dropped_tokens"]) == 0
        for layer in LAYERS:
            kept = rows[int(row["step"]) + 1, layer]
            shares = torch.tensor(kept["tokens"], dtype=torch.float64) / (POSITIONS * TOP_K)
            entropy = torch.distributions.Categorical(shares).entropy() / math.log(EXPERTS)
            assert float(row[f"train/expert_entropy/layer_{layer}"]) == pytest.approx(float(entropy))
            assert float(row[f"train/expert_largest_share/layer_{layer}"]) == pytest.approx(float(shares.max()))
            spread = max(kept["bias"]) - min(kept["bias"])
            assert float(row[f"train/router_bias_spread/layer_{layer}"]) == pytest.approx(spread)


def test_figures_at_both_ends() -> None:
    even = load_figures(LayerLoad(0, [5] * 4, [0.0] * 4))
    assert even == pytest.approx({"expert_entropy": 1.0, "expert_largest_share": 0.25, "router_bias_spread": 0.0})
    one = load_figures(LayerLoad(0, [0, 9, 0, 0], [0.25, -0.5, 0.0, 0.0]))
    assert one == {"expert_entropy": 0.0, "expert_largest_share": 1.0, "router_bias_spread": 0.75}


def test_training_is_the_same_and_other_steps_do_nothing(tmp_path: Path) -> None:
    """The losses do not change, and megatron's function is its own again in every step that is not counted."""

    class Functions(pl.Callback):
        seen: list[Any]

        def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
            self.seen = [module.model.config.finalize_model_grads_func]

        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            self.seen.append(module.model.config.finalize_model_grads_func)

    losses = []
    for name, callbacks in (("with", [ExpertLoad(4), Functions()]), ("without", [])):
        (tmp_path / name).mkdir()
        train(tmp_path / name, *callbacks)
        with (tmp_path / name / "metrics.csv").open(newline="") as file:
            losses.append([row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]])
        if callbacks:
            own, *steps = callbacks[1].seen
            assert [function is own for function in steps] == [True, True, True, False, True, True]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert not (tmp_path / "without" / FILE).exists()


def test_a_resumed_run_goes_on_in_the_file(tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "at3.ckpt")

    train(tmp_path, ExpertLoad(1), Save())
    straight = read(tmp_path)
    assert len(straight) == 6 * len(LAYERS)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 7, "lay')  # killed while writing
    train(tmp_path, ExpertLoad(1), ckpt_path=tmp_path / "at3.ckpt")
    assert read(tmp_path) == straight
    train(tmp_path, ExpertLoad(3))  # another run in the folder
    assert [row["step"] for row in read(tmp_path)] == [3, 3, 6, 6]


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    trainer = pl.Trainer(strategy=MegatronStrategy(), callbacks=[ExpertLoad()], **trainer_arguments(tmp_path))
    with pytest.raises(ConfigError, match=r"ExpertLoad: expected a model with experts \(text.moe_layers\), found \(\)"):
        trainer.fit(Step37LitModule(**module_arguments()), datamodule=TinyData())
    with pytest.raises(ConfigError, match="every_n_steps: expected a positive number, found 0"):
        ExpertLoad(0)
    assert list(tmp_path.iterdir()) == []


def on_ranks(folder: Path, devices: int, strategy: dict[str, Any]) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    job = {"folder": str(folder), "devices": devices, "strategy": strategy}
    done = spawn.run([sys.executable, str(WORKER), json.dumps(job)])
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return read(folder)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(tmp_path_factory.mktemp("one"), 1, {})


@pytest.mark.parametrize(
    "strategy",
    [
        {},
        {"expert": 2},
        {"pipeline": 2},
        {"pipeline": 2, "virtual_pipeline": 2, "recompute": "full"},
        {"tensor": 2, "sequence_parallel": True, "expert_tensor": 2},
        {"tensor": 2},
    ],
    ids=["data", "expert", "pipeline", "virtual stages", "tensor and sequence", "tensor"],
)
def test_two_ranks_count_as_one(strategy: dict[str, Any], one_rank: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = on_ranks(tmp_path, 2, strategy)
    assert [sum(row["tokens"]) for row in rows] == [POSITIONS * TOP_K] * 4
    assert rows == one_rank
