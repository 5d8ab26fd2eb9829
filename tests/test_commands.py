"""`shard`, `index` and `fit` one after the other, as the README has them, and what their mistakes print."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import shard_sets

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "flickr8k_tiny.yaml"


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "step37_lit", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Flickr8k's, with shards and an index made of it."""
    root = tmp_path_factory.mktemp("commands")
    pictures = root / "flickr" / "Images"
    pictures.mkdir(parents=True)
    lines = ["image,caption"]
    for number in range(30):
        (pictures / f"{number:03d}.jpg").write_bytes(shard_sets.picture(number))
        lines += [f"{number:03d}.jpg,A {shard_sets.WORDS[(number + i) % 14]} near the house ." for i in range(5)]
    (root / "flickr" / "captions.txt").write_text("\n".join(lines) + "\n")
    done = run(root, "shard", "flickr", "data/flickr8k")
    assert done.returncode == 0 and "30 samples" in done.stdout, done.stderr
    done = run(root, "index", "data/flickr8k", "--config", RECIPE)
    assert done.returncode == 0 and "150 texts" in done.stdout, done.stderr
    return root


def test_shards_train_by_the_recipe(folder: Path) -> None:
    arguments = ("--trainer.max_steps", 4, "--trainer.val_check_interval", 2, "--model.warmup_steps", 1)
    done = run(folder, "fit", "--config", RECIPE, *arguments)
    assert done.returncode == 0, done.stderr
    assert "reached     step 4" in done.stdout and "val/loss" in done.stdout
    again = run(
        folder,
        "validate",
        "--config",
        RECIPE,
        "--ckpt_path",
        "runs/flickr8k_tiny/checkpoints/step_000004",
        *arguments[4:],
    )
    assert again.returncode == 0 and "val/loss" in again.stdout, again.stderr


def test_the_inspector_is_reached(folder: Path) -> None:
    done = run(folder, "shard", "--inspect", "data/flickr8k", "--config", RECIPE, "--output", "page.html")
    assert done.returncode == 0, done.stderr
    assert "flickr8k" in (folder / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("shard", "nowhere", "out"), "error: .*nowhere"),
        (("shard", "flickr", "data/flickr8k"), "error: .*data/flickr8k.*--resume"),
        (("shard", "flickr", "out", "--bad", "maybe"), "error: .*bad"),
        (("index", "pipe:touch pwned"), "error: shards: expected local paths or URLs .*, found 'pipe:touch pwned'"),
        (("index", "https://example.org/a.tar"), "error: shards: expected local paths .*https"),
        (
            ("index", "data/flickr8k", "--config", "nowhere.yaml"),
            "error: --config: expected a file",
        ),
        (("fit", "--config", RECIPE, "--data.sets", "nowhere"), "error: .*nowhere"),
        (("fit", "--config", RECIPE, "--data.prompt", "Why?"), "error: .*fingerprint .*step37_lit index"),
        (
            ("fit", "--config", RECIPE, "--data.max_length", 20),
            "error: .*flickr8k: expected texts of at most",
        ),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(folder: Path, arguments: tuple, line: str) -> None:
    before = sorted(path for path in folder.rglob("*") if "runs" not in path.parts)
    done = run(folder, *arguments)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert re.match(line, lines[0]), lines[0]
    assert sorted(path for path in folder.rglob("*") if "runs" not in path.parts) == before


def test_shards_that_are_not_all_written_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    (tmp_path / "data" / "flickr8k" / "writing.json").write_text("{}")
    for arguments in (("index", "data/flickr8k"), ("fit", "--config", RECIPE)):
        done = run(tmp_path, *arguments)
        assert done.returncode == 2 and "--resume" in done.stderr and "writing.json" in done.stderr
