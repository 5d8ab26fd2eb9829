"""`config.json` in both layouts, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError
from step37_lit.hub.config_json import read_hub_config
from tests.hub_configs import published_hub_config

IMAGE_TOKENS = ("im_start", "im_patch", "im_end", "patch_start", "patch_newline", "patch_end")


def read(folder: Path, config: dict[str, Any]) -> Step37Config:
    (folder / "config.json").write_text(json.dumps(config))
    return read_hub_config(folder)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The published config with one field set; a value of `...` takes it out."""
    config = published_hub_config()
    *sections, name = path.split(".")
    place = config
    for section in sections:
        place = place[section]
    if value is ...:
        del place[name]
    else:
        place[name] = value
    return config


def test_the_published_config_is_the_default(tmp_path: Path) -> None:
    assert read(tmp_path, published_hub_config()) == Step37Config() == Step37Config.preset("flash")
    assert Step37Config.from_hub(tmp_path / "config.json") == Step37Config()


def test_both_layouts_give_the_same_config(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers writes the other layout (extra `test`)")
    config = published_hub_config()
    kept = copy.deepcopy(config)
    oracle = transformers.Step3p7Config(
        vision_config=config["vision_config"],
        text_config=config["text_config"],
        image_token_id=config["image_token_id"],
        projector_bias=config["projector_bias"],
    )
    oracle.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written["text_config"]
    assert "attention_other_setting" not in written["text_config"]
    assert read_hub_config(tmp_path) == read(tmp_path, kept)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("text_config.moe_layers_enum", list(range(3, 45))),
        ("text_config.swiglu_limits", [7.0 if layer in (43, 44) else None for layer in range(48)]),
        ("text_config.swiglu_limits", [7.0 if layer in (43, 44) else 0 for layer in range(45)]),
        ("text_config.max_seq_len", ...),
        ("text_config.yarn_only_types", ...),
        ("text_config.use_rope_layers", [1] * 48),
        ("text_config.share_expert_dims", 1280),
        ("vision_config.intermediate_size", 8960),
        ("im_start_token_id", 128000),
    ],
)
def test_other_spellings_of_the_same_model(tmp_path: Path, path: str, value: Any) -> None:
    assert read(tmp_path, changed(path, value)) == Step37Config()


def test_rope_scaling_at_the_top(tmp_path: Path) -> None:
    config = published_hub_config()
    config["rope_scaling"] = config["text_config"].pop("rope_scaling")
    assert read(tmp_path, config) == Step37Config()


def test_one_theta_for_all_layers(tmp_path: Path) -> None:
    text = read(tmp_path, changed("text_config.rope_theta", 2e4)).text
    assert (text.full_rope.theta, text.sliding_rope.theta) == (2e4, 2e4)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("text_config.moe_topk", 8, r"text_config\.moe_topk: expected no such field \(1 unknown\), found 8"),
        ("vision_config.layer_count", 47, r"vision_config\.layer_count: expected no such field"),
        ("quantization_config", {}, "quantization_config: expected no such field"),
        ("text_config.hidden_size", ..., r"text_config\.hidden_size: expected a value"),
        ("text_config.hidden_size", "4096", r"text_config\.hidden_size: expected an integer, found '4096'"),
        ("text_config.moe_router_activation", "softmax", r"moe_router_activation: expected 'sigmoid', found 'softmax'"),
        ("text_config.use_head_wise_attn_gate", False, "use_head_wise_attn_gate: expected True, found False"),
        ("text_config.layer_types", ["full_attention"] * 47, r"layer_types: expected 48 entries, found 47"),
        ("text_config.layer_types", ["linear"] * 48, r"layer_types\[0\]: expected full_attention or .* found 'linear'"),
        ("text_config.rope_theta", [1e4] * 47 + [2e4], r"rope_theta\[47\]: expected 10000 as on the other sliding"),
        ("text_config.swiglu_limits", [7.0], r"swiglu_limits: expected 45 entries or 48 entries, found 1"),
        ("text_config.moe_layers_enum", "3,x", "moe_layers_enum: expected layer numbers"),
        ("text_config.moe_layers_enum", "3,46", r"moe_layers: expected indices in 0\.\.44, found 46"),
        ("text_config.max_seq_len", 4096, r"max_seq_len: expected 262144 as max_position_embeddings, found 4096"),
        ("text_config.rope_scaling", {"rope_type": "yarn"}, r"rope_scaling\.rope_type: expected llama3 or default"),
        ("text_config.attention_other_setting", {"num_attention_heads": 96, "head_dim": 64},
         r"attention_other_setting\.head_dim: expected 128, found 64"),
        ("text_config.num_attention_groups", 7, "attention_groups: expected 7, found 8"),
        ("vision_config.use_cls_token", True, "use_cls_token: expected False, found True"),
        ("vision_config.intermediate_size", 9000, r"intermediate_size: expected mlp_ratio x width = 8960, found 9000"),
        ("image_token_id", 128894, r"tokens\.patch_start: expected in 0\.\.128895, found 128896"),
        ("image_token_len", 170, "image_token_len: expected 169, found 170"),
        ("im_end_token_id", 128000, "six different image tokens"),
        ("text_config", [], "text_config: expected a JSON object"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, changed(path, value))
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert "\n" not in str(error.value)


def test_refused_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        read_hub_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: the file: expected JSON"):
        read_hub_config(tmp_path)


def write_tokenizer(folder: Path, ids: dict[str, int]) -> None:
    tokens = [{"content": f"<{name}>", "id": number} for name, number in ids.items()]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))


def test_image_tokens_from_the_tokenizer(tmp_path: Path) -> None:
    ids = {name: 128100 + 3 * i for i, name in enumerate(IMAGE_TOKENS)}
    write_tokenizer(tmp_path, ids)
    tokens = read(tmp_path, changed("image_token_id", ids["im_patch"])).tokens
    assert {name: getattr(tokens, name) for name in IMAGE_TOKENS} == ids
    with pytest.raises(ConfigError, match=r"image_token_id: expected 128103 \(<im_patch> of tokenizer.json\)"):
        read(tmp_path, published_hub_config())
    del ids["patch_end"]
    write_tokenizer(tmp_path, ids)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: added_tokens: expected a token <patch_end>"):
        read(tmp_path, published_hub_config())


def test_without_bos_and_eos(tmp_path: Path) -> None:
    config = published_hub_config()
    config["text_config"] |= {"bos_token_id": None, "eos_token_id": None}
    tokens = read(tmp_path, config).tokens
    assert tokens == dataclasses.replace(Step37Config().tokens, bos=None, eos=())
