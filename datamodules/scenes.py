"""The embedded data set: rendered scenes with captions, as a LightningDataModule that emits lists of packs.

Everything is a pure function of (seed, split, index): there are no files, and an epoch can be resumed at any step by
its number alone. Item s of a loader is global step s; it holds this data-parallel rank's microbatches of that step.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from datamodules.scene_captions import caption_text, captions
from datamodules.scene_rendering import render
from datamodules.scene_world import Split, draw_scene, generator
from step37_lit.batch import PackedBatch, Sample
from step37_lit.config import Step37Config, require
from step37_lit.processor import Step37Processor
from step37_lit.tokenizer import Step37Tokenizer

PROMPTS = ("Describe the picture.", "What is where?")
TOKENIZER_SCENES = 500  # they hold every word of every caption many times
PREFETCHED_STEPS = 4  # by each worker
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


class StepDataset(Dataset):
    """Item s: the microbatches of global step s that belong to one data-parallel rank.

    The global step has `microbatches` packs of `samples_per_pack` samples, the same for every number of ranks. Rank r
    of d has packs r, r + d, ...

    Args:
        samples: Where samples come from.
        num_steps: Global steps.
        microbatches: Packs of one global step over all ranks.
        samples_per_pack: Samples of one pack.
        pad_to: Length that every pack is padded to, or None.
        rank: This data-parallel rank.
        ranks: Number of data-parallel ranks; must divide `microbatches`.
    """

    def __init__(
        self,
        samples: SceneSamples,
        num_steps: int,
        microbatches: int,
        samples_per_pack: int,
        pad_to: int | None = None,
        rank: int = 0,
        ranks: int = 1,
    ):
        require(
            microbatches % ranks == 0, "data.microbatches", f"a multiple of {ranks} data-parallel ranks", microbatches
        )
        self.samples, self.num_steps, self.microbatches = samples, num_steps, microbatches
        self.samples_per_pack, self.pad_to, self.rank, self.ranks = samples_per_pack, pad_to, rank, ranks

    def __len__(self) -> int:
        return self.num_steps

    def identity(self) -> dict[str, Any]:
        """What must be the same for a step number to mean the same samples; ranks and workers may change."""
        names = ("num_steps", "microbatches", "samples_per_pack")
        return {name: getattr(self, name) for name in names} | self.samples.identity()

    def __getitem__(self, step: int) -> list[PackedBatch]:
        return [self._pack(step * self.microbatches + m) for m in range(self.rank, self.microbatches, self.ranks)]

    def _pack(self, number: int) -> PackedBatch:
        first = number * self.samples_per_pack
        samples = [self.samples.sample(index) for index in range(first, first + self.samples_per_pack)]
        return PackedBatch.from_samples(
            samples, pad_to=self.pad_to, pad_token=self.samples.processor.config.tokens.eos[0]
        )


def steps_in_order(dataset: StepDataset, steps: range, num_workers: int) -> DataLoader:
    """The items `steps` of a data set, made by `num_workers` processes (0: by this one)."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        prefetch_factor=PREFETCHED_STEPS if num_workers else None,
        generator=torch.Generator(),  # so that a loader draws nothing from the global random numbers
    )


class StepLoader:
    """Yields the items of a `StepDataset` in order, epoch after epoch, and knows its position.

    Lightning saves and loads the state of a loader that has `state_dict` and `load_state_dict`. It is not a subclass of
    DataLoader, so that Lightning leaves the order alone.

    Args:
        dataset: Its length is that of an epoch; epoch e has the items from e x length on.
        num_workers: Processes that make items; 0 makes them in this process.
    """

    def __init__(self, dataset: StepDataset, num_workers: int = 0):
        self.dataset, self.num_workers = dataset, num_workers
        self.epoch, self.position = 0, 0  # of the next item

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        first = self.epoch * len(self)
        for item in steps_in_order(self.dataset, range(first + self.position, first + len(self)), self.num_workers):
            # Moved on before the item is handed out: who takes the last one need not ask for another.
            self.position += 1
            if self.position == len(self):
                self.epoch, self.position = self.epoch + 1, 0
            yield item

    def state_dict(self) -> dict[str, Any]:
        """A few numbers, the same on every rank."""
        return {"epoch": self.epoch, "position": self.position, **self.dataset.identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues behind the saved step. Raises `ConfigError` for another data set than the saved one."""
        for name, value in self.dataset.identity().items():
            require(state_dict[name] == value, f"data.{name}", f"{state_dict[name]} (in the checkpoint)", value)
        self.epoch, self.position = state_dict["epoch"], state_dict["position"]


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

    def dataset(self, split: Split, num_steps: int) -> StepDataset:
        """`num_steps` global steps of a split: this rank's share under a Trainer, everything without one."""
        rank, ranks = 0, 1
        if self.trainer is not None:
            share = self.trainer.strategy.distributed_sampler_kwargs  # type: ignore[attr-defined]
            rank, ranks = share["rank"], share["num_replicas"]
        return StepDataset(
            self.samples(split), num_steps, self.microbatches, self.samples_per_pack, self.pad_to, rank, ranks
        )

    def train_dataloader(self) -> StepLoader:
        return StepLoader(self.dataset("train", self.num_steps), self.num_workers)

    def val_dataloader(self) -> list[DataLoader]:
        """Unseen combinations first (`val/attribute_accuracy`), then new scenes of seen ones (`..._seen`); the same
        scenes at each validation."""
        steps = range(self.val_samples // (self.microbatches * self.samples_per_pack))
        return [
            steps_in_order(self.dataset(split, len(steps)), steps, self.num_workers) for split in ("unseen", "seen")
        ]

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


def tokenizer_texts() -> Iterator[str]:
    """Captions and prompts to train the tokenizer on; independent of a run's seed, so that runs share it."""
    yield from (*PROMPTS, "user\n", "assistant\n", "system\n")
    for index in range(TOKENIZER_SCENES):
        for pieces in captions(draw_scene(0, "train", index, (1, 1, 1, 1))):
            yield caption_text(pieces)
