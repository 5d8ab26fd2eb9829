"""Shared fixtures: threads, seed, one process with megatron's parallel state."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from browser import Browser, find_chromium

SEED = int(os.environ.get("STEP37_TEST_SEED", "20261124"))


def pytest_report_header() -> str:
    return f"seed: {SEED} (STEP37_TEST_SEED changes it)"


# Tiny tensors gain nothing from more threads, and lose much where the cores are shared.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    """This process as a world of its own."""
    from step37_lit.megatron import process

    process.initialize()
    yield
    process.shutdown()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium on this machine")
    with Browser(executable, tmp_path_factory.mktemp("profile")) as browser:
        yield browser
