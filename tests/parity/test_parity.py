"""Forward and backward equal `transformers`' independent implementation, feature by feature.

`mutations.py` beside this file takes each feature out of the model and shows that a case here notices.
"""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="transformers is the oracle of these tests (extra `test`)")

from step37_lit.batch import PackedBatch
from tests.parity.cases import CASES, Case
from tests.parity.compare import COSINE_TOLERANCE, LOGITS_TOLERANCE, NORM_TOLERANCE, SEED, differences, reference

LOSS_TOLERANCE = 1e-6  # of a sample's loss in a pack and alone; measured 8.3e-8


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle(case: Case, one_rank: None, record_property) -> None:
    expected = reference(case.name)
    found = differences(expected, expected.model())
    record_property("differences", str(found))
    print(f"{case.name}, seed {SEED}: {found}")
    assert found.logits <= LOGITS_TOLERANCE
    assert found.argmax == 0
    assert found.cosine <= COSINE_TOLERANCE, found.worst
    assert found.norm <= NORM_TOLERANCE, found.worst


@pytest.mark.parametrize("name", ["everything", "crops", "all_sliding"])
def test_a_pack_gives_the_losses_of_its_samples(name: str, one_rank: None) -> None:
    expected = reference(name)
    model = expected.model()
    alone = [_losses(model, [sample])[0] for sample in expected.samples]
    packed = _losses(model, expected.samples)
    turned = _losses(model, expected.samples[::-1])[::-1]
    worst = max(abs(a / b - 1) for others in (packed, turned) for a, b in zip(others, alone, strict=True) if b)
    print(name, worst)
    assert worst <= LOSS_TOLERANCE


def _losses(model, samples) -> list[float]:
    batch = PackedBatch.from_samples(samples)
    per_token = model(**batch.model_inputs())[0].detach()
    return [float(part.double().sum()) for part in per_token.split(batch.cu_seqlens.diff().tolist())]
