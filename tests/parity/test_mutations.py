"""Each mutation of `mutations.py` is noticed by its parity case."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="transformers is the oracle of these tests (extra `test`)")

from tests.parity.mutations import MUTATIONS, Mutation, broken_limits, measure


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_is_noticed(mutation: Mutation, one_rank: None) -> None:
    assert broken_limits(measure(mutation))
