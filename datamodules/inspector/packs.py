"""Packs as the inspector shows them: spans of positions for the bars, and samples with the pictures a model sees."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from step37_lit.batch import PackedBatch
from step37_lit.config import TokenIds
from step37_lit.processor import Step37Processor

Kind = Literal["image", "text", "loss", "padding"]
PieceKind = Literal["image", "special", "text"]
KINDS: tuple[Kind, ...] = ("image", "text", "loss", "padding")
THUMBNAIL_SIDE = 160  # pixels at most
TEXT_LIMIT = 600  # characters of a sample that are shown; the others are counted


@dataclass(frozen=True)
class Span:
    """Neighbouring positions of one kind; `loss` is text whose next token is learnt."""

    kind: Kind
    start: int
    length: int


@dataclass(frozen=True)
class PackedSample:
    """A sample in a pack.

    Args:
        key: The sample's key.
        start: Its first position in the pack.
        spans: Its positions in order; starts are those in the pack.
    """

    key: str
    start: int
    spans: tuple[Span, ...]

    @property
    def length(self) -> int:
        """Tokens."""
        return self.count("image") + self.count("text") + self.count("loss")

    def count(self, kind: Kind) -> int:
        """Positions of one kind."""
        return sum(span.length for span in self.spans if span.kind == kind)


@dataclass(frozen=True)
class InspectedPack:
    """A pack.

    Args:
        number: In its epoch, from 0.
        length: Positions, padding included.
        samples: In their order.
    """

    number: int
    length: int
    samples: tuple[PackedSample, ...]

    @property
    def tokens(self) -> int:
        """Positions that are not padding."""
        return sum(sample.length for sample in self.samples)

    def count(self, kind: Kind) -> int:
        """Positions of one kind."""
        if kind == "padding":
            return self.length - self.tokens
        return sum(sample.count(kind) for sample in self.samples)


@dataclass(frozen=True)
class Piece:
    """A stretch of a sample's tokens, as text; for pictures, what stands for them."""

    kind: PieceKind
    learnt: bool
    text: str


@dataclass(frozen=True)
class Card:
    """A sample with its pictures and its text.

    Args:
        key: The sample's key.
        pack: Number of its pack.
        length: Tokens.
        pictures: Global views as JPEG `data:` URIs.
        hidden_pictures: Global views that are not among them.
        patches: Local patches of multicrop, over all pictures.
        pieces: The text.
        hidden_characters: Characters of the text behind `pieces`.
    """

    key: str
    pack: int
    length: int
    pictures: tuple[str, ...]
    hidden_pictures: int
    patches: int
    pieces: tuple[Piece, ...]
    hidden_characters: int


def inspect_pack(pack: PackedBatch, number: int, tokens: TokenIds) -> InspectedPack:
    """The spans of a pack.

    Args:
        pack: On the CPU.
        number: In its epoch.
        tokens: The model's special tokens.
    """
    ids, loss = pack.input_ids[0].numpy(), pack.loss_mask[0].numpy() > 0
    kinds = np.where(np.isin(ids, tokens.of_pictures), KINDS.index("image"), KINDS.index("text"))
    kinds[loss] = KINDS.index("loss")
    borders = itertools.pairwise(pack.cu_seqlens.tolist())
    samples = (  # the padded tail has no key
        PackedSample(key, start, _spans(kinds[start:end], start))
        for key, (start, end) in zip(pack.sample_keys, borders, strict=False)
    )
    return InspectedPack(number, len(ids), tuple(samples))


def cards_of(pack: PackedBatch, number: int, processor: Step37Processor, max_pictures: int) -> Iterator[Card]:
    """The samples of a pack.

    Args:
        pack: On the CPU, with pixels.
        number: In its epoch.
        processor: That made it.
        max_pictures: Pictures in all cards, one for a sample without any; there is no card behind the last of them.
    """
    tokens = processor.config.tokens
    views = _views(pack, tokens)
    for key, (start, end) in zip(pack.sample_keys, itertools.pairwise(pack.cu_seqlens.tolist()), strict=False):
        if max_pictures <= 0:
            return
        ids = pack.input_ids[0, start:end]
        own = list(itertools.islice(views, int((ids == tokens.im_start).sum())))
        pictures = tuple(_jpeg_uri(view) for view in own[:max_pictures])
        max_pictures -= max(1, len(pictures))
        # The loss mask of a pack is that of the labels, one position ahead of the tokens.
        learnt = [False, *(pack.loss_mask[0, start : end - 1] > 0).tolist()]
        pieces, hidden = _cut(_pieces(ids.tolist(), learnt, processor))
        yield Card(
            key=key,
            pack=number,
            length=end - start,
            pictures=pictures,
            hidden_pictures=len(own) - len(pictures),
            patches=int((ids == tokens.patch_start).sum()),
            pieces=pieces,
            hidden_characters=hidden,
        )


def _spans(kinds: np.ndarray, start: int) -> tuple[Span, ...]:
    """Runs of equal numbers in `kinds`, [n] numbers in KINDS, that begin at position `start`."""
    borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    return tuple(Span(KINDS[kinds[first]], start + first, last - first) for first, last in itertools.pairwise(borders))


def _views(pack: PackedBatch, tokens: TokenIds) -> Iterator[Tensor]:
    """The global views in the order of their start tokens, uint8 [3, H, W]."""
    for entry in pack.images:
        if entry.insert_start_token == tokens.im_start:
            assert entry.images is not None and entry.images.dtype == torch.uint8, "a loader's packs have pixels"
            yield from entry.images


def _jpeg_uri(view: Tensor) -> str:
    picture = Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _pieces(ids: Sequence[int], learnt: Sequence[bool], processor: Step37Processor) -> list[Piece]:
    tokens, tokenizer = processor.config.tokens, processor.tokenizer
    of_images, special = set(tokens.of_pictures), set(tokenizer.special_ids.values())

    def group(place: int) -> tuple[PieceKind, bool, int | None]:
        if ids[place] in of_images:
            return "image", learnt[place], None
        if ids[place] in special:  # each one a piece of its own
            return "special", learnt[place], place
        return "text", learnt[place], None

    pieces = []
    for (kind, is_learnt, _), places in itertools.groupby(range(len(ids)), key=group):
        own = [ids[place] for place in places]
        if kind == "image":
            pictures = own.count(tokens.im_start)
            text = f"{pictures} picture{'s' * (pictures != 1)}, {len(own)} tokens"
        else:
            text = tokenizer.decode(own, skip_special=False)
        pieces.append(Piece(kind, is_learnt, text))
    return pieces


def _cut(pieces: Sequence[Piece]) -> tuple[tuple[Piece, ...], int]:
    """The first `TEXT_LIMIT` characters, and the number of those behind them."""
    left, kept = TEXT_LIMIT, []
    for piece in pieces:
        text = piece.text[:left]
        left -= len(text)
        if text:
            kept.append(Piece(piece.kind, piece.learnt, text))
    return tuple(kept), sum(len(piece.text) for piece in pieces) - sum(len(piece.text) for piece in kept)
