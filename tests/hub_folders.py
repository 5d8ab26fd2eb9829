"""Hub folders made from a config: every tensor of the name table with random values, and text files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from step37_lit.config import Llama3Scaling, RopeConfig, Step37Config
from step37_lit.hub.config_writer import ConfigLayout, hub_config, preprocessor_config
from step37_lit.hub.names import name_table
from step37_lit.hub.safetensors_folder import INDEX_FILE, SafetensorsFolder
from step37_lit.hub.safetensors_writer import SafetensorsWriter, TensorSpec
from step37_lit.tokenizer import Step37Tokenizer

EXTRA_TEXTS = {"generation_config.json": '{"eos_token_id": [1, 2, 9]}\n', "README.md": "# hub\r\n", "LICENSE": "free\n"}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<im_patch>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}{{ eos_token }}\n{% endfor %}\r\n"
)


def every_feature(mtp_layers: int = 2) -> Step37Config:
    """A tiny model with all that the table knows: both kinds of attention, dense and MoE layers, MTP layers, clamps,
    scaled rotary embedding, a projector with a bias; divisible for two tensor, pipeline and expert ranks."""
    base = Step37Config.preset("tiny_moe")
    layers, total = base.text.num_layers, base.text.num_layers + mtp_layers
    text = dataclasses.replace(
        base.text,
        num_mtp_layers=mtp_layers,
        layer_types=(*base.text.layer_types, *("sliding_attention",) * mtp_layers),
        swiglu_limits=tuple(7.0 if layer == layers - 1 else None for layer in range(total)),
        swiglu_limits_shared=tuple(16.0 if layer == layers - 1 else None for layer in range(total)),
        full_rope=RopeConfig(5e6, 0.5, Llama3Scaling(original_max_position=512)),
        hidden_size=64,
        ffn_hidden_size=96,
        expert_ffn_size=48,
    )
    return dataclasses.replace(base, text=text, projector_bias=True)


def random_tensors(config: Step37Config, dtype: torch.dtype, seed: int, mtp: bool = True) -> dict[str, Tensor]:
    """Every tensor of the table, MTP layers included, with fp32 router biases."""
    generator = torch.Generator().manual_seed(seed)
    rows = [row for row in name_table(config) if mtp or row.ours is not None]
    return {
        tensor.name: torch.randn(tensor.shape, generator=generator).to(torch.float32 if tensor.fp32 else dtype)
        for row in rows
        for tensor in row.hub
    }


def write_tensors(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """Safetensors files in which the tensors stand in another order than the table's, and an index."""
    names = sorted(tensors, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    groups = [names[number::shards] for number in range(shards)]
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        group.sort(key=lambda name: -tensors[name].dtype.itemsize)
        file = "model.safetensors" if shards == 1 else f"model-{number:05}-of-{shards:05}.safetensors"
        with SafetensorsWriter(
            folder / file, [TensorSpec(n, tensors[n].dtype, tuple(tensors[n].shape)) for n in group]
        ) as w:
            for name in group:
                w.write(name, tensors[name])
            w.finish()
        weight_map |= dict.fromkeys(group, file)
    if shards > 1:
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def write_hub(
    folder: Path,
    config: Step37Config,
    layout: ConfigLayout = "hub",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    shards: int = 3,
    mtp: bool = True,
    texts: bool = True,
) -> dict[str, Tensor]:
    """A hub folder; returns its tensors."""
    folder.mkdir(parents=True)
    tensors = random_tensors(config, dtype, seed, mtp)
    (folder / "config.json").write_text(json.dumps(hub_config(config, layout, dtype) | {"pad_token_id": 2}))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(config)))
    write_tensors(folder, tensors, shards)
    if texts:
        Step37Tokenizer.train(["a red square", "a blue circle"], 300).save(folder / "tokenizer.json")
        (folder / "chat_template.jinja").write_bytes(TEMPLATE.encode())
        for name, text in EXTRA_TEXTS.items():
            (folder / name).write_bytes(text.encode())
    return tensors


def read_hub(folder: Path) -> dict[str, Tensor]:
    """All tensors of a hub folder."""
    with SafetensorsFolder(folder) as opened:
        found = {}
        for name in opened.names():
            entry = opened.entry(name)
            found[name] = torch.empty(entry.shape, dtype=entry.dtype)
            opened.read(name, found[name])
        return found


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Contents of every file in a folder, by path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
