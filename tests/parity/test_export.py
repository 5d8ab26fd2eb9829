"""What is exported is what `transformers` loads: the same logits as the model that was imported."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from step37_lit.batch import PackedBatch
from step37_lit.config import Step37Config
from step37_lit.hub.config_writer import LAYOUTS
from step37_lit.hub.exporting import ExportOptions, export_hub
from step37_lit.hub.importing import import_hub
from step37_lit.hub.load import load_hub_model
from tests.hub_folders import assert_same_tensors, read_hub
from tests.parity.cases import Case
from tests.parity.oracle import build_oracle, make_samples, oracle_logits

transformers = pytest.importorskip("transformers", reason="transformers is the oracle (extra `test`)")
TOLERANCE = 2e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_loads_what_was_exported(tmp_path: Path, layout: str, one_rank: None) -> None:
    case, seed = Case("export"), 11
    oracle = build_oracle(case, tmp_path / "oracle", seed)
    import_hub(tmp_path / "oracle", tmp_path / "ckpt")
    export_hub(tmp_path / "ckpt", tmp_path / "hub", ExportOptions(layout=layout, shard_size=200_000))
    assert_same_tensors(read_hub(tmp_path / "hub"), read_hub(tmp_path / "oracle"))
    before, after = (_load(tmp_path / name) for name in ("oracle", "hub"))
    config = Step37Config.from_hub(tmp_path / "hub")
    ours = load_hub_model(tmp_path / "hub")
    samples = make_samples(case, config.tokens, seed)
    with torch.no_grad():
        made, expected, found = (
            [oracle_logits(model, sample, config.tokens) for sample in samples] for model in (oracle, before, after)
        )
        batch = PackedBatch.from_samples(samples)
        own = ours(**batch.model_inputs(labels=False))[0].split(batch.cu_seqlens.diff().tolist())
    for theirs, again, first, mine in zip(expected, found, made, own, strict=False):
        assert torch.equal(theirs, again)
        print(float((first - theirs).abs().max()), float((mine - theirs).abs().max()), float(theirs.abs().max()))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(first, theirs, rtol=0, atol=TOLERANCE)


def _load(folder: Path) -> torch.nn.Module:
    model, report = transformers.Step3p7ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_reads_every_field(tmp_path: Path, layout: str) -> None:
    """The config that `transformers` makes of ours, written again, is the same model."""
    from step37_lit.hub.config_json import read_hub_config
    from step37_lit.hub.config_writer import hub_facts
    from tests.hub_folders import every_feature, write_hub

    config = every_feature()
    vision = dataclasses.replace(config.vision, ffn_hidden_size=170)
    config = dataclasses.replace(config, vision=vision)
    write_hub(tmp_path / "hub", config, layout)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    theirs = transformers.Step3p7Config.from_pretrained(tmp_path / "hub")
    assert theirs.vision_config.intermediate_size == 170
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (tmp_path / "again").mkdir(exist_ok=True)
        (tmp_path / "again" / name).write_bytes((tmp_path / "hub" / name).read_bytes())
    theirs.save_pretrained(tmp_path / "again")
    assert read_hub_config(tmp_path / "again") == hub_facts(config)
