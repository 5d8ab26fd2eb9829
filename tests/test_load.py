"""`load_hub_model`: every tensor used once, everything else refused in one line."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from step37_lit.errors import ConfigError
from step37_lit.hub.config_json import read_hub_config
from step37_lit.hub.load import load_hub_model, loadable_weights
from step37_lit.hub.names import name_table
from step37_lit.hub.safetensors_folder import INDEX_FILE, SINGLE_FILE
from tests.hub_configs import FULL, SLIDING, published_hub_config


def tiny_hub_config(mtp: int = 0) -> dict:
    """The published config in small: 2 layers, the second with experts, and `mtp` MTP layers."""
    config = published_hub_config()
    config.pop("patch_token_len")
    config |= {"image_token_id": 101, "image_token_len": 1}
    config["vision_config"] |= {"width": 16, "layers": 1, "heads": 2, "mlp_ratio": 2.0, "image_size": 28}
    kinds = [FULL, SLIDING] + [SLIDING] * mtp
    config["text_config"] |= {
        "vocab_size": 128, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_nextn_predict_layers": mtp, "num_attention_heads": 4, "num_attention_groups": 2, "head_dim": 8,
        "attention_other_setting": {"num_attention_heads": 6}, "layer_types": kinds, "moe_layers_enum": "1",
        "rope_theta": 1e4, "partial_rotary_factors": [1.0] * len(kinds), "moe_num_experts": 4, "moe_top_k": 2,
        "moe_intermediate_size": 8, "share_expert_dim": 12, "swiglu_limits": None, "swiglu_limits_shared": None,
        "eos_token_id": [1], "bos_token_id": 0,
    }  # fmt: skip
    return config


@pytest.fixture
def hub(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Tensor]]]:
    """Writes a hub folder; the tensors may be changed before."""

    def write(mtp: int = 0, change: Callable[[dict[str, Tensor]], object] | None = None, mtp_tensors: bool = True):
        (tmp_path / "config.json").write_text(json.dumps(tiny_hub_config(mtp)))
        rows = [row for row in name_table(read_hub_config(tmp_path)) if mtp_tensors or row.ours is not None]
        tensors = {tensor.name: torch.randn(tensor.shape) for row in rows for tensor in row.hub}
        if change is not None:
            change(tensors)
        save_file(tensors, tmp_path / SINGLE_FILE)
        return tmp_path, tensors

    return write


def shard(folder: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Two shards and an index in place of the one file; returns the index's map."""
    (folder / SINGLE_FILE).unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def assert_loaded(model: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    weights = loadable_weights(model)
    for row in name_table(model.step37):
        if row.ours is not None:
            parts = row.conversion.to_hub(weights[row.ours].detach(), [tensor.shape for tensor in row.hub])
            for tensor, part in zip(row.hub, parts, strict=True):
                assert torch.equal(part, tensors[tensor.name].to(part.dtype)), tensor.name


def test_every_weight_is_loaded(hub, one_rank: None) -> None:
    folder, tensors = hub()
    assert_loaded(load_hub_model(folder), tensors)
    shard(folder, tensors)
    assert_loaded(load_hub_model(folder), tensors)


def test_bf16_keeps_the_routers_bias_in_fp32(hub, one_rank: None) -> None:
    folder, tensors = hub()
    model = load_hub_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    bias = model.decoder.layers[1].mlp.router.expert_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, tensors["model.layers.1.moe.router_bias"])
    assert_loaded(model, tensors)


def test_bf16_checkpoint_into_fp32(hub, one_rank: None) -> None:
    def to_bf16(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items() if "router_bias" not in name}

    folder, tensors = hub(change=to_bf16)
    assert_loaded(load_hub_model(folder), tensors)


def test_mtp_tensors_are_accounted_for(hub, one_rank: None, caplog: pytest.LogCaptureFixture) -> None:
    folder, tensors = hub(mtp=2)
    with caplog.at_level(logging.WARNING):
        assert_loaded(load_hub_model(folder), tensors)
    count = sum(name.startswith(("model.layers.2.", "model.layers.3.")) for name in tensors)
    assert caplog.messages == [f"{folder}: {count} tensors of 2 MTP layers are not loaded"]
    assert count == 2 * (5 + 12)


