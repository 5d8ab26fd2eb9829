"""`PackedBatch`: the shift inside samples, borders, padding, order of images, attribute words, `validate`."""

import dataclasses

import pytest
import torch

from step37_lit.batch import ImageForInsert, PackedBatch, Sample
from step37_lit.errors import ConfigError
from step37_lit.presets import TINY_TOKENS as TOKENS


def sample(key: str, text: list[int], image_values: tuple[int, ...] = (), side: int = 28) -> Sample:
    """`<im_start><im_patch><im_end>` for each image, then `text`, all of which is learnt."""
    span = [TOKENS.im_start, TOKENS.im_patch, TOKENS.im_end]
    ids = torch.tensor(span * len(image_values) + text)
    mask = torch.zeros(len(ids))
    mask[3 * len(image_values) :] = 1
    images = [
        ImageForInsert(TOKENS.im_start, torch.full((1, 3, side, side), value, dtype=torch.uint8))
        for value in image_values
    ]
    return Sample(key, ids, mask, images)


@pytest.fixture
def batch() -> PackedBatch:
    return PackedBatch.from_samples(
        [sample("a", [20, 21, 22], (1,)), sample("b", [30, 31]), sample("c", [40], (2, 3))], pad_to=20
    )


def test_labels_never_cross_a_border(batch):
    assert batch.cu_seqlens.tolist() == [0, 6, 8, 15, 20] and batch.cu_seqlens.dtype == torch.int32
    assert batch.labels[0, :6].tolist() == [4, 5, 20, 21, 22, 0]
    assert batch.loss_mask[0].tolist() == [0, 0, 1, 1, 1, 0] + [1, 0] + [0] * 5 + [1, 0] + [0] * 5
    learnt = batch.loss_mask[0].bool()
    following = torch.cat([batch.input_ids[0, 1:], torch.zeros(1, dtype=torch.int64)])
    assert torch.equal(batch.labels[0][learnt], following[learnt])


def test_positions_padding_and_counts(batch):
    assert batch.position_ids[0].tolist() == [*range(6), *range(2), *range(7), *range(5)]
    assert batch.max_seqlen == 7 and batch.num_tokens == 15 and batch.num_images == 3
    assert batch.input_ids[0, 15:].eq(0).all() and batch.sample_keys == ("a", "b", "c")
    batch.validate(TOKENS)
    assert PackedBatch.from_samples([sample("a", [1, 2])]).cu_seqlens.tolist() == [0, 2]


def test_images_of_one_size_share_a_tensor_and_keep_their_order():
    samples = [
        sample("a", [20], (1, 2)),
        sample("b", [21], (3,)),
        sample("c", [22], (4,), side=56),
        sample("d", [23], (5,)),
    ]
    batch = PackedBatch.from_samples(samples)
    assert [tuple(image.images.shape) for image in batch.images] == [(3, 3, 28, 28), (1, 3, 56, 56), (1, 3, 28, 28)]
    assert [int(v) for image in batch.images for v in image.images[:, 0, 0, 0]] == [1, 2, 3, 4, 5]
    batch.validate(TOKENS)


def test_patches_between_images_do_not_reorder_them():
    def patch(value):
        return ImageForInsert(TOKENS.patch_start, torch.full((1, 3, 14, 14), value, dtype=torch.uint8))

    first = Sample("a", torch.tensor([6, 4, 8, 3, 4, 5]), torch.zeros(6), [patch(7), *sample("x", [], (1,)).images])
    second = Sample("b", torch.tensor([6, 4, 8, 3, 4, 5]), torch.zeros(6), [patch(8), *sample("x", [], (2,)).images])
    batch = PackedBatch.from_samples([first, second])
    batch.validate(TOKENS)
    by_token = {image.insert_start_token: image.images[:, 0, 0, 0].tolist() for image in batch.images}
    assert by_token == {TOKENS.patch_start: [7, 8], TOKENS.im_start: [1, 2]}


def test_attribute_spans_point_at_the_predicting_positions():
    one, two = sample("a", [20, 21, 22]), sample("b", [30, 31, 32, 33])
    one.attribute_spans = {"color": torch.tensor([[1, 2]])}
    two.attribute_spans = {"color": torch.tensor([[1, 3]]), "shape": torch.tensor([[3, 4]])}
    batch = PackedBatch.from_samples([one, two], pad_to=10)
    words = {
        kind: [batch.labels[0, a:b].tolist() for a, b in spans.tolist()]
        for kind, spans in batch.attribute_spans.items()
    }
    assert words == {"color": [[21], [31, 32]], "shape": [[33]]}
    two.attribute_spans = {"color": torch.tensor([[0, 1]])}
    with pytest.raises(ConfigError, match="sample b: attribute_spans"):
        PackedBatch.from_samples([one, two])


def test_model_inputs(batch):
    assert set(batch.model_inputs(labels=False)) == {"input_ids", "images", "cu_seqlens", "position_ids", "max_seq_len"}
    assert set(batch.model_inputs()) - set(batch.model_inputs(labels=False)) == {"labels", "loss_mask"}


def test_to_moves_every_tensor(batch):
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert all(tensor.is_meta for tensor in [*tensors, *(image.images for image in moved.images)])
    assert not batch.input_ids.is_meta


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cu_seqlens": torch.tensor([0, 6, 8, 15, 19], dtype=torch.int32)},
            r"cu_seqlens\[-1\]: expected 20 .* found 19",
        ),
        ({"cu_seqlens": torch.tensor([0, 6, 6, 15, 20], dtype=torch.int32)}, "ascending"),
        ({"cu_seqlens": torch.tensor([0, 6, 8, 15, 20])}, "torch.int32"),
        ({"max_seqlen": 8}, "max_seqlen: expected 7, found 8"),
        ({"position_ids": torch.arange(20)[None]}, r"position_ids\[0, 6\]: expected 0, found 6"),
        ({"loss_mask": torch.ones(1, 20)}, r"loss_mask\[0, 5\]: expected 0"),
        ({"labels": torch.zeros(1, 19, dtype=torch.int64)}, r"labels: expected shape \(1, 20\)"),
        ({"images": []}, "images of <im_start>: expected 3 .* found 0"),
        ({"sample_keys": ("a",)}, "sample_keys"),
    ],
)
def test_validate_names_the_field_and_the_numbers(batch, change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(batch, **change).validate(TOKENS)


def test_from_samples_refuses_what_does_not_fit():
    with pytest.raises(ConfigError, match="pad_to: expected at least the 3 tokens of the samples, found 2"):
        PackedBatch.from_samples([sample("a", [1, 2, 3])], pad_to=2)
    with pytest.raises(ConfigError, match="samples: expected at least one"):
        PackedBatch.from_samples([])
    with pytest.raises(ConfigError, match=r"sample a: loss_mask: expected shape \(2,\)"):
        PackedBatch.from_samples([Sample("a", torch.tensor([1, 2]), torch.ones(3))])
