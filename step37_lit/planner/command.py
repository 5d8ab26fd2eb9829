"""`python -m step37_lit plan --config RECIPE`: memory, operations, traffic and estimated time of a recipe's model."""

from __future__ import annotations

import dataclasses
import json
from argparse import RawDescriptionHelpFormatter
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt

from step37_lit.errors import ConfigError, require

if TYPE_CHECKING:  # the help must not wait for torch
    from step37_lit.planner.recipe import Recipe
    from step37_lit.planner.work import Training

DESCRIPTION = """\
Plans a run before there is a GPU: parameters, gradients, optimizer state and activations of each rank, operations a
token, bytes sent in a step, and the layouts that fit a number of GPUs, ranked by the estimated time of a step.

Parameters and bytes of state are exact; activations are counted tensor by tensor; times are estimates whose
assumptions are printed.
"""
EXAMPLES = """\
examples:
  python -m step37_lit plan --config recipes/scenes_tiny.yaml
  python -m step37_lit plan --config RECIPE --gpus 64 --memory 80
  python -m step37_lit plan --config RECIPE --gpus 64 --pipeline 8 --expert 8 --stage-layers 6,6,6,6,6,6,6,3
"""
LAYOUT = ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor", "context")
RATES = ("peak_tflops", "achieved", "memory_bandwidth", "node_bandwidth", "network_bandwidth", "link_efficiency")


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m step37_lit plan",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    add = parser.add_argument
    add("--config", metavar="RECIPE", type=str, action="append", required=True, help="recipe; later ones override")
    add("--gpus", type=PositiveInt, help="GPUs (default: the recipe's devices and nodes)")
    add("--gpu", type=str, default="h100", help="h100 or h200: defaults of the assumptions below")
    add("--memory", type=PositiveFloat, help="GB of a GPU")
    add("--reserved-gb", type=float, help="GB of it for the CUDA context, NCCL and fragments (default: 6)")
    add("--gpus-per-node", type=PositiveInt, help="GPUs that share the faster links (default: 8)")
    for name in RATES:
        add(f"--{name.replace('_', '-')}", type=PositiveFloat, help="assumption; see docs/planner.md")
    for name in LAYOUT:
        add(f"--{name.replace('_', '-')}", type=PositiveInt, help="of the layout in place of the recipe's")
    add("--sequence-parallel", type=bool, help="of the layout in place of the recipe's")
    add("--stage-layers", type=str, help="layers of each chunk, with commas, or memory or time for a balanced split")
    add("--recompute", type=str, help="none, selective or full (default: the recipe's)")
    add("--vision-recompute", type=bool, help="recompute the vision tower's blocks (default: the recipe's)")
    add("--dtype", type=str, help="bf16 or fp32 (default: the recipe's precision)")
    add("--tokens", type=PositiveInt, help="of a pack (default: data.max_length, or 4096)")
    add("--sequence-length", type=PositiveInt, help="mean tokens of a sample (default: 1024, at most a pack)")
    add("--images", type=int, help="global views of a pack (default: one a sample)")
    add("--learnt-share", type=float, default=1.0, help="share of the tokens that have a loss")
    add(
        "--global-batch",
        type=PositiveInt,
        help="packs of a step (default: data.microbatches; with --gpus one a rank, search: 4 a GPU)",
    )
    add("--top", type=PositiveInt, default=10, help="layouts that are listed")
    add("--extrapolate", type=str, default="", help="numbers of GPUs, with commas, at as many packs a GPU")
    add("--json", action="store_true", help="print JSON in place of tables")
    return parser


def main(args: list[str]) -> int:
    """Runs the command.

    Returns:
        The exit code 0.

    Raises:
        ConfigError, jsonargparse.ArgumentError: a mistake of the user's.
    """
    options = parser().parse_args(args)
    from step37_lit.planner.estimate import plan
    from step37_lit.planner.recipe import read_recipe
    from step37_lit.planner.search import search

    recipe = read_recipe(options.config, options.gpus)
    hardware, training = _hardware(options), _training(options, recipe)
    layout = _layout(options, recipe, training)
    training = _with_microbatches(options, recipe, training, layout.data)
    own = plan(recipe.config, layout, training, hardware)
    ranks = [options.gpus] if options.gpus is not None else []
    ranks += _numbers("--extrapolate", options.extrapolate)
    packs_per_gpu = (options.global_batch or 4 * layout.ranks) / layout.ranks
    found = {}
    for number in dict.fromkeys(ranks):
        batch = max(1, round(packs_per_gpu * number))
        found[number] = batch, search(recipe.config, number, batch, training, hardware)
    if options.json:
        print(json.dumps(_as_json(recipe, own, found, hardware, options.top), indent=2))
    else:
        _print(recipe, own, found, hardware, options.top)
    return 0


def _hardware(options: Namespace) -> Any:
    from step37_lit.planner.hardware import HARDWARE

    require(options.gpu in HARDWARE, "--gpu", " or ".join(HARDWARE), options.gpu)
    given = {name: options[name] for name in (*RATES, "gpus_per_node", "reserved_gb") if options[name] is not None}
    if options.memory is not None:
        given["memory_gb"] = options.memory
    return dataclasses.replace(HARDWARE[options.gpu], **given)


