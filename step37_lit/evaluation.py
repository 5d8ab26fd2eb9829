"""Sums of a teacher-forced evaluation: loss per token, and the share of attribute words that are right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from step37_lit.batch import ImageForInsert, PackedBatch


@dataclass
class EvaluationSums:
    """Adds up over packs and ranks; an average is taken once, over everything.

    Args:
        loss: Sum of the losses of all learnt tokens.
        tokens: Their number.
        words: For each kind of attribute, words that are right and words in all.
    """

    loss: float = 0.0
    tokens: float = 0.0
    words: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add_pack(self, pack: PackedBatch, losses: Tensor, predictions: Tensor) -> None:
        """Adds one pack's losses [1, T] and most likely next tokens [1, T]."""
        self.loss += float((losses.double() * pack.loss_mask).sum())
        self.tokens += float(pack.loss_mask.sum())
        # Wrong tokens before each position: a span is right where that number does not grow.
        wrong = torch.zeros(pack.labels.shape[1] + 1, dtype=torch.int64, device=pack.labels.device)
        wrong[1:] = (predictions[0] != pack.labels[0]).cumsum(0)
        for kind, spans in pack.attribute_spans.items():
            right = wrong[spans[:, 0]] == wrong[spans[:, 1]]
            self._add_words(kind, int(right.sum()), right.numel())

    def add(self, other: EvaluationSums) -> None:
        self.loss += other.loss
        self.tokens += other.tokens
        for kind, (right, total) in other.words.items():
            self._add_words(kind, right, total)

    @classmethod
    def total(cls, parts: Iterable[EvaluationSums]) -> EvaluationSums:
        """One sum of all `parts`."""
        whole = cls()
        for part in parts:
            whole.add(part)
        return whole

    def averages(self, prefix: str, suffix: str) -> dict[str, float]:
        """Values to log: loss per token, accuracy of all attribute words and of each kind."""
        values = {f"{prefix}/loss{suffix}": self.loss / self.tokens} if self.tokens else {}
        right = sum(right for right, _ in self.words.values())
        total = sum(total for _, total in self.words.values())
        if total:
            values[f"{prefix}/attribute_accuracy{suffix}"] = right / total
        for kind, (right, total) in sorted(self.words.items()):
            if total:
                values[f"{prefix}/attribute_accuracy{suffix}/{kind}"] = right / total
        return values

    def _add_words(self, kind: str, right: int, total: int) -> None:
        old_right, old_total = self.words.get(kind, (0, 0))
        self.words[kind] = (old_right + right, old_total + total)


def swap_images(pack: PackedBatch) -> PackedBatch:
    """The pack with every image replaced by the next one of its size and start token (the last by the first).

    What a model still gets right with another sample's picture it did not get from the picture.
    """
    return replace(pack, images=[_rolled(image) for image in pack.images])


def _rolled(image: ImageForInsert) -> ImageForInsert:
    def roll(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.roll(1, dims=0)

    return replace(image, images=roll(image.images), image_features=roll(image.image_features))
