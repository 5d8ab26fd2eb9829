"""The name table: the published totals, the model's parameters, and both directions of each conversion."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from step37_lit.config import Step37Config
from step37_lit.hub.conversions import COPY, GATE_UP, FuseQKV
from step37_lit.hub.load import loadable_weights
from step37_lit.hub.names import name_table, text_rows, vision_rows
from step37_lit.megatron.build import build_model


def test_published_totals() -> None:
    config = Step37Config()
    text = [tensor for row in text_rows(config) for tensor in row.hub]
    vision = [tensor for row in vision_rows(config) for tensor in row.hub]
    assert len(text) == 804
    assert sum(tensor.nbytes(torch.bfloat16) for tensor in text) == 398_768_626_944
    assert len(vision) == 667
    assert sum(tensor.numel for tensor in vision) == 1_981_014_784
    names = [tensor.name for tensor in text + vision]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("preset", "changed"), [("flash", {}), ("flash", {"mtp": True}), ("tiny", {}), ("tiny_moe", {})]
)
def test_the_model_has_the_tables_weights(preset: str, changed: dict, one_rank: None) -> None:
    """On the meta device: names, shapes and dtypes in both directions."""
    config = Step37Config.preset(preset, **changed)
    model = build_model(config, dtype=torch.bfloat16, device="meta")
    rows = {row.ours: row for row in name_table(config) if row.ours is not None}
    weights = loadable_weights(model)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert set(weights) == set(rows)
    for name, weight in weights.items():
        assert tuple(weight.shape) == rows[name].shape, name
        assert weight.dtype == (torch.float32 if rows[name].hub[0].fp32 else torch.bfloat16), name


def test_the_full_model_on_the_meta_device(one_rank: None) -> None:
    """Parameters of the model without MTP layers, and of its vision part, counted on the modules."""
    config = Step37Config()
    model = build_model(config, device="meta")
    vision = sum(p.numel() for p in [*model.vision_model.parameters(), *model.align_projector.parameters()])
    assert vision == 1_981_014_784
    mtp = sum(tensor.numel for row in text_rows(config) if row.ours is None for tensor in row.hub)
    biases = config.text.num_experts * len(config.text.moe_layers)  # fp32 buffers, 2 bytes more each
    parameters = sum(p.numel() for p in model.parameters()) - vision
    assert mtp > 0
    assert 2 * (parameters + mtp) + 4 * biases == 398_768_626_944
    whole = build_model(Step37Config.preset("flash", mtp=True), device="meta")
    assert sum(p.numel() for p in whole.parameters()) == parameters + mtp + vision
    assert sum(p.numel() for p in whole.mtp.parameters()) == mtp


def test_mtp_rows_have_names_where_the_model_builds_them() -> None:
    without, built = (text_rows(Step37Config.preset("flash", mtp=mtp)) for mtp in (False, True))
    assert [row.hub for row in built] == [row.hub for row in without]
    names = {row.hub[0].name: row.ours for row in built}
    assert None not in names.values()
    assert names["model.layers.45.eh_proj.weight"] == "mtp.layers.0.eh_proj.weight"
    assert names["model.layers.47.transformer.shared_head.output.weight"] == "mtp.layers.2.output_layer.weight"
    own = {name: ours for name, ours in names.items() if ours.startswith("mtp.")}
    assert set(own) == {row.hub[0].name for row in without if row.ours is None}
    assert all(row.ours == names[row.hub[0].name] for row in without if row.ours is not None)


def test_projector_bias_is_in_the_table(one_rank: None) -> None:
    config = dataclasses.replace(Step37Config.preset("tiny"), projector_bias=True)
    assert {row.ours for row in name_table(config)} == set(loadable_weights(build_model(config, device="meta")))


@pytest.mark.parametrize("heads", [4, 12])
def test_qkv_stands_by_group(heads: int) -> None:
    groups, head_dim, hidden = 4, 2, 3
    sizes = (heads * head_dim, groups * head_dim, groups * head_dim)
    q, k, v = (torch.randn(size, hidden) for size in sizes)
    conversion = FuseQKV(head_dim)
    fused = conversion.from_hub([q, k, v])
    assert tuple(fused.shape) == conversion.fused_shape([q.shape, k.shape, v.shape])
    per_group = heads // groups * head_dim
    block = per_group + 2 * head_dim
    for group in range(groups):
        own = fused[group * block : (group + 1) * block]
        assert torch.equal(own[:per_group], q[group * per_group : (group + 1) * per_group])
        assert torch.equal(own[per_group : per_group + head_dim], k[group * head_dim : (group + 1) * head_dim])
        assert torch.equal(own[per_group + head_dim :], v[group * head_dim : (group + 1) * head_dim])
    back = conversion.to_hub(fused, [q.shape, k.shape, v.shape])
    assert all(torch.equal(a, b) for a, b in zip(back, (q, k, v), strict=True))


@pytest.mark.parametrize("shape", [(5, 3), (4, 5, 3)])
def test_gate_stands_above_up(shape: tuple[int, ...]) -> None:
    gate, up = torch.randn(shape), torch.randn(shape)
    fused = GATE_UP.from_hub([gate, up])
    assert tuple(fused.shape) == GATE_UP.fused_shape([shape, shape])
    assert torch.equal(fused[..., :5, :], gate)
    assert all(torch.equal(a, b) for a, b in zip(GATE_UP.to_hub(fused, [shape, shape]), (gate, up), strict=True))


def test_copy_is_the_same_tensor() -> None:
    weight = torch.randn(3)
    assert torch.equal(COPY.from_hub([weight]), weight)
    assert COPY.to_hub(weight, [(3,)])[0].data_ptr() == weight.data_ptr()
