"""A model with MTP layers that has learnt something, for benchmarks whose speed depends on what is written.

Random weights never draft what they choose. Here the model of the benchmarks learns to describe rendered scenes, in the
words of `datamodules.scene_captions`, for a minute or two; the vision tower stays as it is, so that all it can know of
a picture is what its random features tell. Scenes of the split `unseen` are never trained on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from train_step import IMAGE_SIDE, reference_config

from datamodules.scene_captions import caption_text, captions
from datamodules.scene_rendering import render
from datamodules.scene_world import Split, draw_scene
from datamodules.scenes import tokenizer_texts
from step37_lit.batch import ImageForInsert, PackedBatch, Sample
from step37_lit.config import Step37Config
from step37_lit.hub.load import loadable_weights
from step37_lit.hub.names import name_table
from step37_lit.megatron.build import build_model
from step37_lit.model.step37_model import Step37Model
from step37_lit.tokenizer import Step37Tokenizer

MTP_LAYERS = 3
FIRST_WORD, FIRST_FILLER, LAST_FILLER = 20, 1000, 3900  # ids of the captions' words, and of words without a meaning
COUNTS = (0.0, 0.0, 0.5, 0.5)  # scenes of three and four things: answers of more than 100 tokens
SCENES, PACK = 64, 4  # that are learnt, and of a step
LEARNING_RATE, WARMUP = 1.5e-3, 20


class SceneTexts:
    """Samples of picture, filler and all four captions of a scene.

    Args:
        config: The model's.
    """

    def __init__(self, config: Step37Config):
        self.tokens, self.patches = config.tokens, config.vision.num_tokens(IMAGE_SIDE)
        self.tokenizer = Step37Tokenizer.train(list(tokenizer_texts()), 512)

    def sample(self, split: Split, index: int, longest: int) -> Sample:
        """The answer is what is learnt; up to `longest` words of filler stand in front of it."""
        scene = draw_scene(0, split, index, COUNTS)
        random = np.random.default_rng(index)
        ids, _ = self.tokenizer.encode(" ".join(caption_text(pieces) for pieces in captions(scene)))
        filler = random.integers(FIRST_FILLER, LAST_FILLER, random.integers(longest // 12, longest + 1)).tolist()
        picture = [self.tokens.im_start, *[self.tokens.im_patch] * self.patches, self.tokens.im_end]
        row = torch.tensor([*picture, *filler, *(FIRST_WORD + token for token in ids)])
        mask = torch.zeros(len(row))
        mask[-len(ids) :] = 1
        pixels = torch.tensor(np.asarray(render(scene, IMAGE_SIDE, random))).permute(2, 0, 1)[None]
        return Sample(str(index), row, mask, [ImageForInsert(self.tokens.im_start, pixels)])

    def prompts(self, number: int, split: Split) -> list[Sample]:
        """The first scenes of a split, with 16 to 200 words of filler."""
        samples = [self.sample(split, index, 200) for index in range(number)]
        lengths = [int(sample.loss_mask.argmax()) for sample in samples]
        return [Sample(s.key, s.input_ids[:n], torch.zeros(n), s.images) for s, n in zip(samples, lengths, strict=True)]


def train_into(folder: Path, dense: bool, width: int, steps: int) -> None:
    """Trains a model and writes it as a hub folder, which both sides of a benchmark can read."""
    reference_config(dense, width, MTP_LAYERS).save_pretrained(folder)
    config = Step37Config.from_hub(folder)
    config = replace(config, text=replace(config.text, mtp=True, init_std=width**-0.5))
    model = build_model(config, seed=0)
    _train(model, config, steps)
    weights = loadable_weights(model)
    tensors = {}
    for row in name_table(config):
        parts = row.conversion.to_hub(weights[str(row.ours)].detach(), [tensor.shape for tensor in row.hub])
        tensors |= {tensor.name: part.contiguous() for tensor, part in zip(row.hub, parts, strict=True)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _train(model: Step37Model, config: Step37Config, steps: int) -> None:
    model.freeze(freeze_vision_model=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1.0, (steps - step) / (0.3 * steps))
    )
    start, shown = time.perf_counter(), []
    for step, batch in zip(range(steps), _batches(model, SceneTexts(config)), strict=False):
        losses = model(**batch.model_inputs(), with_mtp=True).sum(dim=1) / batch.loss_mask.sum()
        optimizer.zero_grad()
        (losses[0] + 0.3 * losses[1:].mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        shown.append(losses.detach())
        if (step + 1) % 25 == 0:
            means = torch.stack(shown[-25:]).mean(dim=0).tolist()
            print(f"step {step + 1}, {time.perf_counter() - start:.0f} s: losses {[round(x, 3) for x in means]}")


def _batches(model: Step37Model, texts: SceneTexts) -> Iterator[PackedBatch]:
    """Packs of the scenes in another order each time; a picture's features are computed once."""
    samples: list[Sample] = []
    with torch.no_grad():
        for index in range(SCENES):
            sample = texts.sample("train", index, 40)
            samples.append(replace(sample, images=model._encode_images_for_insert(sample.images)))
    random = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(SCENES, generator=random).tolist()
        for first in range(0, SCENES, PACK):
            yield PackedBatch.from_samples([samples[index] for index in order[first : first + PACK]])
