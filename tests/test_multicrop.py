"""Multicrop: plans, pixels, token layout and lengths; the two ways of resizing. Oracle: `transformers`' processor."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import noise
from PIL import Image
from torch import Tensor

from step37_lit.batch import PackedBatch
from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError
from step37_lit.image_header import ImageError
from step37_lit.megatron.build import build_model
from step37_lit.model.step37_model import Step37Model
from step37_lit.multicrop import RESIZE_MODES, ResizeMode, pixels_of, resize_pixels
from step37_lit.presets import TINY_TOKENS as TOKENS
from step37_lit.processor import Step37Processor, crop_image, plan_crops
from step37_lit.tokenizer import Step37Tokenizer

SHARED = Path(__file__).parents[2] / "shared"
ORACLE = SHARED / "oracle" / "multicrop" / "public.json"
PHOTOGRAPHS = SHARED / "flickr8k-mini" / "images"


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    if not ORACLE.is_file():
        pytest.skip(f"the oracle is not at {ORACLE}")
    return json.loads(ORACLE.read_text())


@pytest.fixture(scope="module")
def config() -> Step37Config:
    return Step37Config.preset("tiny")


@pytest.fixture(scope="module")
def tokenizer() -> Step37Tokenizer:
    return Step37Tokenizer.train(["what is this?", "a red ring and a picture"] * 3, vocab_size=400)


@pytest.fixture(scope="module")
def processor(tokenizer: Step37Tokenizer, config: Step37Config) -> Step37Processor:
    return Step37Processor(tokenizer, config, multicrop=True)


@pytest.fixture(scope="module")
def model(config: Step37Config, one_rank: None) -> Step37Model:
    return build_model(config, seed=1)


def oracle_picture(width: int, height: int) -> Image.Image:
    """The picture of the oracle's `meta`."""
    y, x = np.mgrid[:height, :width]
    bands = (x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), 255 * ((x // 16 + y // 16) % 2))
    return Image.fromarray(np.stack(bands, axis=-1).astype(np.uint8))


def conversation(number_of_images: int) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image"}] * number_of_images
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": "what is this?"}]},
        {"role": "assistant", "content": "a red ring"},
    ]


def test_plans_of_the_oracle(oracle: dict[str, Any]) -> None:
    assert len(oracle["plans"]) == 176
    for expected in oracle["plans"]:
        plan = plan_crops(expected["width"], expected["height"])
        found = {name: getattr(plan, name) for name in expected if name not in ("width", "height")}
        found |= {"resized": list(plan.resized), "newline_after": list(plan.newline_after)}
        assert found == {name: expected[name] for name in found}, (expected["width"], expected["height"])


@pytest.mark.parametrize("resize", RESIZE_MODES)
def test_pixels_of_the_oracle(oracle: dict[str, Any], resize: ResizeMode) -> None:
    assert len(oracle["pixels"]) == 8
    mean_difference = point_difference = 0.0
    for expected in oracle["pixels"]:
        view, patches = crop_image(oracle_picture(expected["width"], expected["height"]), resize=resize)
        assert view.dtype == patches.dtype == torch.uint8 and view.shape == (3, 728, 728)
        assert patches.shape == (len(expected["patches"]), 3, 504, 504)
        crops = zip([view, *patches], [expected["global_view"], *expected["patches"]], strict=True)
        for crop, described in crops:
            mean = crop.double().mean(dim=(1, 2)) - torch.tensor(described["mean"])
            mean_difference = max(mean_difference, mean.abs().max().item())
            for row, column, *colour in described["points"]:
                point = crop[:, row, column].double() - torch.tensor(colour)
                point_difference = max(point_difference, point.abs().max().item())
    print(f"{resize}: means differ by {mean_difference:.4f}, points by {point_difference:.0f} levels")
    assert mean_difference <= 0.01 and point_difference <= 2  # measured: 0.002 and 0


# From the rules as they are written, by hand: (width, height), window, (columns, rows), resized, newlines.
BY_HAND = [
    ((728, 728), 0, (0, 0), (728, 728), ()),  # within the view, not long
    ((600, 400), 0, (0, 0), (600, 400), ()),  # 1.5 is not more than 1.5
    ((601, 400), 400, (2, 1), (800, 400), ()),  # remainder 201 > 80: up
    ((470, 300), 300, (2, 1), (600, 300), ()),
    ((350, 200), 200, (2, 1), (400, 200), ()),
    ((440, 200), 200, (2, 1), (400, 200), ()),  # remainder 40 is not more than 40: down
    ((441, 200), 200, (3, 1), (600, 200), ()),
    ((1000, 900), 504, (2, 2), (1008, 1008), (1,)),
    ((1500, 1100), 504, (3, 2), (1512, 1008), (2,)),  # 1100 = 2 x 504 + 92: down
    ((900, 400), 504, (2, 1), (1008, 400), ()),  # 400 is shorter than a window and stays
    ((400, 1600), 504, (1, 3), (400, 1512), (0, 1)),  # 4 is not more than 4
    ((400, 1601), 400, (1, 4), (400, 1600), (0, 1, 2)),
    ((6048, 3024), 504, (6, 3), (3024, 1512), (5, 11)),  # scaled down to 3024
]


@pytest.mark.parametrize(("size", "window", "grid", "resized", "newlines"), BY_HAND)
def test_plans_by_hand(
    size: tuple[int, int], window: int, grid: tuple[int, int], resized: tuple[int, int], newlines: tuple[int, ...]
) -> None:
    plan = plan_crops(*size)
    assert (plan.window, (plan.columns, plan.rows), plan.resized, plan.newline_after) == (
        window, grid, resized, newlines,
    )  # fmt: skip
    assert not plan.padded_to_square and plan.tokens == grid[0] * grid[1] * 83 + len(newlines) + 171


def test_thin_pictures_are_padded() -> None:
    plan = plan_crops(1000, 31)
    assert plan.padded_to_square and plan.scaled == (1000, 1000) and plan.patches == 4
    assert plan_crops(100, 31).padded_to_square is False  # 3.2 is not thin
    assert plan_crops(1000, 32).padded_to_square is False
    view, patches = crop_image(Image.new("RGB", (1000, 20), (255, 255, 255)))
    assert (view[:, :13] == 255).all() and (view[:, 16:] == 0).all()  # the picture is in the top 14.6 of 728 rows
    assert (patches[:2, :, :18] == 255).all() and (patches[2:] == 0).all()


def test_impossible_sizes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"picture size: expected positive sides, found \(0, 5\)"):
        plan_crops(0, 5)
    with pytest.raises(ConfigError, match=r"a side of 1 or more when scaled to 3024"):
        plan_crops(200_000, 32)
    with pytest.raises(ImageError, match=r"60000 x 31 pixels, padded to a square 3600000000: at most"):
        crop_image(Image.new("RGB", (60_000, 31)))
    with pytest.raises(ConfigError, match="image mode: expected RGB or L, found 'RGBA'"):
        crop_image(Image.new("RGBA", (9, 9)))


