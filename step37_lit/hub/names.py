"""The name table: one row a weight, hub <-> this project.

A row names the hub's tensors (some weights are fused here), the weight in `Step37Model` (layers numbered over the
whole decoder), how the one becomes the other, and along which dimensions ranks share it. Everything follows from the
config alone: shapes, dtypes, totals. Which rows a rank has follows from the layers that its model has.

H = hidden, E = experts, F = inner width, N = query heads, G = key/value heads, D = head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from step37_lit.config import Step37Config, VisionConfig
from step37_lit.hub.conversions import COPY, GATE_UP, Conversion, FuseQKV

Shape = tuple[int, ...]


@dataclass(frozen=True)
class HubTensor:
    """A tensor of the hub's checkpoint.

    Args:
        name: Its key in the safetensors files.
        shape: Its shape.
        fp32: Stored in fp32 whatever the checkpoint's dtype.
    """

    name: str
    shape: Shape
    fp32: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes in a checkpoint of `dtype`."""
        return self.numel * (torch.float32 if self.fp32 else dtype).itemsize


@dataclass(frozen=True)
class Split:
    """How ranks share a weight: equal parts of each hub tensor, which fused are the rank's part of ours.

    Args:
        over: The ranks that share it.
        dim: Dimension of the hub's tensors.
    """

    over: Literal["tensor", "expert", "expert_tensor"]
    dim: int


ROWS, COLUMNS = (Split("tensor", 0),), (Split("tensor", 1),)
EXPERT_ROWS, EXPERT_COLUMNS = ((Split("expert", 0), Split("expert_tensor", dim)) for dim in (1, 2))


@dataclass(frozen=True)
class Row:
    """One weight.

    Args:
        hub: The hub's tensors that make it up, in the order of `conversion`.
        ours: Its name in `Step37Model`; None for MTP layers that the config does not build.
        conversion: How `hub` becomes `ours` and back.
        splits: How ranks share it; without any it is whole on each rank that has it.
    """

    hub: tuple[HubTensor, ...]
    ours: str | None
    conversion: Conversion = COPY
    splits: tuple[Split, ...] = ()

    @property
    def shape(self) -> Shape:
        """Shape of our weight on one rank."""
        return self.conversion.fused_shape([tensor.shape for tensor in self.hub])

    @property
    def fp32(self) -> bool:
        """Kept in fp32 whatever the model's dtype."""
        return self.hub[0].fp32


def name_table(config: Step37Config) -> list[Row]:
    """Every weight of `config`, decoder, MTP layers, vision tower and projector."""
    return [*text_rows(config), *vision_rows(config)]


def text_rows(config: Step37Config) -> list[Row]:
    """The decoder and its MTP layers (`ours` is None there without `text.mtp`)."""
    text = config.text
    table = (text.vocab_size, text.hidden_size)
    rows = [
        _copy("model.embed_tokens.weight", "embedding.word_embeddings.weight", table, ROWS),
        _copy("model.norm.weight", "decoder.final_layernorm.weight", (text.hidden_size,)),
        _copy("lm_head.weight", "output_layer.weight", table, ROWS),
    ]
    for layer in range(text.num_layers):
        rows += _layer_rows(config, layer, f"decoder.layers.{layer}")
    for layer in range(text.num_layers, text.total_layers):
        ours = f"mtp.layers.{layer - text.num_layers}"
        mtp = [*_layer_rows(config, layer, f"{ours}.transformer_layer"), *_mtp_rows(config, layer, ours)]
        rows += mtp if text.mtp else [replace(row, ours=None) for row in mtp]
    return rows


def vision_rows(config: Step37Config) -> list[Row]:
    """The vision tower and the projector: the same names and shapes on both sides, but for the projector's name."""
    names = [(name, name, shape) for name, shape in _vision_shapes(config.vision)]
    hidden, features = config.text.hidden_size, config.vision.output_dim
    names.append(("vit_large_projector.weight", "align_projector.weight", (hidden, features)))
    if config.projector_bias:
        names.append(("vit_large_projector.bias", "align_projector.bias", (hidden,)))
    return [_copy(hub, ours, shape) for hub, ours, shape in names]


def _copy(hub: str, ours: str, shape: Shape, splits: tuple[Split, ...] = ()) -> Row:
    return Row((HubTensor(hub, shape),), ours, splits=splits)