def _training(options: Namespace, recipe: Recipe) -> Training:
    from step37_lit.planner.activations import RECOMPUTED
    from step37_lit.planner.weights import ITEM_BYTES
    from step37_lit.planner.work import Pack, Training

    dtype = options.dtype or recipe.dtype
    require(dtype in ITEM_BYTES, "--dtype", " or ".join(ITEM_BYTES), dtype)
    recompute: Any = options.recompute or recipe.recompute
    require(recompute in RECOMPUTED, "--recompute", " or ".join(RECOMPUTED), recompute)
    vision = recipe.vision_recompute if options.vision_recompute is None else options.vision_recompute
    require(0 < options.learnt_share <= 1, "--learnt-share", "in (0, 1]", options.learnt_share)
    tokens = options.tokens or recipe.pack_tokens or 4096
    mean = options.sequence_length or min(1024, tokens)
    images = round(tokens / mean) if options.images is None else options.images
    pack = Pack.uniform(recipe.config, tokens, mean, images, options.learnt_share)
    layers = recipe.recompute_layers if options.recompute is None else None
    return Training(
        pack,
        dtype=dtype,
        recompute=recompute,
        recompute_layers=layers,
        vision_recompute=vision,
        frozen=recipe.frozen,
    )


def _layout(options: Namespace, recipe: Recipe, training: Training) -> Any:
    from step37_lit.planner.balance import balanced_split

    given = {name: options[name] for name in (*LAYOUT, "sequence_parallel") if options[name] is not None}
    layout = dataclasses.replace(recipe.layout, **given)
    split = options.stage_layers
    if split not in (None, "memory", "time"):
        layout = dataclasses.replace(layout, stage_layers=tuple(_numbers("--stage-layers", split)))
    elif split is None and layout.chunks == len(recipe.layout.stage_layers):
        pass  # the recipe's own
    elif split is not None or recipe.config.text.num_layers % layout.chunks:
        layout.validate_sizes(recipe.config)
        counts = balanced_split(recipe.config, layout, training, split or "memory")
        layout = dataclasses.replace(layout, stage_layers=counts)
    layout.validate(recipe.config)
    return layout


def _with_microbatches(options: Namespace, recipe: Recipe, training: Training, data_ranks: int) -> Training:
    packs = options.global_batch
    if packs is None and options.gpus is None:
        packs = recipe.microbatches
    if packs is None:
        return dataclasses.replace(training, microbatches=1)
    field = "--global-batch" if options.global_batch is not None else "data.microbatches"
    require(packs % data_ranks == 0, field, f"a multiple of the {data_ranks} data-parallel ranks", packs)
    return dataclasses.replace(training, microbatches=packs // data_ranks)


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(number) for number in text.split(",") if text]
    except ValueError:
        raise ConfigError(option, "numbers with commas between them", text) from None
    require(all(number > 0 for number in numbers), option, "positive numbers", text)
    return numbers


def _as_json(recipe: Recipe, own: Any, found: dict, hardware: Any, top: int) -> dict[str, Any]:
    from step37_lit.planner import report

    return {
        "parameters": report.parameters(recipe.config),
        "flops_per_token": report.flops_per_token(recipe.config, own.training.pack),
        "plan": report.as_dict(own, hardware),
        "searches": [
            {
                "gpus": number,
                "global_batch": batch,
                "tried": result.tried,
                "fitting": len(result.plans),
                "plans": [report.as_dict(plan, hardware) for plan in result.plans[:top]],
            }
            for number, (batch, result) in found.items()
        ],
        "assumptions": dataclasses.asdict(hardware) | {"pack": dataclasses.asdict(own.training.pack)},
    }


def _print(recipe: Recipe, own: Any, found: dict, hardware: Any, top: int) -> None:
    from rich.console import Console

    from step37_lit.planner import report

    console = Console(width=None if Console().is_terminal else 180, soft_wrap=False)
    pack, training = own.training.pack, own.training
    console.print(report.model_table(recipe.config, pack))
    print()
    split = report.paste(own.layout.stage_layers)
    print(f"layout      {own.layout.label} on {own.layout.ranks} ranks; layers of the chunks: {split}")
    console.print(report.stage_table(recipe.config, own, hardware))
    if not own.fits(hardware):
        print(f"! does not fit {hardware.memory_gb:g} GB of which {hardware.reserved_gb:g} are reserved")
    print()
    console.print(report.traffic_table(own))
    speed = f"{own.model_tflops:.3g} TFLOP/s a GPU, {own.tokens_per_second:,.0f} tokens/s"
    print(f"step        {own.step_seconds:.3g} s: {speed}")
    print(f"pipeline    bubble {own.bubble:.1%}, average stage {own.imbalance:.1%} shorter than the longest")
    for number, (batch, result) in found.items():
        print()
        title = f"{number} GPUs, {batch} packs a step: {len(result.plans)} of {result.tried} layouts fit"
        console.print(report.ranking_table(result.plans[:top], title))
    if len(found) > 1:
        print()
        console.print(report.published_table())
    print()
    _print_assumptions(training, hardware)


def _print_assumptions(training: Any, hardware: Any) -> None:
    pack = training.pack
    images = sum(number for _, number in pack.images)
    lines = (
        f"assumed     packs of {pack.tokens} tokens in {len(pack.lengths)} samples with {images} images, {pack.learnt}"
        f" of them learnt; {training.dtype}",
        f"            {hardware.name}: {hardware.memory_gb:g} GB, {hardware.reserved_gb:g} of them reserved;"
        f" {hardware.achieved:.0%} of {hardware.peak_tflops:g} TFLOP/s; memory {hardware.memory_bandwidth:g} GB/s",
        f"            {hardware.link_efficiency:.0%} of {hardware.node_bandwidth:g} GB/s in nodes of"
        f" {hardware.gpus_per_node} and of {hardware.network_bandwidth:g} GB/s between them",
        "            experts evenly loaded; communication hides behind nothing; every micro-batch like this one",
    )
    for line in lines:
        print(line)
