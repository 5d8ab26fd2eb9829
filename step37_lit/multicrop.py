"""Multicrop: a picture as one global view and a grid of local patches, and how it is resized.

    picture -> zeros around very thin ones -> global view [3, view, view]
                                           -> snapped to multiples of a window -> windows -> patches [n, 3, crop, crop]

The plan needs nothing but the picture's size, so that the length of a sample is known before a picture is read. Rules
and constants are those of `transformers`' Step3p7ImageProcessor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from step37_lit.config import VisionConfig
from step37_lit.errors import require
from step37_lit.image_header import DEFAULT_MAX_PIXELS, ImageError

ResizeMode = Literal["fast", "exact"]
RESIZE_MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)
PIXEL_MODES = ("RGB", "L")

LARGEST_SIDE = 6  # in patches; 3024 pixels for patches of 504
THIN_SIDE, THIN_RATIO = 32, 4  # a picture with less than the one and more than the other is padded to a square
LONG_RATIO = 1.5  # a picture within the global view is cut only where it is longer than this
VERY_LONG_RATIO = 4  # from here on a window is not higher than the picture
SNAP_UP = 0.2  # share of a window from which a remainder gets a window of its own


@dataclass(frozen=True)
class CropPlan:
    """How a picture of one size is cut.

    Args:
        window: Side in pixels of what becomes one patch; 0 where there are no patches.
        columns: Patches of a row.
        rows: Rows of patches.
        scaled: (width, height) behind padding and scaling down; what the global view is made of.
        resized: (width, height) that is cut in windows; `scaled` where there are no patches.
        newline_after: Numbers (row-major, from 0) of the patches that a `<patch_newline>` follows.
        tokens: Tokens of the picture, start and end tokens and newlines included.
        padded_to_square: Whether zeros are put to the right or below.
    """

    window: int
    columns: int
    rows: int
    scaled: tuple[int, int]
    resized: tuple[int, int]
    newline_after: tuple[int, ...]
    tokens: int
    padded_to_square: bool

    @property
    def patches(self) -> int:
        """Number of local patches."""
        return self.columns * self.rows


def plan_crops(width: int, height: int, view: int = 728, crop: int = 504, patch_size: int = 14) -> CropPlan:
    """The plan for a picture of `width` x `height` pixels (after EXIF orientation).

    Args:
        width: Pixels.
        height: Pixels.
        view: Side of the global view (`VisionConfig.image_size`).
        crop: Side of a local patch (`VisionConfig.crop_size`).
        patch_size: Side of the vision tower's patches; with it the sides become numbers of tokens.

    Raises:
        ConfigError: a side is not positive, or `view` or `crop` is no multiple of `patch_size`.
    """
    require(min(width, height) > 0, "picture size", "positive sides", (width, height))
    padded = min(width, height) < THIN_SIDE and max(width, height) / min(width, height) > THIN_RATIO
    if padded:
        width = height = max(width, height)
    largest = LARGEST_SIDE * crop
    if max(width, height) > largest:
        scale = largest / max(width, height)
        width, height = int(width * scale), int(height * scale)
        require(
            min(width, height) > 0, "picture size", f"a side of 1 or more when scaled to {largest}", (width, height)
        )
    window = _window(width, height, view, crop)
    resized = (_snapped(width, window), _snapped(height, window)) if window else (width, height)
    columns, rows = (max(1, side // window) if window else 0 for side in resized)
    newlines = tuple(row * columns + columns - 1 for row in range(rows - 1))
    num_tokens = VisionConfig(image_size=view, crop_size=crop, patch_size=patch_size).num_tokens
    tokens = columns * rows * (num_tokens(crop) + 2) + len(newlines) + num_tokens(view) + 2
    return CropPlan(window, columns, rows, (width, height), resized, newlines, tokens, padded)


def crop_image(
    image: Image.Image, view: int = 728, crop: int = 504, resize: ResizeMode = "fast"
) -> tuple[Tensor, Tensor]:
    """Cuts a picture as `plan_crops` says; it is decoded once for all crops.

    Args:
        image: RGB or gray.
        view: Side of the global view.
        crop: Side of a local patch.
        resize: See `resize_pixels`.

    Returns:
        The global view, uint8 [3, view, view], and the patches, uint8 [n, 3, crop, crop], row by row.

    Raises:
        ConfigError: the picture is neither RGB nor gray.
        ImageError: the square that a thin picture is padded to has too many pixels.
    """
    plan = plan_crops(*image.size, view, crop, patch_size=1)  # any sides: the number of tokens is not asked for
    pixels = pixels_of(image)
    if plan.padded_to_square:
        pixels = _padded_to_square(pixels)
    seen = resize_pixels(resize_pixels(pixels, *plan.scaled, resize), view, view, resize)[0]
    if not plan.patches:
        return seen.contiguous(), pixels.new_empty(0, 3, crop, crop)
    windows = _windows(resize_pixels(pixels, *plan.resized, resize), plan)
    return seen.contiguous(), resize_pixels(windows, crop, crop, resize).contiguous()


def pixels_of(image: Image.Image) -> Tensor:
    """uint8 [1, 3, H, W] of an RGB or gray picture; channels last in memory, as Pillow has them."""
    require(image.mode in PIXEL_MODES, "image mode", " or ".join(PIXEL_MODES), image.mode)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)[None]


def resize_pixels(pixels: Tensor, width: int, height: int, resize: ResizeMode) -> Tensor:
    """Bilinear with antialiasing: uint8 [N, 3, H, W] -> uint8 [N, 3, height, width]; unchanged where the size is right.

    `exact` is Pillow's BILINEAR to the bit, `fast` is torch's kernel for uint8: another rounding of the same weights,
    up to 2 levels apart on photographs, 0.001 on average.
    """
    require(resize in RESIZE_MODES, "resize", " or ".join(RESIZE_MODES), resize)
    if pixels.shape[2:] == (height, width):
        return pixels
    if resize == "fast":
        return F.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True)
    pictures = [Image.fromarray(one.numpy()) for one in pixels.permute(0, 2, 3, 1).contiguous()]
    resized = [picture.resize((width, height), Image.Resampling.BILINEAR) for picture in pictures]
    return torch.cat([pixels_of(picture) for picture in resized])


def _window(width: int, height: int, view: int, crop: int) -> int:
    short, long = min(width, height), max(width, height)
    if long <= view:
        return short if long / short > LONG_RATIO else 0
    return min(short, crop) if long / short > VERY_LONG_RATIO else crop


def _snapped(side: int, window: int) -> int:
    """A multiple of the window; a side shorter than a window stays, and its patches are narrower."""
    if side < window:
        return side
    return window * (side // window + (side % window > SNAP_UP * window))


def _padded_to_square(pixels: Tensor) -> Tensor:
    height, width = pixels.shape[2:]
    side = max(height, width)
    if side * side > DEFAULT_MAX_PIXELS:
        raise ImageError(
            f"{width} x {height} pixels, padded to a square {side * side}: at most {DEFAULT_MAX_PIXELS} are allowed"
        )
    return F.pad(pixels, (0, side - width, 0, side - height))


def _windows(pixels: Tensor, plan: CropPlan) -> Tensor:
    """[1, 3, H, W] -> [rows x columns, 3, H / rows, W / columns], row by row."""
    rows = pixels[0].unflatten(2, (plan.columns, -1)).unflatten(1, (plan.rows, -1))  # [3, rows, h, columns, w]
    return rows.permute(1, 3, 0, 2, 4).flatten(0, 1)