def _layer_rows(config: Step37Config, layer: int, ours: str) -> list[Row]:
    """A decoder layer, or the decoder layer inside an MTP layer."""
    text = config.text
    hub = f"model.layers.{layer}"
    hidden, head_dim, heads = text.hidden_size, text.head_dim, text.heads_of(layer)
    kv = (text.num_kv_groups * head_dim, hidden)
    qkv = tuple(
        HubTensor(f"{hub}.self_attn.{name}_proj.weight", shape)
        for name, shape in (("q", (heads * head_dim, hidden)), ("k", kv), ("v", kv))
    )
    copies = (
        ("input_layernorm", "input_layernorm", (hidden,), ()),
        ("self_attn.o_proj", "self_attention.linear_proj", (hidden, heads * head_dim), COLUMNS),
        ("self_attn.g_proj", "self_attention.linear_gate", (heads, hidden), ROWS),
        ("self_attn.q_norm", "self_attention.q_layernorm", (head_dim,), ()),
        ("self_attn.k_norm", "self_attention.k_layernorm", (head_dim,), ()),
        ("post_attention_layernorm", "pre_mlp_layernorm", (hidden,), ()),
    )
    rows = [_copy(f"{hub}.{h}.weight", f"{ours}.{o}.weight", shape, splits) for h, o, shape, splits in copies]
    rows.append(Row(qkv, f"{ours}.self_attention.linear_qkv.weight", FuseQKV(head_dim), ROWS))
    if layer in text.moe_layers:
        rows += _moe_rows(config, hub, ours)
    else:
        rows += _swiglu_rows(f"{hub}.mlp", f"{ours}.mlp", hidden, text.ffn_hidden_size)
    return rows


def _swiglu_rows(hub: str, ours: str, hidden: int, inner: int) -> list[Row]:
    gate_up = tuple(HubTensor(f"{hub}.{name}_proj.weight", (inner, hidden)) for name in ("gate", "up"))
    return [
        Row(gate_up, f"{ours}.linear_fc1.weight", GATE_UP, ROWS),
        _copy(f"{hub}.down_proj.weight", f"{ours}.linear_fc2.weight", (hidden, inner), COLUMNS),
    ]


def _moe_rows(config: Step37Config, hub: str, ours: str) -> list[Row]:
    text = config.text
    experts, inner, hidden = text.num_experts, text.expert_ffn_size, text.hidden_size
    gate_up = tuple(HubTensor(f"{hub}.moe.{name}_proj.weight", (experts, inner, hidden)) for name in ("gate", "up"))
    return [
        _copy(f"{hub}.moe.gate.weight", f"{ours}.mlp.router.weight", (experts, hidden)),
        Row((HubTensor(f"{hub}.moe.router_bias", (experts,), fp32=True),), f"{ours}.mlp.router.expert_bias"),
        Row(gate_up, f"{ours}.mlp.experts.weight1", GATE_UP, EXPERT_ROWS),
        _copy(f"{hub}.moe.down_proj.weight", f"{ours}.mlp.experts.weight2", (experts, hidden, inner), EXPERT_COLUMNS),
        *_swiglu_rows(f"{hub}.share_expert", f"{ours}.mlp.shared_experts", hidden, text.shared_expert_ffn_size),
    ]


def _mtp_rows(config: Step37Config, layer: int, ours: str) -> list[Row]:
    """What an MTP layer has beside its decoder layer."""
    text = config.text
    copies = (
        ("enorm", "enorm", (text.hidden_size,), ()),
        ("hnorm", "hnorm", (text.hidden_size,), ()),
        ("eh_proj", "eh_proj", (text.hidden_size, 2 * text.hidden_size), ()),
        ("transformer.shared_head.norm", "final_layernorm", (text.hidden_size,), ()),
        ("transformer.shared_head.output", "output_layer", (text.vocab_size, text.hidden_size), ROWS),
    )
    hub = f"model.layers.{layer}"
    return [_copy(f"{hub}.{h}.weight", f"{ours}.{o}.weight", shape, splits) for h, o, shape, splits in copies]


def _vision_shapes(vision: VisionConfig) -> Iterator[tuple[str, Shape]]:
    width, patch, tower = vision.width, vision.patch_size, "vision_model"
    yield f"{tower}.conv1.weight", (width, 3, patch, patch)
    yield f"{tower}.positional_embedding", (vision.position_grid**2, width)
    yield from _weight_and_bias(f"{tower}.ln_pre", (width,))
    for block in range(vision.num_layers):
        prefix = f"{tower}.transformer.resblocks.{block}"
        yield f"{prefix}.attn.in_proj_weight", (3 * width, width)
        yield f"{prefix}.attn.in_proj_bias", (3 * width,)
        yield from _weight_and_bias(f"{prefix}.attn.out_proj", (width, width))
        yield from _weight_and_bias(f"{prefix}.mlp.c_fc", (vision.ffn_hidden_size, width))
        yield from _weight_and_bias(f"{prefix}.mlp.c_proj", (width, vision.ffn_hidden_size))
        for branch in (1, 2):
            yield from _weight_and_bias(f"{prefix}.ln_{branch}", (width,))
            yield f"{prefix}.ls_{branch}.gamma", (width,)
    yield from _weight_and_bias(f"{tower}.vit_downsampler1", (2 * width, width, 3, 3))
    yield from _weight_and_bias(f"{tower}.vit_downsampler2", (4 * width, 2 * width, 3, 3))


def _weight_and_bias(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]