@pytest.mark.parametrize("resize", RESIZE_MODES)
def test_patches_are_the_windows_row_by_row(resize: ResizeMode) -> None:
    colours = np.arange(10, 250, 20, dtype=np.uint8).reshape(3, 4)
    picture = Image.fromarray(colours.repeat(84, 0).repeat(84, 1)).convert("RGB")  # 336 x 252: 4 x 3 windows of 84
    view, patches = crop_image(picture, view=112, crop=84, resize=resize)
    assert patches.shape == (12, 3, 84, 84) and view.shape == (3, 112, 112)
    assert (patches == torch.from_numpy(colours).reshape(12, 1, 1, 1)).all()
    gray = crop_image(picture.convert("L"), view=112, crop=84, resize=resize)
    assert torch.equal(gray[0], view) and torch.equal(gray[1], patches)
    assert view.is_contiguous() and patches.is_contiguous()


def levels_apart(image: Image.Image, side: int) -> Tensor:
    fast, exact = (resize_pixels(pixels_of(image), side, side, mode).int() for mode in ("fast", "exact"))
    reference = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)).astype(np.int32)
    assert torch.equal(exact[0].permute(1, 2, 0), torch.from_numpy(reference))
    return (fast - exact).abs()


def test_fast_resize_of_photographs() -> None:
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"the photographs are not at {PHOTOGRAPHS}")
    files = sorted(PHOTOGRAPHS.glob("*.jpg"))[::8]
    largest, mean = 0, 0.0
    for file in files:
        with Image.open(file) as photograph:
            apart = levels_apart(photograph.convert("RGB"), 728)
        largest, mean = max(largest, int(apart.max())), mean + apart.float().mean().item() / len(files)
    print(f"{len(files)} photographs: at most {largest} levels apart, {mean:.4f} on average")
    assert largest <= 2 and mean < 0.005  # measured on all 320: 2 and 0.0011


@pytest.mark.parametrize("size", [(41, 70), (1000, 800), (1456, 728), (728, 100), (2100, 1400), (1, 1), (3, 900)])
def test_fast_resize_of_noise(size: tuple[int, int]) -> None:
    apart = levels_apart(noise(*size), 504)
    print(f"{size}: at most {apart.max()} levels apart, {apart.float().mean():.4f} on average")
    assert apart.max() <= 2 and apart.float().mean() < 0.25  # measured: 1, and 0.16 for (3, 900), else up to 0.023


