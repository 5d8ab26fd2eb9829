"""Positions restart in each sub-sequence.

Rotary embedding only knows distances, so logits do not show it: the positions that the table is made of are checked.
"""

from __future__ import annotations

import pytest
import torch

from step37_lit.config import Step37Config
from step37_lit.megatron.build import build_model
from step37_lit.model import step37_model
from step37_lit.model.packing import restarting_positions

EXPECTED = [0, 1, 2, 0, 0, 1]


def test_restarting_positions() -> None:
    positions = restarting_positions(torch.tensor([0, 3, 4, 6], dtype=torch.int32), 6)
    assert positions.dtype == torch.int64
    assert positions.tolist() == [EXPECTED]


def test_the_model_makes_its_rotary_table_of_them(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = step37_model.rotary_table

    def watched(text, position_ids):
        seen.append(position_ids.tolist())
        return original(text, position_ids)

    monkeypatch.setattr(step37_model, "rotary_table", watched)
    model = build_model(Step37Config.preset("tiny"))
    model(torch.arange(20, 26)[None], cu_seqlens=torch.tensor([0, 3, 4, 6], dtype=torch.int32))
    assert seen == [[EXPECTED]]
