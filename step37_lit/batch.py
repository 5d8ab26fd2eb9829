"""`PackedBatch`: the one contract between data and model.

A pack is one row of T tokens made of whole samples; `cu_seqlens` tells them apart. Shapes below use

    T = tokens of the pack, n = sub-sequences, N = images, H, W = sides of an image in pixels, P = features of an image,
    D = channels of a feature, k = words of a kind of attribute.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from step37_lit.config import TokenIds
from step37_lit.errors import require


@dataclass
class ImageForInsert:
    """Images of one size whose features go in behind one kind of start token.

    The images of a pack are consumed in order: the k-th occurrence of a start token in `input_ids` gets the k-th image
    among all `ImageForInsert` with that `insert_start_token`.

    Args:
        insert_start_token: Id of `<im_start>`, or of `<patch_start>` for multicrop patches.
        images: [N, 3, H, W]; uint8 pixels, or float that is normalised already. None where only features are kept.
        image_features: [N, P, D], set once the vision tower has run.
        rope_cu_seqlens: [N + 1] int32, borders of the images for a vision tower that packs them, or None.
        rope_max_seq_len: Longest image in patches that goes with `rope_cu_seqlens`, or None.
    """

    insert_start_token: int
    images: Tensor | None
    image_features: Tensor | None = None
    rope_cu_seqlens: Tensor | None = None
    rope_max_seq_len: int | None = None

    @property
    def num_images(self) -> int:
        """N. Raises `ConfigError` where neither pixels nor features are there."""
        held = self.images if self.images is not None else self.image_features
        require(held is not None, "images", "pixels or features", None)
        assert held is not None
        return held.shape[0]

    def to(self, device: torch.device | str) -> ImageForInsert:
        """A copy with every tensor on `device`."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            images=move(self.images),
            image_features=move(self.image_features),
            rope_cu_seqlens=move(self.rope_cu_seqlens),
        )

    def joins(self, other: ImageForInsert) -> bool:
        """Whether `other` can follow in the same tensor: same start token, dtype and size, nothing encoded yet."""
        if self.insert_start_token != other.insert_start_token or self.images is None or other.images is None:
            return False
        extras = (self.image_features, self.rope_cu_seqlens, other.image_features, other.rope_cu_seqlens)
        same = self.images.shape[1:] == other.images.shape[1:] and self.images.dtype == other.images.dtype
        return same and all(extra is None for extra in extras)


@dataclass
class Sample:
    """One conversation as tokens, before it is packed.

    Args:
        key: Names the sample within its data set.
        input_ids: [n] int64.
        loss_mask: [n] float32, 1 where this token is learnt (assistant turns with their end-of-turn token).
        images: Images in the order of their start tokens.
        attribute_spans: For each kind of attribute, [k, 2] int64: first token and one past the last token of every
            word of that kind. Used to measure how many words are right; has no part in training.
    """

    key: str
    input_ids: Tensor
    loss_mask: Tensor
    images: list[ImageForInsert] = field(default_factory=list)
    attribute_spans: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.input_ids.numel()

    def truncated(self, max_length: int, tokens: TokenIds) -> Sample:
        """The first `max_length` tokens; only text is cut off.

        Args:
            max_length: Tokens to keep.
            tokens: The model's special tokens.

        Raises:
            ConfigError: an image would be cut off, or nothing to learn would be left.
        """
        if len(self) <= max_length:
            return self
        of_images = torch.isin(self.input_ids, torch.tensor(tokens.of_pictures)).nonzero()
        last = int(of_images[-1]) + 1 if len(of_images) else 0
        require(last <= max_length, "max_length", f"at least the {last} tokens through the last image", max_length)
        mask = self.loss_mask[:max_length]
        require(bool(mask.any()), "max_length", "more tokens than those in front of the answer", max_length)
        spans = {kind: words[words[:, 1] <= max_length] for kind, words in self.attribute_spans.items()}
        return replace(self, input_ids=self.input_ids[:max_length], loss_mask=mask, attribute_spans=spans)


