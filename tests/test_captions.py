"""Captions of validation pictures while training, and the captioner of what was trained."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from training import trainer_arguments

import step37_lit
from callbacks.caption_metrics import CaptionMetrics
from datamodules.packed import PackedDataModule
from datamodules.scene_captions import caption_text, captions, score_caption
from datamodules.scene_world import Scene, Thing, draw_scene
from datamodules.scenes import ScenesDataModule
from step37_lit import MegatronStrategy, PackedBatch, Step37Captioner, Step37LitModule
from step37_lit.errors import ConfigError
from step37_lit.images import ImageError
from step37_lit.metrics import CIDErD, DocumentFrequencies
from tests import shard_sets

pytestmark = pytest.mark.usefixtures("one_rank")
ROOT = Path(__file__).parents[1]
MTP_TEXT = {
    "num_mtp_layers": 1,
    "mtp": True,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    "swiglu_limits": [None] * 3,
    "swiglu_limits_shared": [None] * 3,
}


def train(folder: Path, data: pl.LightningDataModule, captioning: CaptionMetrics, **changed: Any) -> pl.Trainer:
    arguments = trainer_arguments(folder, max_steps=6, enable_checkpointing=True, val_check_interval=3, **changed)
    arguments |= {"logger": CSVLogger(folder, "", ""), "reload_dataloaders_every_n_epochs": 1, "max_epochs": 9}
    arguments["check_val_every_n_epoch"] = None  # the interval counts steps over epochs
    saving = ModelCheckpoint(folder / "checkpoints", monitor="val/cider_d", mode="max", save_last=True)
    trainer = pl.Trainer(strategy=MegatronStrategy(), callbacks=[captioning, saving], **arguments)
    trainer.fit(Step37LitModule(preset="tiny", text=MTP_TEXT, warmup_steps=1, decay_steps=9, seed=3), datamodule=data)
    return trainer


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A run on shards: pictures with one and with three captions, and conversations about two pictures."""
    from step37_lit.megatron import process

    process.shutdown()
    root = tmp_path_factory.mktemp("captions")
    shard_sets.write_shards(root / "set", range(40))
    shard_sets.index(root / "set", shard_sets.tokenizer_file(root))
    data = PackedDataModule(
        sets=str(root / "set"),
        tokenizer=str(root / "tokenizer.json"),
        preset="tiny",
        max_length=160,
        microbatches=2,
        val_share=0.4,
        num_workers=0,
    )
    trainer = train(root / "run", data, CaptionMetrics(max_samples=9, max_new_tokens=12, batch_size=4, speculate=1))
    assert isinstance(trainer.checkpoint_callback, ModelCheckpoint)
    assert trainer.checkpoint_callback.best_model_score is not None
    return root / "run"


def test_captions_are_kept_and_scored(run: Path) -> None:
    with (run / "metrics.csv").open(newline="") as file:
        logged = [row for row in csv.DictReader(file) if row["val/cider_d"]]
    files = sorted((run / "captions").glob("*.jsonl"))
    assert [file.name for file in files] == ["step_000003.jsonl", "step_000006.jsonl"]
    assert len(logged) == 2
    for row, file in zip(logged, files, strict=True):
        kept = read_jsonl(file)
        assert len(kept) == 9 and len({each["key"] for each in kept}) == 9
        mean = sum(each["cider_d"] for each in kept) / 9
        assert float(row["val/cider_d"]) == pytest.approx(mean, rel=1e-6)  # logged in fp32
        assert float(row["val/caption_words"]) == pytest.approx(
            np.mean([len(each["caption"].split()) for each in kept])
        )
        for name in ("val/bleu_1", "val/bleu_4", "val/rouge_l"):
            assert 0 <= float(row[name]) <= 1
        for each in kept:
            number = int(each["key"].removeprefix("set/sample"))
            assert len(each["references"]) == (3 if number % 4 == 1 else 1)
            assert each["references"][0] == first_answers(number)[0]


def first_answers(number: int) -> list[str]:
    made = shard_sets.sample(number)
    if "txt" in made:
        return [made["txt"].decode()]
    content = json.loads(made["json"])
    return content["captions"] if "captions" in content else [content["messages"][1]["content"]]