def expected_layout(columns: int, rows: int, config: Step37Config) -> list[int]:
    """Written from the description, patch by patch."""
    local, whole = (config.vision.num_tokens(side) for side in (84, 112))
    layout: list[int] = []
    for row in range(rows):
        for _ in range(columns):
            layout += [TOKENS.patch_start] + [TOKENS.im_patch] * local + [TOKENS.patch_end]
        if row < rows - 1:
            layout += [TOKENS.patch_newline]
    return layout + [TOKENS.im_start] + [TOKENS.im_patch] * whole + [TOKENS.im_end]


@pytest.mark.parametrize(
    ("size", "grid"),
    [((112, 112), (0, 0)), ((112, 60), (2, 1)), ((170, 250), (2, 3)), ((60, 400), (1, 7)), ((2000, 1000), (6, 3))],
)
def test_token_layout(
    processor: Step37Processor, config: Step37Config, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    plan = plan_crops(*size, view=112, crop=84)
    assert (plan.columns, plan.rows) == grid
    sample = processor(conversation(1), [noise(*size)])
    ids, layout = sample.input_ids.tolist(), expected_layout(*grid, config)
    start = ids.index(layout[0])
    assert ids[start : start + len(layout)] == layout and len(layout) == plan.tokens
    image_tokens = {getattr(TOKENS, name) for name in ("im_start", "patch_start", "patch_newline", "im_patch")}
    assert not set(ids[:start] + ids[start + len(layout) :]) & image_tokens
    shapes = [
        (entry.insert_start_token, tuple(entry.images.shape)) for entry in sample.images if entry.images is not None
    ]
    patches = [(TOKENS.patch_start, (plan.patches, 3, 84, 84))] if plan.patches else []
    assert shapes == [*patches, (TOKENS.im_start, (1, 3, 112, 112))]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 600), st.integers(1, 600)), max_size=3), st.booleans())
def test_length_from_sizes_alone_is_the_real_one(
    tokenizer: Step37Tokenizer, config: Step37Config, sizes: list[tuple[int, int]], multicrop: bool
) -> None:
    processor = Step37Processor(tokenizer, config, multicrop=multicrop, resize="fast")
    sample = processor(conversation(len(sizes)), [Image.new("RGB", size) for size in sizes])
    assert processor.length(conversation(len(sizes)), sizes) == len(sample)
    PackedBatch.from_samples([sample]).validate(config.tokens)


def test_a_pack_of_crops_runs_through_the_model(
    processor: Step37Processor, config: Step37Config, model: Step37Model
) -> None:
    sizes = [[(170, 250), (60, 60)], [(112, 60)], []]
    samples = [processor(conversation(len(s)), [noise(*size, seed=9) for size in s]) for s in sizes]
    batch = PackedBatch.from_samples(samples)
    batch.validate(config.tokens)
    assert [entry.num_images for entry in batch.images] == [6 + 2, 3]  # neighbours share a tensor, the order stays
    logits = model(**batch.model_inputs(labels=False))
    assert logits.shape == (1, batch.input_ids.shape[1], config.text.vocab_size) and logits.isfinite().all()

    # the fourth patch changes what stands behind its own start token, and nothing before
    ids = batch.input_ids[0]
    fourth = int((ids == TOKENS.patch_start).nonzero()[3])
    assert batch.images[0].images is not None
    batch.images[0].images[3] = 255 - batch.images[0].images[3]
    changed = (model(**batch.model_inputs(labels=False)) != logits).any(dim=-1)[0].nonzero()[:, 0]
    assert int(changed[0]) == fourth + 1 and int(changed[-1]) < int(batch.cu_seqlens[1])


def test_a_prompt_has_the_same_crops(processor: Step37Processor) -> None:
    turns, images = conversation(1), [noise(170, 250)]
    prompt, sample = processor.prompt(turns[:1], images), processor(turns, images)
    assert torch.equal(sample.input_ids[: len(prompt)], prompt.input_ids)
    for one, other in zip(prompt.images, sample.images, strict=True):
        assert one.images is not None and other.images is not None and torch.equal(one.images, other.images)


def test_crops_that_no_patch_divides_are_refused(tokenizer: Step37Tokenizer, config: Step37Config) -> None:
    odd = dataclasses.replace(config, vision=dataclasses.replace(config.vision, crop_size=85))
    assert Step37Processor(tokenizer, odd).length(conversation(1), [(9, 9)])  # not in use
    with pytest.raises(ConfigError, match=r"vision.crop_size: expected a multiple of patch_size 14, found 85"):
        Step37Processor(tokenizer, odd, multicrop=True)
