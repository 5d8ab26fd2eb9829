"""Rendered scenes: pure functions of (seed, index), held-out combinations, honest captions, packs, ranks, resume."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from datamodules.scene_captions import COUNTS, KINDS, caption_text, captions, things_named
from datamodules.scene_rendering import render
from datamodules.scene_world import COLORS, HELD_OUT, SHAPES, draw_scene, generator
from datamodules.scenes import ScenesDataModule, tokenizer_texts
from datamodules.steps import DataShare, StepLoader
from step37_lit.batch import PackedBatch
from step37_lit.errors import ConfigError
from step37_lit.tokenizer import Step37Tokenizer

WEIGHTS = (0.4, 0.2, 0.2, 0.2)
SEED = 11


@pytest.fixture(autouse=True)
def print_seed():
    print(f"seed {SEED}")


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Step37Tokenizer.train(tokenizer_texts(), 512).save(path)
    return str(path)


@pytest.fixture
def data(tokenizer_file):
    def make(**changed) -> ScenesDataModule:
        arguments = {
            "tokenizer": tokenizer_file,
            "seed": SEED,
            "num_steps": 5,
            "microbatches": 2,
            "samples_per_pack": 3,
        }
        return ScenesDataModule(**(arguments | {"val_samples": 12} | changed))

    return make


def same(one: PackedBatch, two: PackedBatch) -> bool:
    pictures = all(torch.equal(a.images, b.images) for a, b in zip(one.images, two.images, strict=True))
    return pictures and torch.equal(one.input_ids, two.input_ids) and one.sample_keys == two.sample_keys


def test_a_scene_and_its_picture_are_pure_functions():
    for index in (0, 7, 123_456_789):
        one, two = (draw_scene(SEED, "train", index, WEIGHTS) for _ in range(2))
        pixels = [np.asarray(render(one, 84, generator(SEED, "train", index, "pixels"))) for _ in range(2)]
        assert one == two and np.array_equal(*pixels)
    scenes = {draw_scene(SEED, "train", i, WEIGHTS) for i in range(500)}
    others = {draw_scene(SEED + 1, "train", i, WEIGHTS) for i in range(500)}
    seen = {draw_scene(SEED, "seen", i, WEIGHTS) for i in range(500)}
    assert len(scenes) > 450 and len(scenes & others) < 50 and len(scenes & seen) < 50


def test_held_out_pairs_never_appear_in_training_and_fill_the_unseen_split():
    def pairs(split):
        return {(t.color, t.shape) for i in range(1500) for t in draw_scene(SEED, split, i, WEIGHTS).things}

    every = {(color, shape) for color in COLORS for shape in SHAPES}
    assert pairs("train") == pairs("seen") == every - HELD_OUT
    assert pairs("unseen") == HELD_OUT
    per_color = {color: sum(c == color for c, _ in HELD_OUT) for color in COLORS}
    per_shape = {shape: sum(s == shape for _, s in HELD_OUT) for shape in SHAPES}
    assert set(per_color.values()) | set(per_shape.values()) == {len(HELD_OUT) // len(COLORS)}


@pytest.mark.parametrize("split", ["train", "unseen"])
def test_captions_say_what_the_scene_holds(split):
    for index in range(200):
        scene = draw_scene(SEED, split, index, WEIGHTS)
        written = captions(scene)
        assert len({caption_text(pieces).split()[0] for pieces in written}) == len(written) >= 3
        for pieces in written:
            assert tuple(things_named(pieces)) == scene.things
            counts = [piece.text for piece in pieces if piece.attribute == "count"]
            assert counts == [COUNTS[len(scene.things) - 1]]
            assert {piece.attribute for piece in pieces} <= {*KINDS, None}
            text = caption_text(pieces)
            assert text[0].isupper() and text.endswith(".") and "  " not in text and not set("{}") & set(text)
            assert (f"{counts[0]} shape:" in text) == (len(scene.things) == 1)
            background = [piece.text for piece in pieces if piece.attribute == "background"]
            assert background in ([], [scene.background])


def test_articles_give_no_answer_away():
    for index in range(300):
        for pieces in captions(draw_scene(SEED, "train", index, WEIGHTS)):
            assert " an " not in caption_text(pieces)
            assert all(
                piece.text[0] not in "aeiou" for piece in pieces if piece.attribute in ("color", "shape", "size")
            )


def test_pictures_show_color_and_place():
    """In a picture of one plain shape, the pixels near its colour lie in its quarter, and only there."""
    quarter = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
    checked = 0
    for index in range(400):
        scene = draw_scene(SEED, "train", index, (1, 0, 0, 0))
        (thing,) = scene.things
        if thing.texture != "plain":
            continue
        pixels = np.asarray(render(scene, 84, generator(SEED, "train", index, "pixels")), dtype=int)
        near = np.abs(pixels - np.array(COLORS[thing.color])).max(axis=-1) <= 30
        counts = near.reshape(2, 42, 2, 42).sum(axis=(1, 3))
        assert counts[quarter[thing.place]] == counts.max() > 60, (index, thing)
        checked += 1
    assert checked > 80


def test_packs_hold_the_contract_and_name_attribute_words(data):
    module = data()
    for loader in (module.train_dataloader(), *module.val_dataloader()):
        for item in loader:
            assert len(item) == 2
            for pack in item:
                pack.validate(module.config.tokens)
                assert len(pack.sample_keys) == 3 and pack.num_images == 3
    pack = module.train_dataloader().steps[0].packs[0]
    tokenizer = module.processor.tokenizer
    colors = [tokenizer.decode(pack.labels[0, a:b].tolist()).strip() for a, b in pack.attribute_spans["color"].tolist()]
    scenes = [draw_scene(SEED, "train", i, module.count_weights) for i in range(3)]
    assert colors == [thing.color for scene in scenes for thing in scene.things]
    assert module.train_dataloader().steps.samples.sample(1).attribute_spans.keys() >= {
        "shape",
        "size",
        "texture",
        "place",
    }


def test_words_are_single_tokens(data):
    tokenizer = data().processor.tokenizer
    words = [f" {word}" for word in (*COLORS, *SHAPES, *COUNTS, "small", "large", "plain", "striped", "dotted")]
    assert [word for word in words if len(tokenizer.encode(word)[0]) != 1] == []


def test_the_global_batch_does_not_depend_on_ranks_or_workers(data):
    whole = list(data(microbatches=4, val_samples=24).train_dataloader())
    assert len(whole) == 5
    for workers in (0, 2):
        shares = []
        for rank in range(2):
            module = data(microbatches=4, val_samples=24, num_workers=workers)
            source = replace(module.train_dataloader().source, share=DataShare(rank, 2))
            shares.append(list(StepLoader(source, workers)))
        for step, packs in enumerate(whole):
            assert all(same(packs[m], shares[m % 2][step][m // 2]) for m in range(4))


def test_a_number_of_ranks_that_does_not_divide_is_refused(data):
    with pytest.raises(ConfigError, match=r"data.microbatches: expected a multiple of 3 data-parallel ranks, found 2"):
        data().check(ranks=3)


@pytest.mark.parametrize(("stop", "workers"), [(0, 0), (1, 0), (4, 0), (5, 0), (7, 0), (4, 1)])
def test_resume_continues_behind_the_last_step(data, stop, workers):
    def two_epochs(loader: StepLoader):
        for _ in range(2):
            yield from loader

    straight = [item[0].sample_keys for item in two_epochs(data().train_dataloader())]
    assert len(set(straight)) == 10
    first = data(num_workers=workers).train_dataloader()
    steps = two_epochs(first)
    before = [next(steps)[0].sample_keys for _ in range(stop)]
    state = first.state_dict()
    second = data(num_workers=workers).train_dataloader()
    second.load_state_dict(state)
    after = []
    while len(before) + len(after) < 10:
        after += [item[0].sample_keys for item in second]
    assert before + after == straight


def test_resume_of_another_data_set_is_refused(data):
    state = data().train_dataloader().state_dict()
    with pytest.raises(ConfigError, match=r"data.seed: expected 11 .* found 12"):
        data(seed=12).train_dataloader().load_state_dict(state)


def test_shuffled_images_change_the_pictures_only(data):
    plain, shuffled = (data(shuffled_images=flag).train_dataloader().steps[0].packs[0] for flag in (False, True))
    assert torch.equal(plain.input_ids, shuffled.input_ids)
    assert not any(torch.equal(a, b) for a, b in zip(plain.images[0].images, shuffled.images[0].images, strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"val_samples": 13}, "data.val_samples: expected a multiple of 6"),
        ({"num_steps": 0}, "data.num_steps: expected a positive number, found 0"),
        ({"count_weights": (0, 0, 0, 0)}, "data.count_weights"),
        ({"hub": "x"}, "data.preset, data.hub: expected exactly one"),
        ({"preset": "huge"}, "preset: expected .*tiny"),
    ],
)
def test_bad_arguments_are_named(data, changed, message):
    with pytest.raises(ConfigError, match=message):
        data(**changed)


def test_every_validation_sees_the_same_scenes(data):
    """Also where the reader takes as many items as there are and never asks for one more, as Lightning does."""
    unseen, _ = data().val_dataloader()
    first, second = ([step[0].sample_keys for step in itertools.islice(unseen, len(unseen))] for _ in range(2))
    assert len(first) == len(unseen) > 0
    assert first == second


def test_the_next_epoch_begins_where_the_last_one_was_read_to_its_end(data):
    loader = data().train_dataloader()
    epochs = [[step[0].sample_keys for step in itertools.islice(loader, len(loader))] for _ in range(2)]
    assert [len(epoch) for epoch in epochs] == [len(loader)] * 2
    assert not set(epochs[0]) & set(epochs[1])
    assert loader.state_dict()["epoch"] == 2 and loader.state_dict()["position"] == 0
