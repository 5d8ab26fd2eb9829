"""MTP layers, forward and backward, equal those that `transformers` drafts with, and mistakes in them are noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("transformers", reason="transformers is the oracle of these tests (extra `test`)")


import torch
from torch import Tensor, nn

from step37_lit.batch import PackedBatch, Sample
from step37_lit.model import mtp
from step37_lit.model.packing import following
from step37_lit.model.step37_model import Step37Model
from tests.parity.compare import SEED
from tests.parity.mtp_compare import (
    CASES,
    LAYERS,
    differences,
    hub_gradients,
    our_model,
    per_sample,
    reference,
)


@pytest.mark.parametrize("name", CASES)
def test_every_head_equals_the_oracle(name: str, one_rank: None, record_property) -> None:
    expected = reference(name)
    model = our_model(expected)
    found = differences(expected, model)
    record_property("differences", str(found))
    print(f"{name}, seed {SEED}: {found}")
    assert found.within, found
    gradients = hub_gradients(model)
    assert set(gradients) == {name for name in expected.gradients if not name.endswith("router_bias")}
    own = [weight.grad for name, weight in model.named_parameters() if name.startswith("mtp.")]
    assert len(own) == LAYERS * 14
    assert all(float(gradient.norm()) > 0 for gradient in own)


def no_norm(name: str) -> Callable[[pytest.MonkeyPatch, nn.Module], None]:
    def change(patch: pytest.MonkeyPatch, model: nn.Module) -> None:
        for layer in model.mtp.layers:
            patch.setattr(layer, name, nn.Identity())

    return change


def swapped_halves(patch: pytest.MonkeyPatch, model: nn.Module) -> None:
    for layer in model.mtp.layers:
        halves = layer.eh_proj.weight.detach().chunk(2, dim=1)
        patch.setattr(layer.eh_proj, "weight", nn.Parameter(torch.cat(halves[::-1], dim=1)))


def function(name: str, replacement: Callable) -> Callable[[pytest.MonkeyPatch, nn.Module], None]:
    return lambda patch, model: patch.setattr(mtp, name, replacement)


def words_for_images(patch: pytest.MonkeyPatch, model: nn.Module) -> None:
    """Embeddings of the `<im_patch>` tokens as inputs where images belong."""
    original = Step37Model.forward_head
    block = mtp.MTPBlock.forward
    seen: dict[str, Tensor] = {}

    def keep(self, input_ids, images=None, position_ids=None):
        seen["words"] = self.embedding(input_ids=input_ids, position_ids=position_ids)
        return original(self, input_ids, images, position_ids)

    patch.setattr(Step37Model, "forward_head", keep)
    patch.setattr(mtp.MTPBlock, "forward", lambda self, fused, *rest: block(self, seen["words"], *rest))


def one_head_for_all(patch: pytest.MonkeyPatch, model: nn.Module) -> None:
    for layer in model.mtp.layers:
        patch.setattr(layer, "output_layer", model.output_layer)


def decoders_hidden(patch: pytest.MonkeyPatch, model: nn.Module) -> None:
    """Every layer reads the decoder's hidden states, none the layer's before it."""
    original = mtp.MTPLayer.forward
    first: list[Tensor] = []

    def forward(self, embeddings, hidden, *rest):
        first[:] = [hidden] if self is model.mtp.layers[0] else first
        return original(self, embeddings, first[0], *rest)

    patch.setattr(mtp.MTPLayer, "forward", forward)


MUTATIONS = {
    "no enorm": no_norm("enorm"),
    "no hnorm": no_norm("hnorm"),
    "no shared_head.norm": no_norm("final_layernorm"),
    "hidden before embedding": swapped_halves,
    "inputs and labels not shifted": function("following", lambda values, cu_seqlens: values),
    "shifted over the borders": function("following", lambda values, cu_seqlens: values.roll(-1, 0)),
    "shifted by two": function("following", lambda values, borders: following(following(values, borders), borders)),
    "words for images": words_for_images,
    "the main head for all": one_head_for_all,
    "the decoder's hidden states for all": decoders_hidden,
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_oracle_notices(name: str, one_rank: None) -> None:
    expected = reference("images")
    model = our_model(expected)
    with pytest.MonkeyPatch.context() as patch:
        MUTATIONS[name](patch, model)
        parameters = dict(model.named_parameters())
        assert parameters
        found = differences(expected, model)
    print(f"{name}: {found}")
    assert not found.within


def test_a_pack_gives_what_its_samples_give(one_rank: None) -> None:
    expected = reference("images")
    model = our_model(expected)

    def losses(samples: list[Sample], pad_to: int | None = None) -> list[Tensor]:
        batch = PackedBatch.from_samples(samples, pad_to)
        with torch.no_grad():
            rows = model(**batch.model_inputs(), with_mtp=True)
        parts = per_sample(rows, batch)
        assert all(not part.any() for part in parts[len(samples) :])  # the padded tail
        return parts[: len(samples)]

    alone = [losses([sample])[0] for sample in expected.samples]
    for packed in (losses(expected.samples, pad_to=200), losses(expected.samples[::-1])[::-1]):
        for found, own in zip(packed, alone, strict=True):
            torch.testing.assert_close(found, own, rtol=2e-5, atol=2e-5)
            for head in range(1 + LAYERS):
                assert not found[head, max(len(own[0]) - 1 - head, 0) :].any()  # no label behind the sample's end


def test_another_sample_changes_nothing(one_rank: None) -> None:
    """Losses of the first sample, with each of two others behind it: equal to the last bit."""
    expected = reference("images")
    model = our_model(expected)
    first, *others = [sample for sample in expected.samples if not sample.images]
    rows = []
    for other in others[:2]:
        tail = Sample("tail", other.input_ids[:1].repeat(30), torch.ones(30))
        with torch.no_grad():
            batch = PackedBatch.from_samples([first, tail])
            rows.append(per_sample(model(**batch.model_inputs(), with_mtp=True), batch)[0])
    assert not torch.equal(others[0].input_ids[:1], others[1].input_ids[:1])
    assert torch.equal(*rows)
