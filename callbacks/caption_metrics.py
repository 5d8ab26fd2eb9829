"""Captions of the validation split while training: generated, scored, kept."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from step37_lit.batch import PackedBatch, Sample
from step37_lit.errors import require
from step37_lit.evaluation import swap_images
from step37_lit.generation import Completion, Generator
from step37_lit.metrics import CIDErD, CocoBLEU, CocoROUGEL, DocumentFrequencies
from step37_lit.report.pictures import save_picture
from step37_lit.sampling import GenerationSettings
from step37_lit.text_file import written_whole

FOLDER = "captions"


@dataclass
class _Split:
    """What a validation showed of a split: references of every picture, prompts of those that are captioned."""

    references: dict[str, list[str]] = field(default_factory=dict)
    prompts: dict[str, Sample] = field(default_factory=dict)

    def add(self, sample: Sample, tokenizer: Any, limit: int | None) -> None:
        learnt = (sample.loss_mask > 0).tolist()
        first = learnt.index(True)
        last = learnt.index(False, first) if False in learnt[first:] else len(learnt)
        key = sample.key.partition("#")[0]  # texts of one picture differ behind the #
        reference = tokenizer.decode(sample.input_ids[first:last].tolist()).strip()
        self.references.setdefault(key, []).append(reference)
        if key not in self.prompts and (limit is None or len(self.prompts) < limit):
            ids = sample.input_ids[:first]
            shown = int(torch.isin(ids, torch.tensor([i.insert_start_token for i in sample.images])).sum())
            images = sample.images[:shown]
            self.prompts[key] = Sample(key, ids, torch.zeros(first), images)


class CaptionMetrics(pl.Callback):
    """Generates captions at each validation and logs `val/cider_d`, `val/bleu_1` to `val/bleu_4`, `val/rouge_l`,
    `val/caption_words` and, where the data module can tell (`score_caption`), `val/generated_attribute_accuracy`.

    A caption is the answer to a sample's first question. Its references are the data module's (`references`), or that
    answer in all samples of one picture (keys that differ behind `#`). Each validation's captions lie in
    `captions/step_N.jsonl`. Document frequencies of CIDEr-D are those of the whole split's references, so that scores
    of fewer pictures stay comparable.

    Args:
        max_samples: Pictures that are captioned, the first ones of the split; null for all.
        loader: Which of the validation loaders.
        max_new_tokens: Longest caption.
        num_beams: More than 1 for beam search.
        batch_size: Captions that are decoded together.
        speculate: Tokens that MTP layers draft ahead, see `GenerationSettings`; the captions stay the same.
    """

    def __init__(
        self,
        max_samples: int | None = 128,
        loader: int = 0,
        max_new_tokens: int = 96,
        num_beams: int = 1,
        batch_size: int = 32,
        speculate: int = 0,
    ):
        require(max_samples is None or max_samples > 0, "max_samples", "null or a positive number", max_samples)
        require(batch_size > 0, "batch_size", "a positive number", batch_size)
        self.max_samples, self.loader, self.batch_size = max_samples, loader, batch_size
        self.settings = GenerationSettings(max_new_tokens, num_beams=num_beams, speculate=speculate)
        self._frequencies: DocumentFrequencies | None = None
        self._split = _Split()

    @property
    def validation_metrics(self) -> list[str]:
        """What a validation logs for the first loader; others have their suffix behind it."""
        names = ("cider_d", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "caption_words")
        return [f"val/{name}" for name in (*names, "generated_attribute_accuracy")]

    def check(self, trainer: pl.Trainer, module: Any) -> None:
        """Raises `ConfigError` where captions cannot be generated while training."""
        context = trainer.strategy.layout.context
        require(context == 1, "strategy.context", "1 with CaptionMetrics (context ranks cannot generate)", context)
        layers, drafts = module.config.text.num_built_mtp_layers, self.settings.speculate
        require(drafts <= layers, "CaptionMetrics.speculate", f"at most {layers} (MTP layers, text.mtp)", drafts)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run in a used folder, or one that goes on from an earlier step, makes later captions anew."""
        if trainer.is_global_zero:
            for file in (Path(trainer.default_root_dir) / FOLDER).glob("step_*.jsonl"):
                if int(file.stem.split("_")[1]) > trainer.global_step:
                    file.unlink()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._split = _Split()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: list[PackedBatch],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking or dataloader_idx != self.loader:
            return
        ranks = pl_module.strategy.data_parallel_size
        limit = None if self.max_samples is None else -(-self.max_samples // ranks)
        tokenizer = trainer.datamodule.processor.tokenizer
        packs = [swap_images(pack) for pack in batch] if pl_module.swap_images else batch
        for pack in packs:
            for sample in pack.to("cpu").samples():
                if bool(sample.loss_mask.any()):
                    self._split.add(sample, tokenizer, limit)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        strategy = pl_module.strategy
        gathered = strategy.gather_from_data_ranks((self._split.references, list(self._split.prompts)))
        references: dict[str, list[str]] = {}
        owners: dict[str, int] = {}
        for rank, (found, keys) in enumerate(gathered):
            for key, texts in found.items():
                references.setdefault(key, []).extend(texts)
            for key in keys:
                owners.setdefault(key, rank)
        if not owners:
            return  # an empty split
        own = [p for key, p in self._split.prompts.items() if owners[key] == strategy.data_parallel_rank]
        if strategy.reads_data:
            save_pictures(Path(trainer.default_root_dir), own, pl_module.config.tokens.im_start)
        completions = self._generate(trainer, pl_module, own, most=max(Counter(owners.values()).values()))
        captions: dict[str, Completion] = {}
        for part in strategy.gather_from_data_ranks(completions):
            captions.update(part)
        self._split = _Split()
        self._report(trainer, pl_module, captions, references)

    def _generate(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, own: list[Sample], most: int
    ) -> dict[str, Completion]:
        """Completions of this rank's prompts by key; `most` is the largest number of prompts of a rank. The ranks go
        through their batches side by side, so that a signal ends it on all of them."""
        generator = Generator(pl_module.model, trainer.datamodule.processor.tokenizer, self.batch_size)
        completions: dict[str, Completion] = {}
        for first in range(0, most, self.batch_size):
            pl_module.strategy.progress.mark(f"captions behind step {trainer.global_step}")
            pl_module.strategy.end_here_if_asked()
            batch = own[first : first + self.batch_size]
            completions |= {each[0].key: each[0] for each in generator.generate(batch, self.settings)}
        return completions

    def _report(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        captions: dict[str, Completion],
        references: dict[str, list[str]],
    ) -> None:
        """Every rank has all captions and computes the same scores."""
        if hasattr(trainer.datamodule, "references"):
            references = {key: trainer.datamodule.references(key) for key in references}
        if self._frequencies is None:
            self._frequencies = DocumentFrequencies.from_references(list(references.values()))
        texts = [completion.text.strip() for completion in captions.values()]
        targets = [references[key] for key in captions]
        cider = CIDErD(document_frequencies=self._frequencies, sync_on_compute=False)
        bleu, rouge = CocoBLEU(sync_on_compute=False), CocoROUGEL(sync_on_compute=False)
        for metric in (cider, bleu, rouge):
            metric.update(texts, targets)
        values = {f"bleu_{n + 1}": float(score) for n, score in enumerate(bleu.compute())}
        values |= {"cider_d": float(cider.compute()), "rouge_l": float(rouge.compute())}
        values["caption_words"] = sum(len(text.split()) for text in texts) / len(texts)
        attributes = attribute_accuracy(trainer.datamodule, captions)
        if attributes is not None:
            values["generated_attribute_accuracy"] = attributes
        suffix = pl_module.eval_suffixes[self.loader]
        # The same on all ranks already; sync_dist says so to Lightning.
        pl_module.log_dict({f"val/{n}{suffix}": v for n, v in values.items()}, batch_size=1, sync_dist=True)
        if trainer.is_global_zero:
            scores = {"cider_d": cider.per_item()[1].tolist(), "rouge_l": rouge.per_item()[1].tolist()}
            rows = [
                {"key": key, "caption": text, "references": references[key]}
                | {name: column[i] for name, column in scores.items()}
                | {"logprob": completion.logprob, "finish": completion.finish}
                for i, ((key, completion), text) in enumerate(zip(captions.items(), texts, strict=True))
            ]
            file = Path(trainer.default_root_dir) / FOLDER / f"step_{trainer.global_step:06d}{suffix}.jsonl"
            write_captions(file, rows)


def save_pictures(folder: Path, prompts: list[Sample], im_start: int) -> None:
    """What the model sees of each picture, once, for the report's gallery."""
    for prompt in prompts:
        views = [view for entry in prompt.images if entry.insert_start_token == im_start for view in entry.images]
        for number, view in enumerate(views):
            save_picture(folder, prompt.key, view.permute(1, 2, 0).numpy(), number)


def attribute_accuracy(datamodule: Any, captions: dict[str, Completion]) -> float | None:
    """Share of the attribute words that generated captions get right; None where the data have no such words."""
    if not hasattr(datamodule, "score_caption"):
        return None
    scores = [datamodule.score_caption(key, completion.text) for key, completion in captions.items()]
    return sum(right for right, _ in scores) / sum(total for _, total in scores)


def write_captions(file: Path, rows: list[dict[str, Any]]) -> None:
    """JSONL; the file is whole or absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as staged:
        staged.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