@dataclass
class PackedBatch:
    """One row of T tokens made of whole samples.

    Args:
        input_ids: [1, T] int64.
        labels: [1, T] int64, the next token within the same sample; 0 behind its last token.
        loss_mask: [1, T] float32, 1 where `labels` is learnt; 0 at the last position of every sample and on padding.
        position_ids: [1, T] int64, restart at 0 in each sub-sequence.
        cu_seqlens: [n + 1] int32, borders of the sub-sequences, from 0 to T; a padded tail is one of its own.
        max_seqlen: Longest sub-sequence, padding included.
        images: In the order of their start tokens; neighbours of one size share a tensor.
        sample_keys: Keys of the samples, in order. The padded tail has none.
        attribute_spans: For each kind of attribute, [k, 2] int64: first and one past the last position whose
            prediction (`labels`, argmax of the logits) spells a word of that kind.
    """

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    images: list[ImageForInsert] = field(default_factory=list)
    sample_keys: tuple[str, ...] = ()
    attribute_spans: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_samples(cls, samples: Sequence[Sample], pad_to: int | None = None, pad_token: int = 0) -> PackedBatch:
        """Packs whole samples into one row, in their order.

        Args:
            samples: At least one.
            pad_to: Length of the row; the tail behind the samples becomes a sub-sequence without loss.
            pad_token: Token of the tail.

        Raises:
            ConfigError: no samples, an empty sample, masks of another length, or more tokens than `pad_to`.
        """
        require(len(samples) > 0, "samples", "at least one", len(samples))
        for sample in samples:
            require(len(sample) > 0, f"sample {sample.key}: input_ids", "at least one token", 0)
            found = tuple(sample.loss_mask.shape)
            require(found == (len(sample),), f"sample {sample.key}: loss_mask", f"shape ({len(sample)},)", found)
        total = sum(len(sample) for sample in samples)
        padding = 0 if pad_to is None else pad_to - total
        require(padding >= 0, "pad_to", f"at least the {total} tokens of the samples", pad_to)

        lengths = [len(sample) for sample in samples] + [padding] * (padding > 0)
        return cls(
            input_ids=_row([sample.input_ids for sample in samples], padding, pad_token),
            labels=_row([_next(sample.input_ids) for sample in samples], padding, 0),
            loss_mask=_row([_next(sample.loss_mask) for sample in samples], padding, 0),
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            max_seqlen=max(lengths),
            images=_joined(image for sample in samples for image in sample.images),
            sample_keys=tuple(sample.key for sample in samples),
            attribute_spans=_shifted_spans(samples),
        )

    @classmethod
    def padding(cls, length: int, pad_token: int = 0) -> PackedBatch:
        """A row without samples: one sub-sequence of `length` tokens that has no loss."""
        require(length > 0, "length", "a positive number", length)
        return cls(
            input_ids=torch.full((1, length), pad_token),
            labels=torch.zeros(1, length, dtype=torch.int64),
            loss_mask=torch.zeros(1, length),
            position_ids=torch.arange(length)[None],
            cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
            max_seqlen=length,
        )

    def samples(self) -> list[Sample]:
        """The samples that the pack was made of, with views of its tensors; without their attribute spans."""
        ids, learnt = self.input_ids[0], self.loss_mask[0]
        images = {token: _single_images(self.images, token) for token in {i.insert_start_token for i in self.images}}
        samples = []
        borders = itertools.pairwise(self.cu_seqlens.tolist())
        for key, (start, end) in zip(self.sample_keys, borders, strict=False):  # the padded tail has no key
            own = ids[start:end]
            mask = torch.cat([learnt.new_zeros(1), learnt[start : end - 1]])
            starts = [token for token in own.tolist() if token in images]
            samples.append(Sample(key, own, mask, [next(images[token]) for token in starts]))
        return samples

    @property
    def num_tokens(self) -> int:
        """Tokens of the samples, without the padded tail."""
        return int(self.cu_seqlens[len(self.sample_keys)])

    @property
    def num_images(self) -> int:
        """Images of all start tokens."""
        return sum(image.num_images for image in self.images)

    def model_inputs(self, labels: bool = True) -> dict[str, Any]:
        """Arguments of `Step37Model.forward`; without `labels` the model returns logits."""
        inputs: dict[str, Any] = {
            "input_ids": self.input_ids,
            "images": self.images,
            "cu_seqlens": self.cu_seqlens,
            "position_ids": self.position_ids,
            "max_seq_len": self.max_seqlen,
        }
        if labels:
            inputs |= {"labels": self.labels, "loss_mask": self.loss_mask}
        return inputs

    def to(self, device: torch.device | str) -> PackedBatch:
        """A copy with every tensor on `device`."""
        tensors = ("input_ids", "labels", "loss_mask", "position_ids", "cu_seqlens")
        moved: dict[str, Any] = {name: getattr(self, name).to(device, non_blocking=True) for name in tensors}
        spans = {kind: span.to(device, non_blocking=True) for kind, span in self.attribute_spans.items()}
        return replace(self, **moved, images=[image.to(device) for image in self.images], attribute_spans=spans)

    def validate(self, tokens: TokenIds) -> None:
        """Checks the whole contract; meant for tests and for data that comes from outside.

        Raises:
            ConfigError: names the field, what was expected and what was found.
        """
        self._check_tensors()
        self._check_borders()
        self._check_images(tokens)

    def _check_tensors(self) -> None:
        length = self.input_ids.shape[-1]
        dtypes = {
            "input_ids": torch.int64,
            "labels": torch.int64,
            "loss_mask": torch.float32,
            "position_ids": torch.int64,
        }
        for name, dtype in dtypes.items():
            tensor = getattr(self, name)
            require(tuple(tensor.shape) == (1, length), name, f"shape (1, {length})", tuple(tensor.shape))
            require(tensor.dtype == dtype, name, dtype, tensor.dtype)
        require(self.cu_seqlens.dtype == torch.int32, "cu_seqlens", torch.int32, self.cu_seqlens.dtype)
        require(self.cu_seqlens.dim() == 1, "cu_seqlens", "one dimension", tuple(self.cu_seqlens.shape))

    def _check_borders(self) -> None:
        borders, length = self.cu_seqlens.tolist(), self.input_ids.shape[1]
        require(len(borders) >= 2 and borders[0] == 0, "cu_seqlens", "a start at 0 and an end", borders[:2])
        require(borders[-1] == length, "cu_seqlens[-1]", f"{length} (tokens of the pack)", borders[-1])
        lengths = self.cu_seqlens.diff()
        require(bool((lengths > 0).all()), "cu_seqlens", "ascending borders", borders)
        require(self.max_seqlen == int(lengths.max()), "max_seqlen", int(lengths.max()), self.max_seqlen)
        count = len(self.sample_keys)
        require(count <= len(lengths) <= count + 1, "sample_keys", f"{len(lengths)} or one less (padding)", count)
        starts = self.cu_seqlens[:-1].long().repeat_interleave(lengths.long())
        expected = torch.arange(length, device=starts.device) - starts
        wrong = (self.position_ids[0] != expected).nonzero()
        if len(wrong):
            at = int(wrong[0])
            require(False, f"position_ids[0, {at}]", int(expected[at]), int(self.position_ids[0, at]))
        crossing = self.loss_mask[0, self.cu_seqlens[1:].long() - 1].nonzero()
        if len(crossing):
            at = borders[int(crossing[0]) + 1] - 1
            require(False, f"loss_mask[0, {at}]", "0 (the label would cross a border)", float(self.loss_mask[0, at]))

    def _check_images(self, tokens: TokenIds) -> None:
        for name in ("im_start", "patch_start"):
            token = getattr(tokens, name)
            held = sum(image.num_images for image in self.images if image.insert_start_token == token)
            found = int((self.input_ids == token).sum())
            require(held == found, f"images of <{name}>", f"{found} (tokens <{name}> in input_ids)", held)
        for i, image in enumerate(self.images):
            known = image.insert_start_token in (tokens.im_start, tokens.patch_start)
            expected = f"{tokens.im_start} (<im_start>) or {tokens.patch_start} (<patch_start>)"
            require(known, f"images[{i}].insert_start_token", expected, image.insert_start_token)
            if image.images is not None:
                shape = tuple(image.images.shape)
                require(len(shape) == 4 and shape[1] == 3, f"images[{i}].images", "shape (N, 3, H, W)", shape)


