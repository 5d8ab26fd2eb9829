"""Layouts that cannot work are refused in one line, with the numbers and the nearest ones that would."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from training import TinyData, module_arguments, trainer_arguments

from step37_lit import ConfigError, MegatronStrategy, Step37Config, Step37LitModule
from step37_lit.megatron.layout import ParallelLayout

FLASH = "flash"  # 45 layers, 64 and 96 heads, 8 KV groups, 288 experts
REFUSED: list[tuple[int, dict[str, Any], str]] = [
    (16, {"tensor": 16}, "strategy.tensor: expected a divisor of text.num_kv_groups 8 (nearest: 8), found 16"),
    (6, {"tensor": 3}, "strategy.tensor: expected a divisor of text.num_heads 64 (nearest: 2), found 3"),
    (7, {"expert": 7}, "strategy.expert: expected a divisor of text.num_experts 288 (nearest: 6), found 7"),
    (
        12,
        {"pipeline": 3, "expert": 8},
        "strategy.expert: expected a divisor of the 4 processes of a pipeline stage (nearest: 4), found 8",
    ),
    (
        8,
        {"tensor": 4, "expert_tensor": 2},
        "strategy.expert_tensor: expected 1 or 4 (strategy.tensor), found 2",
    ),
    (2, {"expert_tensor": 2}, "strategy.expert_tensor: expected 1, found 2"),
    (
        8,
        {"tensor": 4, "expert_tensor": 4, "expert": 4},
        "strategy.expert: expected a divisor of the 8 processes of a pipeline stage / expert_tensor 4 (nearest: 2), "
        "found 4",
    ),
    (
        12,
        {"tensor": 2, "pipeline": 9},
        "strategy.tensor x pipeline x context: expected a divisor of the 12 processes (nearest: 12), found 18",
    ),
    (
        8,
        {"pipeline": 8},
        "strategy.pipeline: expected a divisor of text.num_layers 45 (nearest: 9), or strategy.pipeline_layout, such "
        "as [5, 6, 6, 6, 6, 6, 5, 5], found 8",
    ),
    (
        4,
        {"pipeline": 4, "virtual_pipeline": 3},
        "strategy.pipeline x virtual_pipeline: expected a divisor of text.num_layers 45 (nearest: 9), or "
        "strategy.pipeline_layout, such as [3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 3, 3], found 12",
    ),
    (64, {"pipeline": 64}, "strategy.pipeline: expected at most text.num_layers 45, found 64"),
    (1, {"virtual_pipeline": 2}, "strategy.virtual_pipeline: expected null with strategy.pipeline 1, found 2"),
    (3, {"pipeline": 3, "virtual_pipeline": 1}, "strategy.virtual_pipeline: expected null or 2 or more, found 1"),
    (
        2,
        {"pipeline": 2, "pipeline_layout": [20, 20]},
        "strategy.pipeline_layout: expected text.num_layers 45 in all, such as [23, 22], found '[20, 20] of sum 40'",
    ),
    (
        2,
        {"pipeline": 2, "pipeline_layout": [15, 15, 15]},
        "strategy.pipeline_layout: expected 2 numbers (stages x virtual stages), such as [23, 22], found [15, 15, 15]",
    ),
    (
        2,
        {"pipeline": 2, "pipeline_layout": [45, 0]},
        "strategy.pipeline_layout: expected at least one layer everywhere, such as [23, 22], found [45, 0]",
    ),
    (
        2,
        {"pipeline": 2, "pipeline_layout": "Et*22|t*23L"},
        "strategy.pipeline_layout: expected a list of numbers of layers, such as [23, 22], found 'Et*22|t*23L'",
    ),
    (1, {"pipeline_layout": [44]}, "strategy.pipeline_layout: expected text.num_layers 45 in all"),
    (2, {"sequence_parallel": True}, "strategy.sequence_parallel: expected false with strategy.tensor 1, found True"),
    (2, {"pipeline": 0}, "strategy.pipeline: expected 1 or more, found 0"),
]


@pytest.mark.parametrize(("world", "layout", "line"), REFUSED, ids=[line.partition(":")[0] for _, _, line in REFUSED])
def test_refuses(world: int, layout: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ParallelLayout(**layout).validate(Step37Config.preset(FLASH), world)
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("world", "layout", "pieces"),
    [
        (64, {"pipeline": 8, "expert": 8, "pipeline_layout": [5, 6, 6, 6, 6, 6, 5, 5]}, [5, 6, 6, 6, 6, 6, 5, 5]),
        (9, {"pipeline": 9}, [5] * 9),
        (3, {"pipeline": 3, "virtual_pipeline": 3}, [5] * 9),
        (512, {"tensor": 8, "sequence_parallel": True, "expert": 32}, [45]),
        (512, {"tensor": 8, "sequence_parallel": True, "expert": 32, "expert_tensor": 8}, [45]),
    ],
)
def test_accepts(world: int, layout: dict[str, Any], pieces: list[int]) -> None:
    accepted = ParallelLayout(**layout)
    accepted.validate(Step37Config.preset(FLASH), world)
    assert accepted.layers_of_pieces(45) == pieces


def test_experts_that_are_not_there_cannot_be_shared() -> None:
    for name in ("expert", "expert_tensor"):
        with pytest.raises(ConfigError, match=rf"strategy\.{name}: expected 1 \(the model has no experts\), found 2"):
            ParallelLayout(tensor=2, **{name: 2}).validate(Step37Config.preset("tiny"), 2)
    odd = Step37Config.preset("tiny_moe", expert_ffn_size=63)
    refused = r"strategy\.expert_tensor: expected a divisor of text\.expert_ffn_size 63 \(nearest: 1\), found 2"
    with pytest.raises(ConfigError, match=refused):
        ParallelLayout(tensor=2, expert_tensor=2).validate(odd, 2)


@pytest.mark.parametrize(("microbatches", "nearest"), [(2, 4), (6, 8), (7, 8)])
def test_refuses_microbatches_of_the_interleaved_schedule(microbatches: int, nearest: int) -> None:
    with pytest.raises(ConfigError, match=rf"data.microbatches: expected a multiple .* \(nearest: {nearest}\)"):
        ParallelLayout(pipeline=2, virtual_pipeline=2).check_microbatches(microbatches, 2, "data.microbatches")
    ParallelLayout(pipeline=2).check_microbatches(microbatches, 2, "data.microbatches")


def test_a_runs_microbatches_are_checked_before_it_starts(tmp_path: Path) -> None:
    class Data(TinyData):
        microbatches = 3

        def check(self, ranks: int) -> None:
            pass

    strategy = MegatronStrategy(pipeline=2, virtual_pipeline=2)
    trainer = pl.Trainer(strategy=strategy, **trainer_arguments(tmp_path, devices=2))
    module = Step37LitModule(**module_arguments(preset="tiny_moe"))
    with pytest.raises(ConfigError, match=r"data\.microbatches: expected a multiple of pipeline 2 x 1 .* found 3"):
        module.check(trainer, Data(), fitting=True)


def test_a_run_is_refused_before_weights_and_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    had_groups = dist.is_initialized()
    trainer = pl.Trainer(strategy=MegatronStrategy(virtual_pipeline=2), **trainer_arguments(tmp_path))
    module = Step37LitModule(**module_arguments())
    with pytest.raises(ConfigError, match=r"strategy\.virtual_pipeline"):
        trainer.fit(module, datamodule=TinyData())
    assert not hasattr(module, "model")
    assert dist.is_initialized() == had_groups
    assert list(tmp_path.iterdir()) == []
