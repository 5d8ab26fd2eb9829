"""The planner's tables against counts by hand and published totals, and its command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from step37_lit.commands import run
from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError
from step37_lit.flops import Flops
from step37_lit.hub.names import text_rows, vision_rows
from step37_lit.planner.communication import data_traffic, microbatch_traffic
from step37_lit.planner.estimate import plan
from step37_lit.planner.hardware import HARDWARE, Hardware
from step37_lit.planner.layout import PlannedLayout
from step37_lit.planner.memory import peak_in_flight, stage_memory
from step37_lit.planner.report import flops_per_token, parameters
from step37_lit.planner.search import search
from step37_lit.planner.short import refuse_too_large
from step37_lit.planner.weights import rank_weights, state_bytes
from step37_lit.planner.work import Pack, Training

FLASH = Step37Config.preset("flash", mtp=True)
RECIPE = "model: {preset: tiny_moe}\ntrainer: {precision: bf16-true, devices: 4}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return str(file)


def test_published_totals() -> None:
    counts = parameters(FLASH)
    router_biases = FLASH.text.num_experts * len(FLASH.text.moe_layers)  # fp32 buffers, no parameters
    assert counts["vision"] + counts["projector"] == 1_981_014_784
    text = counts["total"] - 1_981_014_784
    assert 2 * text + 4 * router_biases == 398_768_626_944
    hub = [tensor for row in text_rows(FLASH) for tensor in row.hub]
    assert len(hub) == 804
    assert len([tensor for row in vision_rows(FLASH) for tensor in row.hub]) == 667


@pytest.mark.parametrize(
    "layout",
    [
        PlannedLayout(ranks=64, pipeline=8, expert=8, stage_layers=(6, 6, 6, 6, 6, 6, 6, 3)),
        PlannedLayout(ranks=64, tensor=2, sequence_parallel=True, pipeline=5, expert=2, virtual_pipeline=3),
        PlannedLayout(ranks=48, tensor=4, sequence_parallel=True, expert=12, expert_tensor=4, context=3),
    ],
)
def test_every_weight_is_on_some_stage(layout: PlannedLayout) -> None:
    """The stages' parameters, each times the ranks that hold other parts of it, are the whole model's."""
    layout = dataclasses.replace(layout, ranks=layout.ranks // layout.pipeline * layout.pipeline)
    held = sum(state_bytes(FLASH, layout, stage).parameters for stage in range(layout.pipeline))
    weights = rank_weights(FLASH, layout.tensor, layout.expert, layout.expert_tensor)
    assert held == sum(weight.numel for weight in weights)
    whole = {weight.name: weight.numel for weight in rank_weights(FLASH, 1, 1, 1)}
    for weight in weights:
        assert whole[weight.name] % weight.numel == 0
        split = whole[weight.name] // weight.numel
        assert split in (1, layout.expert * layout.expert_tensor if weight.expert else layout.tensor), weight.name


def test_shares_of_the_optimizer_add_up() -> None:
    config = Step37Config.preset("tiny_moe")
    layout = PlannedLayout(ranks=6, expert=2)
    for dtype, moments in (("fp32", 8), ("bf16", 12)):
        shares = [state_bytes(config, layout, 0, dtype, data_rank=r, expert_data_rank=r % 3) for r in range(6)]
        weights = rank_weights(config, 1, 2, 1)
        dense = sum(w.numel for w in weights if not w.expert)
        routed = sum(w.numel for w in weights if w.expert)
        total = sum(share.optimizer for share in shares)
        elements = moments * (dense + 2 * routed)
        pieces = (total - elements) / 4  # a step counter for each piece of a weight
        assert pieces == int(pieces) and len(weights) <= pieces <= len(weights) * 2 + 12


def test_frozen_parts_have_no_state() -> None:
    config, layout = Step37Config.preset("tiny"), PlannedLayout()
    state = state_bytes(config, layout, 0, "bf16", frozenset(("language", "vision")))
    projector = parameters(config)["projector"]
    assert state.gradients == 4 * projector and state.optimizer == 12 * projector + 4
    assert state.parameters == parameters(config)["total"]


def test_flops_by_part_by_hand() -> None:
    """Attention of a sliding layer with a window of 512 in sequences of 1000 tokens, heads, experts; of one token."""
    pack = Pack((1000,), 1000)
    flops = pack.flops(FLASH)
    sliding = 512 * 513 / 2 + 488 * 512
    assert flops.attention == pytest.approx(4 * 128 * (12 * 64 * 1000 * 1001 / 2 + 33 * 96 * sliding))
    assert flops.head == pytest.approx(2 * 1000 * 4096 * 128896)
    assert flops.experts == pytest.approx(42 * 1000 * (6 * 4096 * 1280 * 9 + 2 * 4096 * 288))
    assert flops.mtp > 3 * flops.head
    assert flops.vision == 0 and Pack((1000,), 1000, ((728, 2),)).flops(FLASH).vision > 0
    shares = flops_per_token(FLASH, pack)
    assert shares["total"] == pytest.approx(3 * flops.total / 1000)
    assert Step37Config.preset("flash").text.mtp is False
    assert Pack((1000,), 1000).flops(Step37Config.preset("flash")).mtp == 0


def test_recomputation_runs_forward_once_more() -> None:
    forward = Flops(vision=1, projections=2, attention=4, dense=8, experts=16, head=32, mtp=64)
    pack = Pack((8,), 8)
    assert Training(pack).passes.dot(forward) == 3 * 127
    assert Training(pack, recompute="full").passes.dot(forward) == 3 * 127 + 2 + 4 + 8 + 16
    assert Training(pack, recompute="selective", vision_recompute=True).passes.dot(forward) == 3 * 127 + 4 + 1


def test_microbatches_in_flight() -> None:
    """1F1B keeps one micro-batch a following stage; interleaved stages also those of the earlier chunks."""
    training = Training(Pack((8,), 8), microbatches=16)
    one = PlannedLayout(ranks=4, pipeline=4)
    assert [peak_in_flight([1.0], one, training, stage)[0] for stage in range(4)] == [4, 3, 2, 1]
    two = PlannedLayout(ranks=4, pipeline=4, virtual_pipeline=2)
    # Warm-up of 2 (stages - stage - 1) + (chunks - 1) stages, and one more (arXiv:2104.04473, section 2.2).
    assert [peak_in_flight([1.0, 1.0], two, training, stage)[0] for stage in range(4)] == [11, 9, 7, 5]
    few = dataclasses.replace(training, microbatches=2)
    assert peak_in_flight([1.0], one, few, 0) == (2, 2)


def test_modes_keep_less() -> None:
    layout = PlannedLayout(ranks=64, pipeline=5, expert=4)
    pack = Pack.uniform(FLASH, 4096, 1024, 4)
    kept = {}
    for recompute in ("none", "selective", "full"):
        for vision in (False, True):
            training = Training(pack, 8, recompute=recompute, vision_recompute=vision)
            kept[recompute, vision] = stage_memory(FLASH, layout, training, 0).activations
    assert kept["none", False] > kept["selective", False] > kept["full", False] > kept["full", True]
    # What full recomputation keeps of a layer is its input, and the tower that of each block.
    vision = FLASH.vision
    blocks = vision.num_layers * 4 * 52**2 * vision.width * 2
    assert 5 * (9 * 4096 * 4096 * 2 + blocks) < kept["full", True] < 5 * (9 * 4096 * 4096 * 2 + 1.3 * blocks)


def test_traffic_by_hand() -> None:
    config = Step37Config.preset("flash")
    training = Training(Pack((4096,), 4096), microbatches=2)
    layout = PlannedLayout(ranks=64, pipeline=8, expert=8, stage_layers=(6, 6, 6, 6, 6, 5, 5, 5))
    middle = microbatch_traffic(config, layout, training, 1)
    assert middle.expert == pytest.approx(6 * 4 * 4096 * 8 * 4096 * 2 * 7 / 8)  # dispatch and combine, both ways
    assert middle.pipeline == 2 * 4096 * 4096 * 2
    assert middle.tensor == middle.context == 0
    split = PlannedLayout(ranks=4, tensor=4, sequence_parallel=True)
    assert microbatch_traffic(config, split, training, 0).tensor == pytest.approx(
        (45 * 13 + 4) * 4096 * 4096 * 2 * 3 / 4
    )
    dense, experts = data_traffic(config, layout, training, 1)
    assert experts == 0  # each expert is on one rank of a stage only
    weights = sum(w.numel for w in rank_weights(config, 1, 8, 1) if w.unit in range(6, 12) and not w.expert)
    assert dense == pytest.approx(6 * weights * 7 / 8, rel=1e-6)  # fp32 gradients there, bf16 weights back


def test_a_link_between_nodes_is_slower() -> None:
    hardware = Hardware(node_bandwidth=400, network_bandwidth=50, link_efficiency=1.0)
    assert hardware.link_seconds(400e9, 8, 1) == pytest.approx(1.0)
    assert hardware.link_seconds(400e9, 16, 8) == pytest.approx(8.0)  # one rank of the group on each node
    assert hardware.link_seconds(400e9, 16, 1) == pytest.approx(1.0)  # a ring crosses by eight links at once
    assert hardware.link_seconds(150e9, 16, 1, all_to_all=True) == pytest.approx(150 * 8 / 15 / 50)
    assert hardware.link_seconds(1e9, 1, 1) == 0


def test_bubble_of_equal_stages() -> None:
    """Without head, embedding and traffic the bubble is (stages - 1) / (micro-batches x chunks) of the work."""
    config = Step37Config.preset("tiny_moe", moe_layers=(), num_sliding_heads=4)
    fast = Hardware(node_bandwidth=1e9, network_bandwidth=1e9)
    training = Training(Pack((64,), 0), microbatches=8, dtype="fp32")
    for chunks in (1, 2):
        layout = PlannedLayout(ranks=2, pipeline=2, virtual_pipeline=chunks)
        found = plan(config, layout, training, fast)
        work = 8 / (8 + 1 / chunks)
        assert 1 - found.bubble == pytest.approx(work, rel=0.02)  # full and sliding layers differ a little


def test_search_finds_what_fits() -> None:
    config = Step37Config.preset("tiny_moe")
    training = Training(Pack.uniform(config, 4096, 512, 4), dtype="fp32")
    roomy = search(config, 8, 32, training, HARDWARE["h100"])
    assert roomy.plans and [p.step_seconds for p in roomy.plans] == sorted(p.step_seconds for p in roomy.plans)
    for found in roomy.plans:
        found.layout.validate(config)
        assert found.fits(HARDWARE["h100"]) and found.training.microbatches * found.layout.data == 32
        assert found.training.recompute == "none"  # nothing is computed twice where there is room
    tight = Hardware(memory_gb=0.06, reserved_gb=0.0)
    cramped = search(config, 8, 32, training, tight)
    assert 0 < len(cramped.plans) <= len(roomy.plans)
    assert all(found.peak_bytes <= 0.06e9 for found in cramped.plans)
    assert any(found.training.recompute != "none" or found.training.vision_recompute for found in cramped.plans)
    assert search(config, 8, 32, training, Hardware(memory_gb=0.001, reserved_gb=0.0)).plans == []


def test_what_cannot_fit_is_refused() -> None:
    layout = PlannedLayout(ranks=8, expert=8)
    with pytest.raises(ConfigError, match=r"trainer\.strategy: expected a layout whose state fits 80\.0 GB"):
        refuse_too_large(FLASH, layout, "bf16", frozenset(), 80 * 10**9)
    refuse_too_large(Step37Config.preset("tiny"), PlannedLayout(), "bf16", frozenset(), 80 * 10**9)


# ---- the command ----


def test_command_prints_tables(recipe: str, capsys: pytest.CaptureFixture) -> None:
    assert run("plan", ["--config", recipe, "--gpus", "4", "--expert", "2", "--top", "3"]) == 0
    printed = capsys.readouterr().out
    for text in ("1,358,152", "EP2 DP4", "communication of a rank", "TFLOP/s", "4 GPUs, 16 packs", "assumed     packs"):
        assert text in printed, text


def test_command_prints_json(recipe: str, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--config", recipe, "--gpus", "2", "--pipeline", "2", "--stage-layers", "3,1", "--global-batch", "8"]
    assert run("plan", [*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["parameters"]["total"] == 1_358_152
    stages = printed["plan"]["stages"]
    assert sum(stage["state"]["parameters"] for stage in stages) == 1_358_152
    assert [stage["layers"] for stage in stages] == [3, 1] and printed["plan"]["microbatches"] == 8
    assert printed["searches"][0]["gpus"] == 2 and printed["searches"][0]["plans"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "gpus"),
        (["--gpus", "6", "--tensor", "3"], "tensor: expected a divisor of text.num_heads 4 (nearest: 2), found 3"),
        (["--gpus", "6", "--expert", "6"], "expert: expected a divisor of text.num_experts 8 (nearest: 4), found 6"),
        (["--pipeline", "8", "--gpus", "8"], "expected at most 4"),
        (["--gpus", "2", "--pipeline", "2", "--stage-layers", "3,2"], "stage_layers: expected a sum of 4"),
        (["--gpus", "2", "--pipeline", "2", "--stage-layers", "a,b"], "--stage-layers: expected numbers"),
        (["--virtual-pipeline", "2"], "virtual_pipeline: expected 1 with one pipeline stage, found 2"),
        (["--gpu", "abacus"], "--gpu: expected h100 or h200, found 'abacus'"),
        (["--recompute", "some"], "--recompute: expected none or selective or full"),
        (["--dtype", "fp8"], "--dtype: expected fp32 or bf16"),
        (["--images", "4000"], "images: expected in 0..1024"),
        (["--achieved", "1.5"], "--achieved: expected in (0, 1]"),
        (["--reserved-gb", "90"], "--reserved-gb: expected in 0..80"),
        (["--global-batch", "6"], "--global-batch: expected a multiple of the 4 data-parallel ranks, found 6"),
        (["--sequence-length", "9999"], "sequence length: expected in 1..4096"),
        (["--learnt-share", "0"], "--learnt-share: expected in (0, 1]"),
        (["--unknown", "1"], "unknown"),
    ],
)
def test_a_mistake_is_one_line(recipe: str, capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    assert run("plan", ["--config", recipe, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err, printed.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {devices: 1}\n", "model: expected a section with preset or init_from"),
        ("model: {text: {mtp: true}}\n", "model.preset, model.init_from: expected one of them"),
        ("model: {preset: tiny, text: {heads: 3}}\n", "model.text.heads: expected a field"),
        ("- 1\n", "recipe: expected a mapping"),
        ("model: {preset: tiny\n", "recipe: expected YAML"),
        ("model: {preset: tiny}\ntrainer: {devices: auto}\n", "trainer.devices: expected a number"),
        ("model: {preset: tiny}\ntrainer: {precision: 64}\n", "trainer.precision: expected"),
    ],
)
def test_a_mistake_in_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert run("plan", ["--config", str(file)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err, printed.err


def test_no_recipe(capsys: pytest.CaptureFixture) -> None:
    assert run("plan", ["--config", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "error: --config: expected a file, found 'nowhere.yaml'\n"


def test_later_recipes_override(tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("model: {preset: tiny}\n")
    assert run("plan", ["--config", recipe, "--config", str(over), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["parameters"]["total"] == 924_872 and printed["plan"]["layout"]["ranks"] == 4