def test_mtp_tensors_are_loaded_where_the_config_builds_them(
    hub, one_rank: None, caplog: pytest.LogCaptureFixture
) -> None:
    folder, tensors = hub(mtp=2)
    config = read_hub_config(folder)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, mtp=True))
    with caplog.at_level(logging.WARNING):
        model = load_hub_model(folder, config=config)
    assert_loaded(model, tensors)
    assert torch.equal(model.mtp.layers[1].eh_proj.weight, tensors["model.layers.3.eh_proj.weight"])
    assert not caplog.messages
    (folder / SINGLE_FILE).unlink()
    save_file({name: t for name, t in tensors.items() if ".layers.3." not in name}, folder / SINGLE_FILE)
    with pytest.raises(ConfigError, match=r"17 missing \(model\.layers\.3\.eh_proj\.weight"):
        load_hub_model(folder, config=config)


def test_checkpoint_without_its_mtp_layers(hub, one_rank: None, caplog: pytest.LogCaptureFixture) -> None:
    folder, tensors = hub(mtp=2, mtp_tensors=False)
    with caplog.at_level(logging.WARNING):
        assert_loaded(load_hub_model(folder), tensors)
    assert caplog.messages == [f"{folder}: the config has 2 MTP layers, the checkpoint none of their tensors"]


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("mtp", "change", "message"),
    [
        (0, lambda t: t.pop(NORM), r"expected the \d+ of the config, found '1 missing \(model\.norm\.weight\)"),
        (0, lambda t: t.update(extra=torch.zeros(1)), r"0 missing, 1 unexpected \(extra\)"),
        (1, lambda t: t.pop("model.layers.2.enorm.weight"), r"1 missing \(model\.layers\.2\.enorm\.weight\), 0 unexp"),
        (0, lambda t: t.update({NORM: torch.zeros(15)}), r"model\.norm\.weight: expected shape \(16,\), found \(15,\)"),
        (0, lambda t: t.update({EMBEDDING: torch.zeros(16, 128)}), r"shape \(128, 16\), found \(16, 128\)"),
        (0, lambda t: t.update({NORM: torch.zeros(16, dtype=torch.int32)}), "expected F32 or F16 or BF16, found 'I32'"),
    ],
)  # fmt: skip
def test_refused_tensors(hub, mtp: int, change, message: str) -> None:
    folder, _ = hub(mtp=mtp, change=change)
    with pytest.raises(ConfigError, match=message) as error:
        load_hub_model(folder)
    assert "\n" not in str(error.value)


def test_refused_folders(hub) -> None:
    folder, tensors = hub()
    (folder / INDEX_FILE).write_text("{}")
    with pytest.raises(ConfigError, match="found 'both'"):
        load_hub_model(folder)
    weight_map = shard(folder, tensors)

    write_index(folder, {name: file for name, file in weight_map.items() if name != NORM})
    with pytest.raises(ConfigError, match=r"1 differ.*model\.norm\.weight in a shard, but not in the index"):
        load_hub_model(folder)
    write_index(folder, weight_map | {"extra": weight_map[NORM]})
    with pytest.raises(ConfigError, match=r"1 differ.*extra in no shard"):
        load_hub_model(folder)
    other = next(file for file in weight_map.values() if file != weight_map[NORM])
    write_index(folder, weight_map | {NORM: other})
    with pytest.raises(ConfigError, match=rf"weight_map\.{NORM}: expected '?{weight_map[NORM]}"):
        load_hub_model(folder)
    write_index(folder, weight_map | {NORM: "../model.safetensors"})
    with pytest.raises(ConfigError, match="names of safetensors files in this folder"):
        load_hub_model(folder)

    write_index(folder, weight_map)
    save_file(
        {name: tensors[name] for name in tensors if weight_map[name] == other} | {NORM: tensors[NORM]}, folder / other
    )
    with pytest.raises(ConfigError, match=rf"{NORM}: expected one tensor of this name, found 'another in"):
        load_hub_model(folder)
    (folder / other).write_bytes(b"broken")
    with pytest.raises(ConfigError, match=r"the file: expected safetensors"):
        load_hub_model(folder)
    (folder / other).unlink()
    with pytest.raises(FileNotFoundError, match=other):
        load_hub_model(folder)
    (folder / INDEX_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors and no"):
        load_hub_model(folder)
