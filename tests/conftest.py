"""Shared fixtures: threads, seed, one process with megatron's parallel state."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="session")
def shared_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of noise with captions, which no test changes."""
    from tests.sharding import make_source

    return make_source(tmp_path_factory.mktemp("shared") / "noise")


@pytest.fixture
def source(shared_source: Path, tmp_path: Path) -> Path:
    """A copy of them that a test may spoil."""
    return Path(shutil.copytree(shared_source, tmp_path / "noise"))


@pytest.fixture(scope="session")
def undisturbed(shared_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the shards that they become."""
    from tests.sharding import digests, shard

    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert shard(shared_source, out) == 0
    return digests(out)
