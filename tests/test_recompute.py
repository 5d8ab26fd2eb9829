"""Recomputation: the same gradients and counts to the last bit, fewer saved activations, also with frozen parts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from training import MTP_TEXT, TEXT, VISION, sample

from step37_lit import ConfigError, MegatronStrategy, Step37Config
from step37_lit.batch import PackedBatch
from step37_lit.lit_module import with_overrides
from step37_lit.megatron import data_parallel, process, schedule
from step37_lit.megatron.build import build_model
from step37_lit.model.recompute import Recompute
from step37_lit.model.step37_model import Step37Model

NONE = Recompute()
KINDS = {
    "selective": Recompute("selective"),
    "full": Recompute("full"),
    "full, one layer": Recompute("full", layers=1),
    "vision": Recompute(vision=True),
    "full and vision": Recompute("full", vision=True),
}


@pytest.fixture(autouse=True)
def groups() -> None:
    process.initialize()  # a run of an earlier test has ended them


def config(**text: Any) -> Step37Config:
    return with_overrides(Step37Config.preset("tiny_moe"), text=TEXT | text, vision=VISION | {"num_layers": 4})


def packs() -> list[PackedBatch]:
    return [PackedBatch.from_samples([sample(3 * n + i, seed=7) for i in range(3)], pad_to=72) for n in range(2)]


def saved_bytes(model: Step37Model) -> int:
    """Of all tensors that one forward pass keeps for its backward pass, weights aside, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # so that no other tensor gets this address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**packs()[0].model_inputs(), with_mtp=True)
    return sum(kept.values())


def step(recompute: Recompute, frozen: tuple[str, ...] = (), **text: Any) -> tuple[Any, dict[str, torch.Tensor], list]:
    """Loss, gradients and the routers' counts of one step."""
    model = build_model(config(**text), seed=5, recompute=recompute)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen) if frozen else True)
    chunks = data_parallel.wrap(model)
    counts: list[list[float]] = []
    finalize = model.config.finalize_model_grads_func

    def read(*args: Any, **kwargs: Any) -> None:
        counts.extend(m.local_tokens_per_expert.tolist() for m in model.modules() if hasattr(m, "expert_bias"))
        finalize(*args, **kwargs)

    model.config.finalize_model_grads_func = read
    result = schedule.train_step(chunks, packs())
    gradients = {n: p.main_grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return result, gradients, counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [(), ("embedding", "vision_model", "align_projector", "decoder.layers.0")])
def test_the_same_bits(kind: str, frozen: tuple[str, ...], one_rank: None) -> None:
    """Frozen: the first layers' input needs no gradient, but theirs do."""
    expected, gradients, counts = step(NONE, frozen)
    found, recomputed, counted = step(KINDS[kind], frozen)
    assert found.loss == expected.loss
    assert counted == counts and sum(counts[0]) == 2 * 72 * 2  # packs x length x experts of a token: none twice
    assert gradients.keys() == recomputed.keys()
    assert any(name.startswith("decoder.layers.1") for name in gradients)
    for name, gradient in gradients.items():
        assert torch.equal(recomputed[name], gradient), name
        assert bool(gradient.any()) or "experts" in name, name


def test_mtp_layers_recompute_too(one_rank: None) -> None:
    model = with_overrides(Step37Config.preset("tiny"), text=MTP_TEXT, vision=VISION)
    sizes = [saved_bytes(build_model(model, seed=5, recompute=r)) for r in (NONE, Recompute("full"))]
    alone = with_overrides(Step37Config.preset("tiny"), text=TEXT, vision=VISION)
    without = [saved_bytes(build_model(alone, seed=5, recompute=r)) for r in (NONE, Recompute("full"))]
    assert sizes[0] - sizes[1] > 1.5 * (without[0] - without[1])  # two MTP layers behind two layers


def test_fewer_activations_are_kept(one_rank: None) -> None:
    sizes = {kind: saved_bytes(build_model(config(), seed=5, recompute=r)) for kind, r in KINDS.items()}
    nothing = saved_bytes(build_model(config(), seed=5))
    print({kind: round(size / nothing, 2) for kind, size in sizes.items()})
    assert sizes["full and vision"] < sizes["full"] < sizes["full, one layer"] < nothing
    assert sizes["full"] < sizes["selective"] < nothing
    assert sizes["vision"] < nothing
    assert nothing - sizes["full and vision"] == (nothing - sizes["full"]) + (nothing - sizes["vision"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"recompute": "all"}, "strategy.recompute: expected none, selective or full, found 'all'"),
        ({"recompute_layers": 1}, "strategy.recompute_layers: expected null with strategy.recompute none, found 1"),
        ({"recompute": "full", "recompute_layers": 5}, "in 1..4"),
        ({"recompute": "full", "recompute_layers": 0}, "in 1..4"),
    ],
)
def test_refuses(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        MegatronStrategy(**arguments).recompute.validate(4)
    assert named in str(refused.value)
