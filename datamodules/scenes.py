"""The embedded data set: rendered scenes with captions, as a LightningDataModule that emits lists of packs.

Everything is a pure function of (seed, split, index): there are no files, and an epoch can be resumed at any step by
its number alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from PIL import Image

from datamodules.scene_captions import caption_text, captions, score_caption
from datamodules.scene_rendering import render
from datamodules.scene_world import Scene, Split, draw_scene, generator
from datamodules.steps import (
    EVERYTHING,
    DataShare,
    EvaluationLoader,
    Step,
    StepDataset,
    StepLoader,
    check_ranks,
    check_same,
    first_epoch,
)
from step37_lit.batch import PackedBatch, Sample
from step37_lit.config import Step37Config
from step37_lit.errors import require
from step37_lit.processor import Step37Processor
from step37_lit.tokenizer import Step37Tokenizer

PROMPTS = ("Describe the picture.", "What is where?")
TOKENIZER_SCENES = 500  # they hold every word of every caption many times
TOKENIZER_FILE = "tokenizer.json"
SHUFFLE_OFFSET = 7_654_321  # a scene far from every index in use


class SceneSamples:
    """Samples of one split by index.

    Args:
        processor: Turns messages and pictures into tokens.
        seed: Seed of the scenes.
        split: `train`, `seen` (new scenes of combinations that are trained on) or `unseen` (held-out combinations).
        count_weights: Relative frequency of 1, 2, 3 and 4 things in a scene.
        shuffled_images: Show each caption with the picture of another scene, which breaks the link between them.
    """

    def __init__(
        self,
        processor: Step37Processor,
        seed: int,
        split: Split,
        count_weights: tuple[float, ...],
        shuffled_images: bool = False,
    ):
        self.processor, self.seed, self.split = processor, seed, split
        self.count_weights, self.shuffled_images = count_weights, shuffled_images

    def identity(self) -> dict[str, Any]:
        """Everything but the processor that decides what sample `index` is."""
        weights = list(self.count_weights)
        return {
            "seed": self.seed,
            "split": self.split,
            "count_weights": weights,
            "shuffled_images": self.shuffled_images,
        }

    def messages(self, index: int) -> list[dict[str, Any]]:
        """A question about the picture and a caption as its answer; attribute words are parts of their own."""
        random = generator(self.seed, self.split, index, "words")
        paraphrases = captions(draw_scene(self.seed, self.split, index, self.count_weights))
        prompt = PROMPTS[random.integers(len(PROMPTS))]
        answer: list[dict[str, str]] = []
        for piece in paraphrases[random.integers(len(paraphrases))]:
            mark = {} if piece.attribute is None else {"attribute": piece.attribute}
            answer.append({"type": "text", "text": piece.text, **mark})
        question = [{"type": "image"}, {"type": "text", "text": prompt}]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def picture(self, index: int) -> Image.Image:
        """The picture that goes with `messages(index)`."""
        shown = index + SHUFFLE_OFFSET if self.shuffled_images else index
        scene = draw_scene(self.seed, self.split, shown, self.count_weights)
        side = self.processor.config.vision.image_size
        return render(scene, side, generator(self.seed, self.split, shown, "pixels"))

    def sample(self, index: int) -> Sample:
        return self.processor(self.messages(index), [self.picture(index)], key=f"{self.split}-{self.seed}-{index}")


class SceneSteps(StepDataset):
    """Global steps of one epoch: `microbatches` packs of `samples_per_pack` samples each, for every number of ranks.

    Args:
        samples: Where samples come from.
        steps: Numbers of the epoch's steps, counted over all epochs.
        microbatches: Packs of one global step over all ranks.
        samples_per_pack: Samples of one pack.
        pad_to: Length that every pack is padded to, or None.
        share: The packs of this process.
    """

    def __init__(
        self,
        samples: SceneSamples,
        steps: range,
        microbatches: int,
        samples_per_pack: int,
        pad_to: int | None = None,
        share: DataShare = EVERYTHING,
    ):
        self.samples, self.steps = samples, steps
        self.microbatches, self.samples_per_pack, self.pad_to = microbatches, samples_per_pack, pad_to
        self.share = share
        check_ranks(microbatches, self.share.ranks)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> Step:
        first = self.steps[step] * self.microbatches
        return Step([self._pack(first + number) for number in self.share.numbers(self.microbatches)])

    def _pack(self, number: int) -> PackedBatch:
        first = number * self.samples_per_pack
        samples = [self.samples.sample(index) for index in range(first, first + self.samples_per_pack)]
        return PackedBatch.from_samples(
            samples, pad_to=self.pad_to, pad_token=self.samples.processor.config.tokens.eos[0]
        )


@dataclass(frozen=True)
class SceneEpochs:
    """A `StepSource`: epoch e has the scenes behind those of epoch e - 1. Arguments as `SceneSteps`."""

    samples: SceneSamples
    num_steps: int
    microbatches: int
    samples_per_pack: int
    pad_to: int | None = None
    share: DataShare = EVERYTHING

    def epoch(self, number: int) -> SceneSteps:
        steps = range(number * self.num_steps, (number + 1) * self.num_steps)
        return SceneSteps(self.samples, steps, self.microbatches, self.samples_per_pack, self.pad_to, self.share)

    def position(self, epoch: int) -> dict[str, Any]:
        """What must be the same for a step number to mean the same samples."""
        names = ("num_steps", "microbatches", "samples_per_pack")
        return {name: getattr(self, name) for name in names} | self.samples.identity()

    def check_position(self, state: dict[str, Any]) -> None:
        check_same(state, self.position(state["epoch"]))


class ScenesDataModule(pl.LightningDataModule):
    """Rendered scenes of 1 to 4 shapes and their captions; `data:` section of a recipe.

    Args:
        preset: The model whose image size, tokens and vocabulary are used (see `Step37Config.preset`).
        hub: Folder of a hub checkpoint in place of `preset`.
        tokenizer: A `tokenizer.json`; null trains a byte-level BPE on the captions and saves it with the run.
        seed: Seed of the scenes.
        num_steps: Global steps of the training epoch.
        microbatches: Packs of one global step over all data-parallel ranks.
        samples_per_pack: Samples of one pack.
        val_samples: Scenes of each of the two validation sets.
        pad_to: Length that every pack is padded to; null leaves packs as long as their samples.
        count_weights: Relative frequency of 1, 2, 3 and 4 shapes in a scene.
        shuffled_images: Show each caption with another scene's picture (training and validation).
        num_workers: Processes that render; 0 renders in the training process.
    """

    def __init__(
        self,
        preset: str | None = "tiny",
        hub: str | None = None,
        tokenizer: str | None = None,
        seed: int = 0,
        num_steps: int = 1000,
        microbatches: int = 2,
        samples_per_pack: int = 16,
        val_samples: int = 512,
        pad_to: int | None = None,
        count_weights: tuple[float, float, float, float] = (0.5, 0.2, 0.15, 0.15),
        shuffled_images: bool = False,
        num_workers: int = 0,
    ):
        super().__init__()
        found = [value for value in (preset, hub) if value is not None]
        require(len(found) == 1, "data.preset, data.hub", "exactly one of them", found)
        for name, value in (
            ("num_steps", num_steps),
            ("microbatches", microbatches),
            ("samples_per_pack", samples_per_pack),
        ):
            require(value > 0, f"data.{name}", "a positive number", value)
        pack = microbatches * samples_per_pack
        require(
            val_samples > 0 and val_samples % pack == 0,
            "data.val_samples",
            f"a multiple of {pack} (a step)",
            val_samples,
        )
        require(
            min(count_weights) >= 0 < sum(count_weights), "data.count_weights", "0 or more, not all 0", count_weights
        )
        require(num_workers >= 0, "data.num_workers", "0 or more", num_workers)
        if tokenizer is not None:  # now, and not when a run has written its first files
            require(Path(tokenizer).is_file(), "data.tokenizer", "a file", tokenizer)
        self.config = Step37Config.preset(preset) if preset is not None else Step37Config.from_hub(str(hub))
        self.tokenizer_file, self.seed, self.num_steps = tokenizer, seed, num_steps
        self.microbatches, self.samples_per_pack, self.val_samples = microbatches, samples_per_pack, val_samples
        self.pad_to, self.count_weights, self.shuffled_images = pad_to, count_weights, shuffled_images
        self.num_workers = num_workers
        self._processor: Step37Processor | None = None

    @property
    def processor(self) -> Step37Processor:
        """Made on first use: trains the tokenizer where none was given."""
        if self._processor is None:
            self._processor = Step37Processor(self._tokenizer(), self.config)
        return self._processor

    def _tokenizer(self) -> Step37Tokenizer:
        if self.tokenizer_file is not None:
            return Step37Tokenizer.from_file(self.tokenizer_file)
        return Step37Tokenizer.train(tokenizer_texts(), self.config.text.vocab_size)

    def setup(self, stage: str) -> None:
        """Saves the tokenizer with the run, once."""
        processor = self.processor
        if self.trainer is not None and self.trainer.is_global_zero and stage == "fit":
            processor.tokenizer.save(Path(self.trainer.default_root_dir) / TOKENIZER_FILE)

    def samples(self, split: Split) -> SceneSamples:
        return SceneSamples(self.processor, self.seed, split, self.count_weights, self.shuffled_images)

    def check(self, ranks: int) -> None:
        """Raises `ConfigError` unless every one of `ranks` data-parallel ranks gets as many packs."""
        check_ranks(self.microbatches, ranks)

    @property
    def row_length(self) -> tuple[str, int | None]:
        """Field that sets the tokens of every pack, and their number; None where packs differ."""
        return "data.pad_to", self.pad_to

    def references(self, key: str) -> list[str]:
        """Every paraphrase of the caption of a sample."""
        return [caption_text(pieces) for pieces in captions(self._scene(key))]

    def score_caption(self, key: str, text: str) -> tuple[int, int]:
        """See `scene_captions.score_caption`."""
        return score_caption(self._scene(key), text)

    def _scene(self, key: str) -> Scene:
        split, seed, index = key.split("-")
        return draw_scene(int(seed), split, int(index), self.count_weights)  # type: ignore[arg-type]

    def epochs(self, split: Split, num_steps: int) -> SceneEpochs:
        """Epochs of `num_steps` global steps: this rank's share under a Trainer, everything without one."""
        sizes = (num_steps, self.microbatches, self.samples_per_pack, self.pad_to)
        return SceneEpochs(self.samples(split), *sizes, DataShare.of(self.trainer))

    def train_dataloader(self) -> StepLoader:
        return StepLoader(self.epochs("train", self.num_steps), self.num_workers, epoch=first_epoch(self.trainer))

    def val_dataloader(self) -> list[EvaluationLoader]:
        """Unseen combinations first (`val/attribute_accuracy`), then new scenes of seen ones (`..._seen`); the same
        scenes at each validation."""
        num_steps = self.val_samples // (self.microbatches * self.samples_per_pack)
        splits: tuple[Split, ...] = ("unseen", "seen")
        return [EvaluationLoader(self.epochs(split, num_steps).epoch(0), self.num_workers) for split in splits]

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


def tokenizer_texts() -> Iterator[str]:
    """Captions and prompts to train the tokenizer on; independent of a run's seed, so that runs share it."""
    yield from (*PROMPTS, "user\n", "assistant\n", "system\n")
    for index in range(TOKENIZER_SCENES):
        for pieces in captions(draw_scene(0, "train", index, (1, 1, 1, 1))):
            yield caption_text(pieces)
