"""Hub folder -> checkpoint -> hub folder -> checkpoint: bit-equal, whole or absent, resumable."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from step37_lit import saved_model
from step37_lit.checkpoint.manifest import verify
from step37_lit.checkpoint.tensors import TensorFolder
from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError
from step37_lit.hub.config_json import parse_hub_config, read_hub_config
from step37_lit.hub.config_writer import LAYOUTS, hub_config, hub_facts, preprocessor_config
from step37_lit.hub.exporting import ExportOptions, export_hub
from step37_lit.hub.importing import import_hub
from step37_lit.hub.safetensors_folder import INDEX_FILE
from tests.hub_folders import EXTRA_TEXTS, assert_same_tensors, every_feature, file_bytes, read_hub, write_hub


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", ["every feature", "tiny", "flash", "all sliding"])
def test_config_is_read_as_it_was_written(config: str, layout: str) -> None:
    made = {
        "every feature": every_feature(),
        "tiny": Step37Config.preset("tiny"),
        "flash": Step37Config(),
        "all sliding": _all_sliding(),
    }[config]
    beside = {"preprocessor_config.json": json.dumps(preprocessor_config(made)).encode()}
    text = json.dumps(hub_config(made, layout, torch.bfloat16)).encode()
    found = parse_hub_config(text, Path("config.json"), beside)
    assert found == hub_facts(made)
    assert hub_facts(found) == found


def _all_sliding() -> Step37Config:
    tiny = Step37Config.preset("tiny")
    text = dataclasses.replace(tiny.text, layer_types=("sliding_attention",) * 2, mtp_loss_weight=0.3)
    return dataclasses.replace(tiny, text=text)


def test_two_scalings_do_not_fit_the_hubs_layout() -> None:
    config = every_feature()
    other = dataclasses.replace(
        config.text.full_rope, scaling=dataclasses.replace(config.text.full_rope.scaling, factor=3.0)
    )
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, sliding_rope=other))
    with pytest.raises(ConfigError, match=r"text\.full_rope\.scaling: expected that of text\.sliding_rope"):
        hub_config(config, "hub", torch.bfloat16)
    hub_config(config, "transformers", torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_round_trip(tmp_path: Path, layout: str, shards: int) -> None:
    config = every_feature()
    tensors = write_hub(tmp_path / "hub", config, layout, shards=shards)
    done = import_hub(tmp_path / "hub", tmp_path / "ckpt")
    assert done.tensors == len(tensors) and not done.left
    manifest = verify(tmp_path / "ckpt")
    assert (manifest.kind, manifest.dtype) == ("weights", "bfloat16")
    assert saved_model.read_config(tmp_path / "ckpt").text.mtp
    size = 10**9 if shards == 1 else 100_000
    exported = export_hub(tmp_path / "ckpt", tmp_path / "again", ExportOptions(shard_size=size, layout=layout))
    assert exported.tensors == len(tensors) and (exported.files == 1) == (shards == 1)
    assert_same_tensors(read_hub(tmp_path / "again"), tensors)
    first, second = (file_bytes(tmp_path / name) for name in ("hub", "again"))
    texts = {name for name in first if not name.endswith((".safetensors", INDEX_FILE))}
    assert texts >= {"config.json", "tokenizer.json", "chat_template.jinja", *EXTRA_TEXTS}
    assert {name: second[name] for name in texts} == {name: first[name] for name in texts}
    import_hub(tmp_path / "again", tmp_path / "ckpt2")
    third, fourth = (file_bytes(tmp_path / name) for name in ("ckpt", "ckpt2"))
    assert set(third) == set(fourth)
    differing = {name for name in third if third[name] != fourth[name]}
    assert differing <= {"manifest.json"}  # which has the time
    assert not list(tmp_path.glob(".*"))


def test_changed_layout_and_dtype(tmp_path: Path) -> None:
    config = every_feature()
    tensors = write_hub(tmp_path / "hub", config, "hub")
    import_hub(tmp_path / "hub", tmp_path / "ckpt")
    options = ExportOptions(torch.float32, 10**9, "transformers")
    export_hub(tmp_path / "ckpt", tmp_path / "wide", options)
    assert_same_tensors(read_hub(tmp_path / "wide"), {name: tensor.float() for name, tensor in tensors.items()})
    written = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert written["dtype"] == "float32" and "rope_parameters" in written["text_config"]
    assert read_hub_config(tmp_path / "wide") == hub_facts(config)
    import_hub(tmp_path / "wide", tmp_path / "ckpt2")
    export_hub(tmp_path / "ckpt2", tmp_path / "narrow", ExportOptions(torch.bfloat16))
    assert_same_tensors(read_hub(tmp_path / "narrow"), tensors)


def test_without_tensors_of_mtp_layers(tmp_path: Path) -> None:
    """As transformers saves a model."""
    tensors = write_hub(tmp_path / "hub", every_feature(), "transformers", mtp=False, texts=False)
    import_hub(tmp_path / "hub", tmp_path / "ckpt")
    assert not saved_model.read_config(tmp_path / "ckpt").text.mtp
    assert export_hub(tmp_path / "ckpt", tmp_path / "again").without_mtp == 2
    assert_same_tensors(read_hub(tmp_path / "again"), tensors)


def test_router_bias_is_widened(tmp_path: Path) -> None:
    """transformers saves all of a bf16 model in bf16; the checkpoint and its export have it in fp32."""
    from tests.hub_folders import random_tensors, write_tensors

    config = every_feature()
    write_hub(tmp_path / "hub", config, shards=1)
    tensors = {name: tensor.bfloat16() for name, tensor in random_tensors(config, torch.bfloat16, seed=1).items()}
    write_tensors(tmp_path / "hub", tensors, 1)
    import_hub(tmp_path / "hub", tmp_path / "ckpt")
    assert TensorFolder(tmp_path / "ckpt" / "model").dtype("decoder.layers.2.mlp.router.expert_bias") == torch.float32
    export_hub(tmp_path / "ckpt", tmp_path / "again")
    expected = {name: tensor.float() if "router_bias" in name else tensor for name, tensor in tensors.items()}
    assert_same_tensors(read_hub(tmp_path / "again"), expected)


def test_text_files_of_another_folder(tmp_path: Path) -> None:
    write_hub(tmp_path / "bare", every_feature(), texts=False)
    write_hub(tmp_path / "full", every_feature())
    import_hub(tmp_path / "bare", tmp_path / "ckpt")
    export_hub(tmp_path / "ckpt", tmp_path / "again", ExportOptions(like=tmp_path / "full"))
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tmp_path / "full" / "tokenizer.json").read_bytes()
    with pytest.raises(ConfigError, match="--like: expected a hub folder"):
        export_hub(tmp_path / "ckpt", tmp_path / "more", ExportOptions(like=tmp_path / "none"))
    assert not (tmp_path / "more").exists()
