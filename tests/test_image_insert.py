"""Fusion puts each feature where it belongs and refuses whatever does not fit, with numbers and position."""

from __future__ import annotations

import pytest
import torch

from step37_lit.batch import ImageForInsert
from step37_lit.model.image_insert import ImageInsertError, insert_features
from step37_lit.presets import TINY_TOKENS as TOKENS

HIDDEN = 6
START, PATCH, END = TOKENS.im_start, TOKENS.im_patch, TOKENS.im_end
CROP = TOKENS.patch_start


def row(*ids: int) -> torch.Tensor:
    return torch.tensor([ids])


def fuse(ids: torch.Tensor, *entries: tuple[int, torch.Tensor]) -> torch.Tensor:
    words = torch.zeros(ids.shape[1], 1, HIDDEN)
    images = [ImageForInsert(token, None) for token, _ in entries]
    return insert_features(words, ids, images, [features for _, features in entries], TOKENS)


def features(number: int, length: int, first: float) -> torch.Tensor:
    """[number, length, HIDDEN]; feature j of image i is all `first + 10 i + j`."""
    values = first + 10 * torch.arange(number)[:, None] + torch.arange(length)
    return values[..., None].expand(-1, -1, HIDDEN).float()


def test_features_land_behind_their_start_token_in_order() -> None:
    ids = row(50, START, PATCH, PATCH, END, 51, START, PATCH, PATCH, END)
    fused = fuse(ids, (START, features(1, 2, 100.0)), (START, features(1, 2, 200.0)))
    assert fused[:, 0, 0].tolist() == [0, 0, 100, 101, 0, 0, 0, 200, 201, 0]


def test_crops_and_views_are_told_apart_by_their_start_token() -> None:
    ids = row(CROP, PATCH, TOKENS.patch_end, CROP, PATCH, TOKENS.patch_end, START, PATCH, PATCH, END)
    fused = fuse(ids, (START, features(1, 2, 100.0)), (CROP, features(2, 1, 5.0)))
    assert fused[:, 0, 0].tolist() == [0, 5, 0, 0, 15, 0, 0, 100, 101, 0]


def test_gradients_reach_words_and_features() -> None:
    ids = row(50, START, PATCH, END)
    words = torch.zeros(4, 1, HIDDEN, requires_grad=True)
    inserted = features(1, 1, 1.0).requires_grad_()
    insert_features(words, ids, [ImageForInsert(START, None)], [inserted], TOKENS).sum().backward()
    assert words.grad is not None and words.grad[:, 0, 0].tolist() == [1, 1, 0, 1]  # the covered word gets none
    assert inserted.grad is not None and inserted.grad.unique().tolist() == [1]


@pytest.mark.parametrize(
    ("ids", "entries", "message"),
    [
        (row(START, PATCH, END), [(START, 2, 1)], "start token 3: 1 in input_ids, but 2 images"),
        (row(START, PATCH, END, START, PATCH, END), [(START, 1, 1)], "start token 3: 2 in input_ids, but 1 images"),
        (row(50, START, PATCH, 51, END), [(START, 1, 2)], "position 3: expected <im_patch> .4. .* found token 51"),
        (row(50, START, PATCH), [(START, 1, 2)], "position 3: .* the end of the row of 3 tokens"),
        (row(START, PATCH, PATCH, END), [(START, 1, 1)], "position 2: an <im_patch> .4. without .* 2 in .* 1 features"),
        (row(50, PATCH), [], "position 1: an <im_patch> .4. without an image feature"),
    ],
)
def test_misfits_are_named(ids: torch.Tensor, entries: list[tuple[int, int, int]], message: str) -> None:
    with pytest.raises(ImageInsertError, match=message):
        fuse(ids, *[(token, features(number, length, 0.0)) for token, number, length in entries])


def test_features_of_the_wrong_width_are_named() -> None:
    with pytest.raises(ImageInsertError, match=r"expected \[N, P, 6\], found \[1, 1, 5\]"):
        fuse(row(START, PATCH, END), (START, torch.zeros(1, 1, 5)))