def test_document_frequencies_are_those_of_the_whole_split(run: Path) -> None:
    """The nine captioned pictures weigh n-grams by all sixteen or so of the split."""
    kept = read_jsonl(run / "captions" / "step_000006.jsonl")
    own = CIDErD(sync_on_compute=False)
    own.update([each["caption"] for each in kept], [each["references"] for each in kept])
    mean = sum(each["cider_d"] for each in kept) / len(kept)
    assert float(own.compute()) != pytest.approx(mean, rel=1e-6)
    split = [DocumentFrequencies.from_references([first_answers(i) for i in range(40) if used(i)])]
    with_all = CIDErD(document_frequencies=split[0], sync_on_compute=False)
    with_all.update([each["caption"] for each in kept], [each["references"] for each in kept])
    assert float(with_all.compute()) == pytest.approx(mean, abs=1e-9)


def used(number: int) -> bool:
    """Whether a sample is in the validation split, as `ShardSet` chooses."""
    import hashlib

    digest = hashlib.blake2b(f"sample{number:05d}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < int(0.4 * 2**64)


def test_a_checkpoint_captions_without_its_recipe(run: Path, tmp_path: Path) -> None:
    captioner = Step37Captioner.from_checkpoint(run)
    (tmp_path / "one.jpg").write_bytes(shard_sets.picture(1))
    decoded = Image.open(tmp_path / "one.jpg").convert("RGB")
    tensor = torch.from_numpy(np.array(decoded)).permute(2, 0, 1)
    by_path = captioner(tmp_path / "one.jpg", max_new_tokens=8)
    assert isinstance(by_path, str) and by_path
    forms = [str(tmp_path / "one.jpg"), decoded, tensor]
    assert captioner(forms, max_new_tokens=8) == [by_path] * 3
    two = captioner([[decoded, tensor]], prompt="What is new?", max_new_tokens=8)
    assert len(two) == 1
    drawn = captioner(decoded, max_new_tokens=8, temperature=1.0, num_samples=3)
    assert len(drawn) == 3 and len(set(drawn)) > 1
    kept = read_jsonl(run / "captions" / "step_000006.jsonl")
    numbered = [each for each in kept if int(each["key"][-5:]) % 4 in (0, 1)]
    for each in numbered:  # the same picture and prompt give the caption of the last validation
        (tmp_path / "again.jpg").write_bytes(shard_sets.picture(int(each["key"][-5:])))
        assert captioner(tmp_path / "again.jpg", max_new_tokens=12).strip() == each["caption"]


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ("nowhere.jpg", ConfigError, "picture: expected a file, found 'nowhere.jpg'"),
        (torch.zeros(3, 4, 4), ConfigError, r"picture: expected uint8 \[3, H, W\], found 'torch.float32"),
        (7, ConfigError, "picture: expected a path, a PIL picture"),
        (__file__, ImageError, "not a picture"),
    ],
)
def test_what_is_no_picture_is_named(run: Path, entry: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Step37Captioner.from_checkpoint(run)(entry)


def test_the_caption_command(run: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        (pictures / f"{number}.jpg").write_bytes(shard_sets.picture(number))
    (pictures / "broken.png").write_bytes(b"not a picture")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def caption(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "step37_lit", "caption", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)

    out = tmp_path / "captions.jsonl"
    done = caption("--model", run, pictures, "--max-new-tokens", 6, "--batch-size", 2, "--jsonl", out)
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(out)
    assert [Path(row["path"]).name for row in rows] == ["0.jpg", "1.jpg", "2.jpg"]
    assert all(row["caption"] for row in rows)
    assert f"skipped {pictures / 'broken.png'}: " in done.stderr
    one = ("--model", run / "checkpoints" / "last.ckpt", pictures / "1.jpg", "--max-new-tokens", 6)
    printed = caption(*one, "--speculate", 1)
    assert "tokens a step" in printed.stderr
    assert printed.stdout == f"{pictures / '1.jpg'}\t{rows[1]['caption']}\n"
    for arguments, line in (
        (("--model", tmp_path, pictures), "checkpoint: expected a checkpoint's folder, or a run's folder"),
        (("--model", run, tmp_path / "nowhere"), "IMAGES: expected a file or a folder"),
        (
            ("--model", run, pictures / "broken.png"),
            "IMAGES: expected a picture that can be read",
        ),
        (("--model", run, pictures, "--num-beams", 2, "--temperature", 1), "temperature: expected 0 with num_beams"),
        ((*one, "--speculate", 2), "speculate: expected at most 1 (MTP layers), found 2"),
    ):
        refused = caption(*arguments)
        assert refused.returncode == 2 and line in refused.stderr, refused.stderr


def test_more_drafts_than_mtp_layers_are_refused_before_training(tmp_path: Path) -> None:
    module = Step37LitModule(preset="tiny", text=MTP_TEXT)
    trainer = pl.Trainer(strategy=MegatronStrategy(), **trainer_arguments(tmp_path))
    with pytest.raises(ConfigError, match=r"CaptionMetrics\.speculate: expected at most 1 \(MTP layers, text\.mtp\)"):
        CaptionMetrics(speculate=2).check(trainer, module)


def test_scenes_are_scored_by_all_their_paraphrases(tmp_path: Path) -> None:
    data = ScenesDataModule(num_steps=6, val_samples=8, samples_per_pack=4, microbatches=1)
    train(tmp_path, data, CaptionMetrics(max_samples=None, max_new_tokens=8))
    kept = read_jsonl(tmp_path / "captions" / "step_000006.jsonl")
    assert len(kept) == 8 and all(len(each["references"]) == 4 for each in kept)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        scores = [row["val/generated_attribute_accuracy"] for row in csv.DictReader(file)]
    assert all(0 <= float(score) < 0.5 for score in scores if score)


def test_a_sanity_check_generates_nothing(tmp_path: Path) -> None:
    data = ScenesDataModule(num_steps=6, val_samples=8, samples_per_pack=4, microbatches=1)
    (tmp_path / "captions").mkdir()
    for stale in ("step_000003.jsonl", "step_000900.jsonl"):
        (tmp_path / "captions" / stale).write_text("of an earlier run")
    train(tmp_path, data, CaptionMetrics(max_new_tokens=4), num_sanity_val_steps=1)
    files = sorted((tmp_path / "captions").glob("*.jsonl"))
    assert [file.name for file in files] == ["step_000003.jsonl", "step_000006.jsonl"]
    assert all(read_jsonl(file) for file in files)
    assert len(list((tmp_path / "captions").rglob("*.jpg"))) == 8  # each picture once


def test_attributes_of_free_captions() -> None:
    things = (
        Thing("ring", "red", "dotted", "small", "top left"),
        Thing("heart", "blue", "plain", "large", "bottom right"),
    )
    scene = Scene(things, "gray")
    for pieces in captions(scene):
        assert score_caption(scene, caption_text(pieces)) == (11, 11)
    text = "I see two shapes: top left a small dotted red ring, bottom right a large plain blue heart."
    for wrong, right in (
        (text.replace("two", "three"), 10),
        (text.replace("heart", "ring"), 10),
        (text.replace("blue", "blue red"), 10),
        (text.replace("bottom right", "bottom left"), 6),  # and one place too many: 6 of 12
        ("", 0),
    ):
        found = score_caption(scene, wrong)
        assert found[0] == right and found[1] == (12 if "bottom left" in wrong else 11)
    for index in range(50):
        drawn = draw_scene(0, "train", index, (1, 1, 1, 1))
        scores = [score_caption(drawn, caption_text(pieces)) for pieces in captions(drawn)]
        assert all(right == total for right, total in scores)


def test_a_pack_gives_its_samples_back(run: Path) -> None:
    data = ScenesDataModule(num_steps=2, val_samples=8, samples_per_pack=4, microbatches=1, pad_to=400)
    steps = data.train_dataloader().steps
    pack = steps[0].packs[0]
    again = PackedBatch.from_samples(pack.samples(), pad_to=400, pad_token=1)
    for name in ("input_ids", "labels", "loss_mask", "position_ids", "cu_seqlens"):
        assert torch.equal(getattr(again, name), getattr(pack, name)), name
    assert torch.equal(again.images[0].images, pack.images[0].images)
    assert again.sample_keys == pack.sample_keys


def test_the_public_name() -> None:
    assert step37_lit.Step37Captioner is Step37Captioner
