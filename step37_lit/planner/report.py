"""A plan as tables for the terminal, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from rich.table import Table

from step37_lit.config import Step37Config
from step37_lit.planner.activations import RECOMPUTED, ActivationTable
from step37_lit.planner.estimate import Plan
from step37_lit.planner.hardware import Hardware
from step37_lit.planner.memory import peak_in_flight
from step37_lit.planner.weights import rank_weights
from step37_lit.planner.work import Pack

# Training throughput that others have published, for a look at whether an estimate is out of this world.
PUBLISHED = (
    ("Llama 3 405B, dense, bf16, 8,192 H100, TP8 PP16", "430 TFLOP/s a GPU", "arXiv:2407.21783, table 4"),
    ("Llama 3 405B, dense, bf16, 16,384 H100, TP8 PP16", "400 TFLOP/s a GPU", "arXiv:2407.21783, table 4"),
    ("Mixtral 8x7B, MoE, bf16, megatron-core 0.9", "468 TFLOP/s a GPU", "README of megatron/core/transformer/moe"),
    ("Mixtral 8x22B, MoE, H100, megatron-core", "49.3% of peak", "arXiv:2504.14960, abstract"),
    ("Qwen2-57B-A14B, MoE, H100, megatron-core", "39.0% of peak", "arXiv:2504.14960, abstract"),
    (
        "DeepSeek-V3 671B (37B active), MoE, fp8, 2,048 H800",
        "1,540 tokens/s a GPU",
        "arXiv:2412.19437: 180K GPU h for 1T",
    ),
)


def parameters(config: Step37Config) -> dict[str, int]:
    """Parameters of the whole model by part."""
    sums = dict.fromkeys(("vision", "projector", "embedding", "decoder", "routed experts", "head", "mtp"), 0)
    names = {"vision_model": "vision", "align_projector": "projector", "output_layer": "head"}
    for weight in rank_weights(config, 1, 1, 1):
        first = weight.name.split(".")[0]
        sums["routed experts" if weight.expert else names.get(first, first)] += weight.numel
    return sums | {"total": sum(sums.values())}


def flops_per_token(config: Step37Config, pack: Pack) -> dict[str, float]:
    """Operations of forward and backward by part, for each token of a pack."""
    flops = dataclasses.asdict(pack.flops(config) * (3.0 / pack.tokens))
    return flops | {"total": sum(flops.values())}


def as_dict(plan: Plan, hardware: Hardware) -> dict[str, Any]:
    """Everything about a plan, for JSON."""
    layout = dataclasses.asdict(plan.layout) | {"data": plan.layout.data, "label": plan.layout.label}
    stages = [
        dataclasses.asdict(stage) | {"peak": stage.peak, "state_total": stage.state.total} for stage in plan.memory
    ]
    return {
        "layout": layout,
        "recompute": plan.training.recompute,
        "recompute_layers": plan.training.recompute_layers,
        "vision_recompute": plan.training.vision_recompute,
        "microbatches": plan.training.microbatches,
        "stages": stages,
        "peak_bytes": plan.peak_bytes,
        "fits": plan.fits(hardware),
        "traffic_bytes": dataclasses.asdict(plan.traffic),
        "traffic_seconds": dataclasses.asdict(plan.traffic_seconds),
        "compute_seconds": plan.compute_seconds,
        "step_seconds": plan.step_seconds,
        "bubble": plan.bubble,
        "imbalance": plan.imbalance,
        "model_tflops": plan.model_tflops,
        "tokens_per_second": plan.tokens_per_second,
    }


def model_table(config: Step37Config, pack: Pack) -> Table:
    """Parameters and operations by part."""
    table = _table("model", ("part", "parameters", "GFLOP a token", "share"))
    counts, flops = parameters(config), flops_per_token(config, pack)
    of_parts = {
        "vision": (counts["vision"] + counts["projector"], flops["vision"]),
        "embedding": (counts["embedding"], 0.0),
        "decoder without routed experts": (counts["decoder"], flops["projections"] + flops["dense"]),
        "attention's scores": (0, flops["attention"]),
        "experts (routed; shared and router in operations)": (counts["routed experts"], flops["experts"]),
        "head": (counts["head"], flops["head"]),
        "MTP": (counts["mtp"], flops["mtp"]),
        "total": (counts["total"], flops["total"]),
    }
    for part, (number, operations) in of_parts.items():
        table.add_row(part, f"{number:,}", f"{operations / 1e9:.4g}", f"{operations / flops['total']:.1%}")
    return table


def stage_table(config: Step37Config, plan: Plan, hardware: Hardware) -> Table:
    """Memory of a rank of each stage; activations of the peak under every recomputation."""
    modes = [(mode, vision) for mode in RECOMPUTED for vision in (False, True)]
    heads = [f"{mode}{' +vision' if vision else ''}" for mode, vision in modes]
    columns = (
        "stage",
        "layers",
        "parameters",
        "weights",
        "gradients",
        "optimizer",
        "in flight",
        *heads,
        "working",
        "peak",
    )
    table = _table("memory of a rank in GB; activations at the peak by recomputation", columns)
    for stage in plan.memory:
        kept = []
        for mode, vision in modes:
            layers = plan.training.recompute_layers if mode == plan.training.recompute else None
            training = dataclasses.replace(
                plan.training, recompute=mode, recompute_layers=layers, vision_recompute=vision
            )
            rows = ActivationTable(config, plan.layout, training)
            chunks = [rows.chunk_bytes(chunk) for chunk in plan.layout.chunks_of_stage(stage.stage)]
            used = (mode, vision) == (plan.training.recompute, plan.training.vision_recompute)
            value = f"{peak_in_flight(chunks, plan.layout, training, stage.stage)[0] / 1e9:.3g}"
            kept.append(f"[bold]{value}[/]" if used else value)
        state = stage.state
        figures = [f"{value / 1e9:.3g}" for value in (state.weights, state.gradients, state.optimizer)]
        ends = [
            f"{stage.working / 1e9:.3g}",
            f"{stage.peak / 1e9:.3g}" + ("" if stage.peak <= hardware.usable_bytes else " !"),
        ]
        table.add_row(
            str(stage.stage), str(stage.layers), f"{state.parameters:,}", *figures, str(stage.in_flight), *kept, *ends
        )
    return table


def traffic_table(plan: Plan) -> Table:
    """What a rank sends in a step, and for how long."""
    table = _table("communication of a rank in a step", ("group", "GB", "seconds", "share of the step"))
    for group, sent in dataclasses.asdict(plan.traffic).items():
        took = getattr(plan.traffic_seconds, group)
        table.add_row(group, f"{sent / 1e9:.3g}", f"{took:.3g}", f"{took / plan.step_seconds:.1%}")
    return table


def ranking_table(plans: Iterable[Plan], title: str) -> Table:
    """Layouts, fastest first."""
    columns = (
        "layout",
        "layers of the chunks",
        "micro-batches",
        "recompute",
        "GB",
        "step s",
        "TFLOP/s",
        "tokens/s",
        "bubble",
    )
    table = _table(title, columns)
    for plan in plans:
        training = plan.training
        table.add_row(
            plan.layout.label,
            paste(plan.layout.stage_layers),
            str(training.microbatches),
            training.recompute + (" +vision" if training.vision_recompute else ""),
            f"{plan.peak_bytes / 1e9:.1f}",
            f"{plan.step_seconds:.3g}",
            f"{plan.model_tflops:.3g}",
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.bubble:.1%}",
        )
    return table


def published_table() -> Table:
    table = _table("published, for comparison", ("what", "throughput", "source"))
    for row in PUBLISHED:
        table.add_row(*row)
    return table


def paste(counts: tuple[int, ...]) -> str:
    """A split as a recipe takes it."""
    return f"[{', '.join(map(str, counts))}]" if counts else "equal"


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
    return table
