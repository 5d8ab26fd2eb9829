"""The contract of `Step37Model`: members, arguments, shapes, errors. Its numbers are tested in `parity/`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from step37_lit.batch import ImageForInsert, PackedBatch, Sample
from step37_lit.config import Step37Config
from step37_lit.megatron.build import build_model
from step37_lit.model.step37_model import Step37Model
from step37_lit.presets import TINY_TOKENS as TOKENS


@pytest.fixture(scope="module")
def config() -> Step37Config:
    return Step37Config.preset("tiny_moe")


@pytest.fixture(scope="module")
def model(config: Step37Config, one_rank: None) -> Step37Model:
    return build_model(config, seed=1)


def sample(config: Step37Config, seed: int, length: int = 30) -> Sample:
    """A picture and `length` words, the last half of them learnt."""
    generator = torch.Generator().manual_seed(seed)
    side = config.vision.image_size
    patches = [TOKENS.im_patch] * config.vision.num_tokens(side)
    words = torch.randint(16, config.text.vocab_size, (length,), generator=generator).tolist()
    ids = [TOKENS.im_start, *patches, TOKENS.im_end, *words]
    pixels = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=generator)
    mask = torch.zeros(len(ids))
    mask[-length // 2 :] = 1
    return Sample(str(seed), torch.tensor(ids), mask, [ImageForInsert(TOKENS.im_start, pixels)])


@pytest.fixture
def batch(config: Step37Config) -> PackedBatch:
    return PackedBatch.from_samples([sample(config, seed, length) for seed, length in ((1, 30), (2, 11), (3, 70))])


def test_logits_and_losses(model: Step37Model, config: Step37Config, batch: PackedBatch) -> None:
    total = batch.input_ids.shape[1]
    logits = model(**batch.model_inputs(labels=False))
    assert logits.shape == (1, total, config.text.vocab_size)
    losses = model(**batch.model_inputs())
    assert losses.shape == (1, total) and losses.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(logits[0], batch.labels[0], reduction="none") * batch.loss_mask[0]
    torch.testing.assert_close(losses[0], expected, rtol=0, atol=1e-5)


def test_borders_may_come_in_either_form(model: Step37Model, batch: PackedBatch) -> None:
    inputs = batch.model_inputs(labels=False)
    expected = model(**inputs)
    cu = inputs.pop("cu_seqlens")
    packed = PackedSeqParams("thd", cu_seqlens_q=cu, cu_seqlens_kv=cu)
    assert torch.equal(model(**inputs, packed_seq_params=packed), expected)
    inputs["position_ids"] = None  # restart at 0 in each sub-sequence
    assert torch.equal(model(**inputs, cu_seqlens=cu), expected)
    with pytest.raises(ValueError, match="cu_seqlens and packed_seq_params differ"):
        other = torch.tensor([0, 5, int(cu[-1])], dtype=torch.int32)
        model(**inputs, cu_seqlens=other, packed_seq_params=packed)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [([0, 5], "from 0 to T = 8, found"), ([1, 8], "from 0 to T = 8, found"), ([0, 6, 4, 8], "ascending borders")],
)
def test_borders_that_do_not_fit(model: Step37Model, cu_seqlens: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(torch.arange(16, 24)[None], cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32))


def test_arguments_that_compute_nothing_are_refused(model: Step37Model) -> None:
    row = torch.arange(16, 24)[None]
    for name in ("attention_mask", "inference_params", "pixel_values"):
        with pytest.raises(ValueError, match=f"{name}: expected None"):
            model(row, **{name: torch.zeros(1)})
    with pytest.raises(ValueError, match=r"input_ids: expected \[1, T\], found \[2, 8\]"):
        model(row.repeat(2, 1))


def test_encoded_images_give_the_same_and_pixels_stay(model: Step37Model, batch: PackedBatch) -> None:
    inputs = batch.model_inputs(labels=False)
    expected = model(**inputs)
    encoded = model._encode_images_for_insert(batch.images)
    assert all(entry.image_features is not None for entry in encoded)
    assert all(entry.image_features is None for entry in batch.images)
    assert [e.insert_start_token for e in encoded] == [e.insert_start_token for e in batch.images]
    inputs["images"] = encoded
    torch.testing.assert_close(model(**inputs), expected, rtol=0, atol=1e-6)


def test_float_images_are_taken_as_normalised(model: Step37Model, batch: PackedBatch) -> None:
    from step37_lit.model.vision_tower import CLIP_MEAN, CLIP_STD

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    inputs = batch.model_inputs(labels=False)
    expected = model(**inputs)
    inputs["images"] = [
        dataclasses.replace(e, images=(e.images / 255 - mean) / std) for e in batch.images if e.images is not None
    ]
    torch.testing.assert_close(model(**inputs), expected, rtol=0, atol=1e-4)


def test_forward_head_is_the_fused_row(model: Step37Model, config: Step37Config, batch: PackedBatch) -> None:
    fused = model.forward_head(batch.input_ids, batch.images)
    assert fused.shape == (batch.input_ids.shape[1], 1, config.text.hidden_size)
    words = model.embedding.word_embeddings.weight[batch.input_ids[0]]
    is_image = batch.input_ids[0] == TOKENS.im_patch
    assert torch.equal(fused[~is_image, 0], words[~is_image])
    assert not torch.isclose(fused[is_image, 0], words[is_image]).all(-1).any()


@pytest.mark.parametrize(
    "parts", [("language_model",), ("vision_model",), ("vision_projection",), ("vision_model", "vision_projection")]
)
def test_freeze(config: Step37Config, one_rank: None, parts: tuple[str, ...]) -> None:
    model = build_model(config)
    model.freeze(**{f"freeze_{part}": True for part in parts})
    prefixes = {
        "language_model": ("embedding.", "decoder.", "output_layer."),
        "vision_model": ("vision_model.",),
        "vision_projection": ("align_projector.",),
    }
    frozen = tuple(prefix for part in parts for prefix in prefixes[part])
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is not name.startswith(frozen), name


def test_stages_hold_their_parts(config: Step37Config, one_rank: None) -> None:
    last = build_model(config, pre_process=False)
    assert last.vision_model is None and not hasattr(last, "embedding")
    first = build_model(config, post_process=False)
    assert first.vision_model is not None and not hasattr(first, "output_layer")
    assert first.shared_embedding_or_output_weight() is first.embedding.word_embeddings.weight
    assert last.shared_embedding_or_output_weight() is last.output_layer.weight
    hidden = torch.randn(8, 1, config.text.hidden_size)
    last.set_input_tensor([hidden])
    row = torch.arange(16, 24)[None]
    assert last(row).shape == (1, 8, config.text.vocab_size)
    assert first(row).shape == hidden.shape


def test_weights_depend_on_seed_and_name_alone(config: Step37Config, one_rank: None) -> None:
    first, again, other = (dict(build_model(config, seed=s).named_parameters()) for s in (7, 7, 8))
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        is_drawn = weight.dim() >= 2
        assert torch.equal(weight, other[name]) is not is_drawn, name


def test_router_bias_gets_no_gradient_but_moves_the_choice(config: Step37Config, one_rank: None) -> None:
    model = build_model(config, seed=1)
    router = model.decoder.layers[2].mlp.router
    assert "expert_bias" not in dict(router.named_parameters())
    hidden = torch.randn(5, 1, config.text.hidden_size)
    weights, chosen = router(hidden)
    router.expert_bias[3] = 10.0  # wins every choice, and weighs nothing
    biased, chosen_now = router(hidden)
    assert bool(chosen_now[:, 3].all()) and not bool(chosen[:, 3].all())
    torch.testing.assert_close(biased.sum(-1), weights.sum(-1))
