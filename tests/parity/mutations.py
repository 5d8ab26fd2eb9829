"""Takes each feature out of the model and shows that a parity case notices.

    python -m tests.parity.mutations

A mutation is a patch that holds while the model is loaded and compared. The table names the case, the differences
and which limits they break; the exit code is 1 where a mutation passes unnoticed, or the untouched model does not.

One fault cannot be seen this way: positions that do not restart in each sub-sequence. Rotary embedding only knows
distances, so the logits stay the same; `tests/test_packing.py` checks the positions themselves.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step37_lit.config import RopeConfig
from step37_lit.hub import conversions
from step37_lit.megatron import core_attention, norm, process
from step37_lit.model import attention, experts, rotary, step37_model, vision_tower
from tests.parity import broken_parts
from tests.parity.compare import COSINE_TOLERANCE, LOGITS_TOLERANCE, NORM_TOLERANCE, Differences, differences, reference

Patch = pytest.MonkeyPatch
Change = Callable[[Patch, nn.Module], None]


@dataclass(frozen=True)
class Mutation:
    """One feature taken out.

    Args:
        name: What is wrong.
        case: The parity case that must notice.
        load: Patch before the model is loaded.
        change: Patch of the loaded model.
    """

    name: str
    case: str
    load: Callable[[Patch], None] | None = None
    change: Change | None = None


def attentions(model: nn.Module) -> list[nn.Module]:
    return [layer.self_attention for layer in model.decoder.layers]


def each(select: Callable[[nn.Module], list[nn.Module]], name: str, value: Callable[[nn.Module], object]) -> Change:
    """Sets attribute `name` of every selected module to `value(module)`."""

    def change(patch: Patch, model: nn.Module) -> None:
        for module in select(model):
            patch.setattr(module, name, value(module))

    return change


def of_type(kind: type[nn.Module]) -> Callable[[nn.Module], list[nn.Module]]:
    return lambda model: [module for module in model.modules() if isinstance(module, kind)]


def function(owner: object, name: str, replacement: Callable) -> Callable[[Patch], None]:
    """Replaces a function of a module or class."""
    return lambda patch: patch.setattr(owner, name, replacement)


def text(**changes: Callable) -> Change:
    """Replaces fields of the text config that the forward pass reads; each gets the config."""

    def change(patch: Patch, model: nn.Module) -> None:
        config = model.step37
        values = {name: make(config.text) for name, make in changes.items()}
        patch.setattr(model, "step37", dataclasses.replace(config, text=dataclasses.replace(config.text, **values)))

    return change


def rotary_share(patch: Patch, model: nn.Module) -> None:
    """All channels of the full layers turn instead of half."""
    text(full_rope=lambda t: dataclasses.replace(t.full_rope, rotary_factor=1.0))(patch, model)
    for module in attentions(model):
        patch.setattr(module, "rotary_pairs", module.head_dim // 2)


def routing(weigh: Callable[[Tensor, Tensor, nn.Module], Tensor]) -> Callable[[Patch], None]:
    """The router's choice with other weights: `weigh(logits, chosen [n, E], router)`."""
    original = experts.Router.routing

    def replaced(self: nn.Module, logits: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        _, chosen = original(self, logits, *args, **kwargs)
        return weigh(logits.view(-1, logits.shape[-1]), chosen, self), chosen

    return function(experts.Router, "routing", replaced)


def sliding_cores(model: nn.Module) -> list[nn.Module]:
    return [a.core_attention for a in attentions(model) if a.core_attention.window]


def identity(module: nn.Module) -> nn.Module:
    return nn.Identity()


def _mutations() -> list[Mutation]:
    everything = "everything"
    return [
        Mutation("no q norm", everything, change=each(attentions, "q_layernorm", identity)),
        Mutation("no k norm", everything, change=each(attentions, "k_layernorm", identity)),
        Mutation(
            "head gate off",
            everything,
            change=each(attentions, "linear_gate", lambda m: broken_parts.OpenGate(m.linear_gate)),
        ),
        Mutation(
            "softmax scale 1",
            everything,
            change=each(of_type(core_attention.SDPACoreAttention), "softmax_scale", lambda m: 1.0),
        ),
        Mutation(
            "not causal", everything, function(core_attention.SDPACoreAttention, "_sdpa", broken_parts.not_causal)
        ),
        Mutation("window one longer", everything, change=each(sliding_cores, "window", lambda m: m.window + 1)),
        Mutation("window one shorter", "all_sliding", change=each(sliding_cores, "window", lambda m: m.window - 1)),
        Mutation("no window", everything, change=each(sliding_cores, "window", lambda m: None)),
        Mutation(
            "borders of the pack ignored",
            "words_only_pack",
            function(step37_model, "pack_borders", broken_parts.one_sequence),
        ),
        Mutation(
            "llama3 scaling off", everything, function(rotary, "_llama3", lambda frequencies, scaling: frequencies)
        ),
        Mutation(
            "llama3 on sliding layers too",
            everything,
            change=text(sliding_rope=lambda t: dataclasses.replace(t.sliding_rope, scaling=t.full_rope.scaling)),
        ),
        Mutation("wrong rotary share", everything, change=rotary_share),
        Mutation(
            "one theta for both kinds",
            everything,
            change=text(full_rope=lambda t: RopeConfig(t.sliding_rope.theta, 0.5, t.full_rope.scaling)),
        ),
        Mutation("interleaved rotary in the text", everything, function(attention, "rotate", broken_parts.interleaved)),
        Mutation(
            "positions stand still", everything, function(step37_model, "rotary_table", broken_parts.positions_at_zero)
        ),
        Mutation(
            "norm not zero-centred", everything, function(norm.ZeroCentredRMSNorm, "forward", broken_parts.plain_norm)
        ),
        Mutation("norm epsilon 1e-3", everything, change=each(of_type(norm.ZeroCentredRMSNorm), "eps", lambda m: 1e-3)),
        Mutation(
            "no final norm", everything, change=lambda p, m: p.setattr(m.decoder, "final_layernorm", nn.Identity())
        ),
        Mutation(
            "routed clamp off", "clamp_routed", change=each(of_type(experts.GroupedExperts), "limit", lambda m: None)
        ),
        Mutation(
            "shared clamp off", "clamp_shared", change=each(of_type(experts.SharedExpert), "limit", lambda m: None)
        ),
        Mutation("dense clamp off", "clamp_shared", change=each(of_type(experts.DenseMLP), "limit", lambda m: None)),
        Mutation(
            "clamp before the activation", everything, function(experts, "swiglu", broken_parts.clamp_before_activation)
        ),
        Mutation("clamp of the gate only", everything, function(experts, "swiglu", broken_parts.clamp_gate_only)),
        Mutation(
            "shared expert off",
            everything,
            function(experts.SharedExpert, "forward", lambda self, x: torch.zeros_like(x)),
        ),
        Mutation(
            "router bias in the weights",
            everything,
            routing(lambda x, chosen, r: broken_parts.normalised(x.sigmoid() + r.expert_bias, chosen)),
        ),
        Mutation(
            "router bias not in the choice",
            everything,
            change=each(of_type(experts.Router), "expert_bias", lambda m: torch.zeros_like(m.expert_bias)),
        ),
        Mutation("router weights not normalised", everything, routing(lambda x, chosen, r: 3.0 * x.sigmoid() * chosen)),
        Mutation(
            "softmax scores", everything, routing(lambda x, chosen, r: broken_parts.normalised(x.softmax(-1), chosen))
        ),
        Mutation(
            "no router scaling factor",
            everything,
            routing(lambda x, chosen, r: broken_parts.normalised(x.sigmoid(), chosen) / 3.0),
        ),
        Mutation(
            "q, k, v stacked, not by group",
            everything,
            function(conversions.FuseQKV, "views", broken_parts.one_behind_the_other),
        ),
        Mutation(
            "gate and up swapped",
            everything,
            function(conversions.GateUp, "views", broken_parts.up_and_gate),
        ),
        Mutation(
            "projector bias off", "projector_bias", change=lambda p, m: p.setattr(m.align_projector, "bias", None)
        ),
        Mutation(
            "CLIP normalisation off",
            everything,
            function(vision_tower, "normalise", lambda pixels, dtype: pixels.to(dtype) / 255),
        ),
        Mutation(
            "table of positions with align_corners",
            "crops",
            function(vision_tower.F, "interpolate", broken_parts.resampled_with_align_corners),
        ),
        Mutation(
            "table of positions cut, not resampled", "crops", function(vision_tower.F, "interpolate", broken_parts.cut)
        ),
        Mutation(
            "no learned positions",
            "several_images",
            function(vision_tower.VisionTower, "_positions", lambda self, r, c: 0 * self.positional_embedding[: r * c]),
        ),
        Mutation("LayerScale off", "several_images", function(vision_tower.LayerScale, "forward", lambda self, x: x)),
        Mutation("no ln_pre", "several_images", change=lambda p, m: p.setattr(m.vision_model, "ln_pre", nn.Identity())),
        Mutation(
            "2-D RoPE: rows and columns swapped",
            "several_images",
            function(vision_tower, "rotary_2d", broken_parts.rows_and_columns_swapped),
        ),
        Mutation(
            "2-D RoPE: half-split pairs",
            "several_images",
            function(vision_tower, "rotate_pairs", broken_parts.half_split_pairs),
        ),
        Mutation("2-D RoPE off", "several_images", function(vision_tower, "rotate_pairs", lambda x, cos_sin: x)),
        Mutation(
            "GELU for quick-GELU",
            "several_images",
            function(vision_tower.VisionMLP, "forward", lambda self, x: self.c_proj(F.gelu(self.c_fc(x)))),
        ),
        Mutation(
            "images of a pack in reverse",
            "several_images",
            function(vision_tower, "normalise", broken_parts.reversed_normalise),
        ),
    ]


MUTATIONS = _mutations()


def measure(mutation: Mutation) -> Differences:
    """Differences of the mutated model from the oracle."""
    expected = reference(mutation.case)
    with pytest.MonkeyPatch.context() as patch:
        if mutation.load is not None:
            mutation.load(patch)
        model = expected.model()
        if mutation.change is not None:
            mutation.change(patch, model)
        return differences(expected, model, whole=mutation.change is None)


def broken_limits(found: Differences) -> str:
    broken = {
        "logits": found.logits > LOGITS_TOLERANCE,
        "argmax": found.argmax > 0,
        "cosine": found.cosine > COSINE_TOLERANCE,
        "norm": found.norm > NORM_TOLERANCE,
    }
    return ", ".join(name for name, is_broken in broken.items() if is_broken)


def main() -> int:
    process.initialize()
    torch.set_num_threads(1)
    unnoticed = 0
    print("| taken out | case | logits | argmax | 1 - cosine | norm | broken limits |\n|---|---|---|---|---|---|---|")
    untouched = [Mutation("(nothing)", case) for case in dict.fromkeys(m.case for m in MUTATIONS)]
    for mutation in [*untouched, *MUTATIONS]:
        found = measure(mutation)
        broken = broken_limits(found)
        unnoticed += bool(broken) if mutation in untouched else not broken
        print(
            f"| {mutation.name} | {mutation.case} | {found.logits:.1e} | {found.argmax} | {found.cosine:.1e} "
            f"| {found.norm:.1e} | {broken or 'none'} |"
        )
    print(f"{len(MUTATIONS)} mutations, {unnoticed} unnoticed or wrongly noticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
