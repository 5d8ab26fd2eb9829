"""`PackedDataModule`: indexed webdataset shards as a LightningDataModule that emits lists of packs.

An epoch is planned before it starts, so its length is exact, every data-parallel rank has as many steps as the others,
and a position in it is a few numbers that hold for any number of ranks and workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl

from datamodules.bad_samples import FILE_NAME, BadSampleLedger, BadSamplePolicy
from datamodules.epoch_plan import Mixture, Planner, evaluation_plan, samples_per_epoch
from datamodules.packed_steps import PackedEpochs, PackedSteps
from datamodules.packing import WINDOW
from datamodules.shard_sets import Reading, ShardSet, Split, TooLong, set_names
from datamodules.steps import EVERYTHING, DataShare, EvaluationLoader, StepLoader, check_ranks, first_epoch
from step37_lit.config import Step37Config
from step37_lit.errors import require
from step37_lit.images import DEFAULT_MAX_PIXELS
from step37_lit.processor import DEFAULT_PROMPT, Step37Processor
from step37_lit.tokenizer import Step37Tokenizer

TOKENIZER_FILE = "tokenizer.json"


@dataclass
class SetConfig:
    """One set of shards in a recipe.

    Args:
        path: Folder with the shards and the index that `python -m step37_lit index` made, or the index of shards that
            lie elsewhere.
        weight: Share of the epoch relative to the other sets; null for all sets sees every sample once an epoch.
        name: Short name in sample keys; null takes the folder's.
    """

    path: str
    weight: float | None = None
    name: str | None = None


class PackedDataModule(pl.LightningDataModule):
    """Image-text conversations and captions from webdataset shards; `data:` section of a recipe.

    Args:
        sets: A folder of indexed shards, or several with weights.
        val_sets: The same for validation; null takes `val_share` of `sets`.
        val_share: Share of the samples of `sets`, chosen by their keys, that validate and are not trained on.
        preset: The model whose image size, tokens and vocabulary are used (see `Step37Config.preset`).
        hub: Folder of a hub checkpoint in place of `preset`.
        tokenizer: A `tokenizer.json`; null takes the one beside the first set's index.
        chat_template: File of a Jinja template; null is the model's own format.
        prompt: Question that goes with a caption.
        multicrop: Large pictures also as crops at full resolution.
        resize: `fast` (torch, uint8) or `exact` (Pillow); they differ by at most 2 levels of 255.
        max_length: Tokens of a pack.
        window: Samples that are looked at to fill a pack.
        microbatches: Packs of one global step over all data-parallel ranks.
        mixture: Whether weights are shares of the samples or of the tokens.
        too_long: A text longer than a pack stops the run, is dropped, or loses its end (never a part of a picture).
        bad: A bad sample stops the run, or is skipped and listed in bad_samples.jsonl.
        max_bad_share: Share of an epoch's samples; with more bad ones a run stops also under `skip`.
        max_pixels: Largest picture, width x height.
        remote_schemes: URL schemes that may be read besides local files, such as `https` (through fsspec).
        seed: Of the order.
        num_workers: Processes that read and decode; 0 does it in the training process.
        prefetch: Steps that each worker makes ahead.
    """

    def __init__(
        self,
        sets: str | list[SetConfig],
        val_sets: str | list[SetConfig] | None = None,
        val_share: float = 0.0,
        preset: str | None = None,
        hub: str | None = None,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        prompt: str = DEFAULT_PROMPT,
        multicrop: bool = False,
        resize: Literal["fast", "exact"] = "fast",
        max_length: int = 4096,
        window: int = WINDOW,
        microbatches: int = 1,
        mixture: Mixture = "samples",
        too_long: TooLong = "raise",
        bad: BadSamplePolicy = "raise",
        max_bad_share: float = 0.01,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        remote_schemes: tuple[str, ...] = (),
        seed: int = 0,
        num_workers: int = 1,
        prefetch: int = 4,
    ):
        super().__init__()
        found = [value for value in (preset, hub) if value is not None]
        require(len(found) == 1, "data.preset, data.hub", "exactly one of them", found)
        for name, value in (("max_length", max_length), ("window", window), ("microbatches", microbatches)):
            require(value > 0, f"data.{name}", "a positive number", value)
        require(0 <= val_share < 1, "data.val_share", "in [0, 1)", val_share)
        require(val_sets is None or val_share == 0, "data.val_share", "0 where data.val_sets is given", val_share)
        require(0 <= max_bad_share <= 1, "data.max_bad_share", "in [0, 1]", max_bad_share)
        require(prefetch > 0, "data.prefetch", "a positive number", prefetch)
        require(num_workers >= 0, "data.num_workers", "0 or more", num_workers)
        self.train_configs, self.val_configs = _set_configs(sets), _set_configs(val_sets or [])
        require(len(self.train_configs) > 0, "data.sets", "at least one set", sets)
        self.config = Step37Config.preset(preset) if preset is not None else Step37Config.from_hub(str(hub))
        self.tokenizer_file, self.template_file, self.prompt = tokenizer, chat_template, prompt
        self.multicrop, self.resize, self.val_share = multicrop, resize, val_share
        self.max_length, self.window, self.microbatches, self.mixture = max_length, window, microbatches, mixture
        self.too_long, self.bad, self.max_bad_share, self.max_pixels = too_long, bad, max_bad_share, max_pixels
        self.remote_schemes, self.seed = tuple(remote_schemes), seed
        self.num_workers, self.prefetch = num_workers, prefetch
        self._processor: Step37Processor | None = None
        self._sets: dict[str, list[ShardSet]] = {}
        self._planner: Planner | None = None

    @property
    def processor(self) -> Step37Processor:
        """Made on first use. Raises `ConfigError` where the tokenizer or the template cannot be used."""
        if self._processor is None:
            template = None
            if self.template_file is not None:
                require(Path(self.template_file).is_file(), "data.chat_template", "a file", self.template_file)
                template = Path(self.template_file).read_text(encoding="utf-8")
            tokenizer = Step37Tokenizer.from_file(self.tokenizer_path)
            self._processor = Step37Processor(tokenizer, self.config, template, self.multicrop, self.resize)
        return self._processor

    @property
    def tokenizer_path(self) -> Path:
        """The file that is named, or the one beside the first set's index."""
        if self.tokenizer_file is not None:
            return Path(self.tokenizer_file)
        first = Path(self.train_configs[0].path)
        return (first.parent if first.is_file() else first) / TOKENIZER_FILE

    def check(self, ranks: int) -> None:
        """Refuses what cannot be trained on, before anything is written.

        Args:
            ranks: Data-parallel ranks.

        Raises:
            ConfigError: an index is missing or stale, a set is empty, a text too long, packs do not go round.
        """
        check_ranks(self.microbatches, ranks)
        self.planner.plan(0)
        if self.has_validation:
            samples_per_epoch([shards.planned("val", self.val_share) for shards in self.sets("val")], "samples")
        for split in ("train", "val"):
            self._check_known_bad(split)

    @property
    def row_length(self) -> tuple[str, int]:
        """Field that sets the tokens of every pack, and their number."""
        return "data.max_length", self.max_length

    @property
    def has_validation(self) -> bool:
        return bool(self.val_configs) or self.val_share > 0

    def sets(self, split: Split) -> list[ShardSet]:
        """The sets of a split, opened once."""
        kind = "val" if split == "val" and self.val_configs else "train"
        if kind not in self._sets:
            configs = self.val_configs if kind == "val" else self.train_configs
            names = set_names([c.path for c in configs], [c.name for c in configs])
            reading = Reading(
                self.processor, self.prompt, self.max_length, self.too_long, self.max_pixels, self.remote_schemes
            )
            pairs = zip(configs, names, strict=True)
            self._sets[kind] = [ShardSet(config.path, name, reading, config.weight) for config, name in pairs]
        return self._sets[kind]

    @property
    def planner(self) -> Planner:
        """Plans the training epochs."""
        if self._planner is None:
            sets = [shards.planned("train", self.val_share) for shards in self.sets("train")]
            self._planner = Planner(sets, self.seed, self.max_length, self.window, self.microbatches, self.mixture)
        return self._planner

    def _check_known_bad(self, split: Split) -> None:
        for shards in self.sets(split):
            records = list(shards.known_bad())
            allowed = self.max_bad_share * len(shards.index) if self.bad == "skip" else 0
            advice = f"at most {self.max_bad_share:g} of its samples bad" if self.bad == "skip" else "no bad sample"
            found = f"{len(records)} of {len(shards.index)}, the first: {records[0]}" if records else 0
            require(len(records) <= allowed, f"data.sets: {shards.name}", f"{advice} (data.bad: {self.bad})", found)

    # ---- hooks of Lightning ----

    def setup(self, stage: str) -> None:
        """Saves the tokenizer with the run and lists the bad samples that the index knows."""
        trainer = self.trainer
        if trainer is None or stage != "fit":
            return
        every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        advice = "1 (epochs of packs differ in length)"
        require(every == 1 or trainer.max_epochs == 1, "trainer.reload_dataloaders_every_n_epochs", advice, every)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            self.processor.tokenizer.save(folder / TOKENIZER_FILE)
            if trainer.ckpt_path is None:  # a new run in a used folder
                (folder / FILE_NAME).unlink(missing_ok=True)
            ledger = self._ledger(EVERYTHING)
            for shards in {id(s): s for split in ("train", "val") for s in self.sets(split)}.values():
                ledger.note(list(shards.known_bad()))

    def train_dataloader(self) -> StepLoader:
        share = DataShare.of(self.trainer)
        source = PackedEpochs(self.planner, self.sets("train"), share)
        return StepLoader(source, self.num_workers, self.prefetch, first_epoch(self.trainer), self._ledger(share))

    def val_dataloader(self) -> list[EvaluationLoader]:
        """Every text of every sample of the validation split once."""
        if not self.has_validation:
            return []
        share, sets = DataShare.of(self.trainer), self.sets("val")
        planned = [shards.planned("val", self.val_share) for shards in sets]
        plan = evaluation_plan(planned, self.max_length, self.window, self.microbatches)
        steps = PackedSteps(plan, sets, self.max_length, share)
        return [EvaluationLoader(steps, self.num_workers, self.prefetch, self._ledger(share))]

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def _ledger(self, share: DataShare) -> BadSampleLedger:
        folder = None if self.trainer is None else Path(self.trainer.default_root_dir)
        return BadSampleLedger(self.bad, self.max_bad_share, folder, share.rank)


def _set_configs(sets: str | list[SetConfig]) -> list[SetConfig]:
    return [SetConfig(sets)] if isinstance(sets, str) else list(sets)
