"""Every CUDA stand-in is needed: megatron's own code runs with all of them and fails without each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for machines without CUDA")

PROBE = Path(__file__).with_name("cuda_names_probe.py")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """Name left out -> "ok" or the layout and error."""
    run = subprocess.run([sys.executable, PROBE], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_megatron_trains_with_all_stand_ins(outcomes: dict[str, str]) -> None:
    """One rank, PP2, EP2, TP2 with SP, EP2 and ETP2: DDP, schedule, clipping, distributed optimizer."""
    assert outcomes["nothing"] == "ok"


def test_no_stand_in_is_superfluous(outcomes: dict[str, str]) -> None:
    assert len(outcomes) > 5
    superfluous = [name for name, outcome in outcomes.items() if name != "nothing" and outcome == "ok"]
    assert superfluous == []


def test_a_users_own_cuda_device_still_fails() -> None:
    """Outside `cpu_for_cuda` the word "cuda" is not bent."""
    from step37_lit.megatron import cuda_names

    cuda_names.install()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with cuda_names.cpu_for_cuda():
        assert torch.zeros(1, device="cuda").device.type == "cpu"