def _single_images(entries: Sequence[ImageForInsert], token: int) -> Iterator[ImageForInsert]:
    """The images of one start token one by one, in their order."""
    for entry in entries:
        if entry.insert_start_token == token:
            for i in range(entry.num_images):
                pixels, features = (
                    None if held is None else held[i : i + 1] for held in (entry.images, entry.image_features)
                )
                yield ImageForInsert(token, pixels, features)


def _next(tensor: Tensor) -> Tensor:
    """Values of the following tokens, 0 behind the last: [n] -> [n]."""
    return torch.cat([tensor[1:], tensor.new_zeros(1)])


def _row(parts: list[Tensor], padding: int, value: int) -> Tensor:
    return torch.cat([*parts, parts[0].new_full((padding,), value)])[None]


def _joined(images: Iterator[ImageForInsert]) -> list[ImageForInsert]:
    """Neighbours of one start token and size in one tensor, so that the vision tower runs once for them.

    Only the order within a start token has a meaning, and it is kept.
    """
    runs: list[list[ImageForInsert]] = []
    latest: dict[int, list[ImageForInsert]] = {}
    for image in images:
        run = latest.get(image.insert_start_token)
        if run is not None and run[-1].joins(image):
            run.append(image)
        else:
            latest[image.insert_start_token] = run = [image]
            runs.append(run)
    return [run[0] if len(run) == 1 else _concatenated(run) for run in runs]


def _concatenated(run: list[ImageForInsert]) -> ImageForInsert:
    pixels = [image.images for image in run if image.images is not None]
    return ImageForInsert(run[0].insert_start_token, torch.cat(pixels))


def _shifted_spans(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Spans of the predicting positions in pack coordinates: token t is predicted at t - 1."""
    spans: dict[str, list[Tensor]] = {}
    start = 0
    for sample in samples:
        for kind, words in sample.attribute_spans.items():
            inside = bool(((words >= 1) & (words <= len(sample))).all())
            require(inside, f"sample {sample.key}: attribute_spans[{kind}]", f"in 1..{len(sample)}", words.tolist())
            spans.setdefault(kind, []).append(words + (start - 1))
        start += len(sample)
    return {kind: torch.cat(words) for kind, words in spans.items()}
