"""Fusion: image features take the place of the `<im_patch>` tokens behind each start token.

T = tokens of the pack, H = hidden, N = images of one entry, P = features of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from step37_lit.batch import ImageForInsert
from step37_lit.config import TokenIds


class ImageInsertError(ValueError):
    """Text and images do not fit; the message has both numbers and, where there is one, the position."""


def insert_features(
    embeddings: Tensor, input_ids: Tensor, images: list[ImageForInsert], features: list[Tensor], tokens: TokenIds
) -> Tensor:
    """Embeddings with the image features at their places.

    For each kind of start token (`<im_start>`, `<patch_start>`) its k-th occurrence in the row belongs to the k-th
    image among the entries with that token; the features stand on the positions behind it.

    Args:
        embeddings: [T, 1, H] of the words.
        input_ids: [1, T] int64.
        images: Entries in the order of their start tokens.
        features: For each entry its projected features [N, P, H].
        tokens: The special tokens.

    Returns:
        [T, 1, H]; gradients flow to words and features.

    Raises:
        ImageInsertError: number of start tokens and of images differ, a span is not all `<im_patch>` or is cut off,
            an `<im_patch>` has no image, or features of the wrong width.
    """
    row = input_ids[0]
    for values in features:
        if values.dim() != 3 or values.shape[-1] != embeddings.shape[-1]:
            raise ImageInsertError(
                f"image features: expected [N, P, {embeddings.shape[-1]}], found {list(values.shape)}"
            )
    index = _places(row, images, features)
    _check_spans(row, index, tokens)
    if not features:
        return embeddings
    flat = torch.cat([values.flatten(0, 1) for values in features]).to(embeddings.dtype)
    return embeddings[:, 0].index_copy(0, index, flat).unsqueeze(1)


def _places(row: Tensor, images: list[ImageForInsert], features: list[Tensor]) -> Tensor:
    """Positions [sum N P] of all features, in the entries' order; one device sync a kind of start token."""
    starts = {token: (row == token).nonzero().squeeze(1) for token in {entry.insert_start_token for entry in images}}
    for token, positions in starts.items():
        found = sum(f.shape[0] for e, f in zip(images, features, strict=True) if e.insert_start_token == token)
        if positions.numel() != found:
            raise ImageInsertError(f"start token {token}: {positions.numel()} in input_ids, but {found} images")
    used = dict.fromkeys(starts, 0)
    places = []
    for entry, values in zip(images, features, strict=True):
        token, (number, length) = entry.insert_start_token, values.shape[:2]
        first = starts[token][used[token] : used[token] + number]
        used[token] += number
        places.append((first[:, None] + 1 + torch.arange(length, device=row.device)).flatten())
    return torch.cat(places) if places else row.new_empty(0)


def _check_spans(row: Tensor, index: Tensor, tokens: TokenIds) -> None:
    """Every place is an `<im_patch>` and every `<im_patch>` is a place."""
    filled = torch.zeros(row.numel() + 1, dtype=torch.bool, device=row.device)
    filled[index.clamp(max=row.numel())] = True  # the extra position collects what runs over the end
    wanted = torch.cat((row == tokens.im_patch, row.new_zeros(1, dtype=torch.bool)))
    wrong = (filled != wanted).nonzero()
    if not wrong.numel():
        return
    place = int(wrong[0])
    if bool(wanted[place]):
        raise ImageInsertError(
            f"position {place}: an <im_patch> ({tokens.im_patch}) without an image feature; "
            f"{int(wanted.sum())} in input_ids, {index.numel()} features"
        )
    found = f"token {int(row[place])}" if place < row.numel() else f"the end of the row of {row.numel()} tokens"
    raise ImageInsertError(
        f"position {place}: expected <im_patch> ({tokens.im_patch}) under an image feature, found {found}"
    )
