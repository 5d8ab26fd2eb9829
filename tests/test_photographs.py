"""Real photographs: the tiny model, its processor and the strategy overfit 32 of them. Slow."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning.pytorch as pl
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from step37_lit import MegatronStrategy, PackedBatch, Sample, Step37Config, Step37LitModule
from step37_lit.processor import Step37Processor
from step37_lit.tokenizer import Step37Tokenizer

PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "flickr8k-mini"
NUMBER = 32
LIMIT = 0.5  # nats per token; measured 0.003 after 60 epochs


@pytest.fixture(scope="module")
def captioned() -> list[tuple[Path, str]]:
    """The first photographs with the first caption of each."""
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"the photographs are not at {PHOTOGRAPHS}")
    captions: dict[str, str] = {}
    with (PHOTOGRAPHS / "captions.txt").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], row["caption"].strip())
    return [(PHOTOGRAPHS / "images" / name, caption) for name, caption in list(captions.items())[:NUMBER]]


def samples_of(captioned: list[tuple[Path, str]]) -> list[Sample]:
    tokenizer = Step37Tokenizer.train((caption for _, caption in captioned), vocab_size=512)
    processor = Step37Processor(tokenizer, Step37Config.preset("tiny"))
    samples = []
    for path, caption in captioned:
        messages = [
            {"role": "user", "content": [{"type": "image"}]},
            {"role": "assistant", "content": caption},
        ]
        with Image.open(path) as photograph:
            samples.append(processor(messages, [photograph.convert("RGB")], key=path.name))
    return samples


@pytest.mark.slow
def test_overfits_photographs(captioned: list[tuple[Path, str]], tmp_path: Path, one_rank: None) -> None:
    samples = samples_of(captioned)
    assert len(samples) == NUMBER and all(sample.loss_mask.sum() > 5 for sample in samples)
    packs = [PackedBatch.from_samples(samples[i : i + 16]) for i in range(0, NUMBER, 16)]
    steps = [packs[:1], packs[1:]]
    trainer = pl.Trainer(
        strategy=MegatronStrategy(),
        accelerator="cpu",
        devices=1,
        max_epochs=60,
        max_steps=60 * len(steps),
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
    )
    module = Step37LitModule(preset="tiny", lr=2e-3, warmup_steps=10, weight_decay=0.0)
    trainer.fit(module, DataLoader(steps, batch_size=None), DataLoader([packs], batch_size=None))
    assert trainer.global_step == 60 * len(steps)
    loss = float(trainer.callback_metrics["val/loss"])
    print(f"loss on the {NUMBER} photographs: {loss:.3f} nats per token")
    assert loss < LIMIT
