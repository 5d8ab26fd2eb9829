"""Every kind of damage is one line that names the file, before anything is read; the previous checkpoint is taken."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from step37_lit import resume
from step37_lit.checkpoint import folder
from step37_lit.checkpoint.manifest import MANIFEST, hash_file, read_manifest, verify
from step37_lit.checkpoint.metadata import read_metadata
from step37_lit.checkpoint.tensors import Part, Sharded, TensorFolder
from step37_lit.errors import ConfigError
from step37_lit.megatron.checkpointing import TRAINING_FILE, read_training_state
from tests.checkpoints.damages import SMALL, WEIGHT, damage, write


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoints" / "step_000001")


def names(checkpoint: Path) -> list[str]:
    return [*read_manifest(checkpoint).files, MANIFEST]


def test_what_is_written_is_read_to_the_bit(checkpoint: Path) -> None:
    verify(checkpoint)
    tensors = TensorFolder(checkpoint / "model")
    assert torch.equal(tensors.tensor("weight"), WEIGHT) and torch.equal(tensors.tensor("bias"), SMALL)
    assert tensors.dtype("bias") == torch.bfloat16
    part = torch.zeros(5, 2)
    tensors.read({"weight": Sharded((10, 6), (Part.of(part, (2, 3)),))})  # over the border of the two halves
    assert torch.equal(part, WEIGHT[2:7, 3:5])


@pytest.mark.parametrize("kind", damage())
def test_damage_is_one_line_that_names_the_file(checkpoint: Path, kind: str) -> None:
    act, line = damage()[kind]
    act(checkpoint)
    before = {path: path.stat().st_mtime_ns for path in checkpoint.parent.rglob("*")}
    with pytest.raises(ConfigError) as refused:
        verify(checkpoint)
    assert line in str(refused.value) and "\n" not in str(refused.value)
    assert {path: path.stat().st_mtime_ns for path in checkpoint.parent.rglob("*")} == before


@pytest.mark.parametrize("kind", damage())
def test_auto_takes_the_one_before_and_must_does_not(checkpoint: Path, kind: str) -> None:
    parent = checkpoint.parent
    second = write(parent / "step_000002", 2)
    assert resume.choose("auto", parent.parent).path == second
    damage()[kind][0](second)
    chosen = resume.choose("auto", parent.parent)
    if kind == "flipped":  # tensors are hashed by the ranks, which have the other one to fall back to
        assert (chosen.path, list(chosen.fallbacks)) == (second, [checkpoint])
        return
    assert chosen.path == checkpoint
    assert any("passed over" in line for line in chosen.lines) and "step 1, epoch 0" in chosen.lines[-1]
    shutil.rmtree(checkpoint)
    if read_or_none(second):
        for mode in ("auto", "must"):
            with pytest.raises(ConfigError, match="good checkpoint"):
                resume.choose(mode, parent.parent)
    assert resume.choose("never", parent.parent).path is None


def read_or_none(checkpoint: Path) -> bool:
    try:
        read_manifest(checkpoint)
    except ConfigError:
        return False
    return True


def test_must_and_auto_without_any(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must: a good checkpoint"):
        resume.choose("must", tmp_path)
    chosen = resume.choose("auto", tmp_path)
    assert chosen.path is None and "begins at step 0" in chosen.lines[0]


class Payload:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.file),))


def reseal(checkpoint: Path, name: str) -> None:
    """What an attacker does: the manifest says what the planted file is."""
    manifest = read_manifest(checkpoint)
    files = {**manifest.files, name: hash_file(checkpoint / name)}
    (checkpoint / MANIFEST).write_text(dataclasses.replace(manifest, files=files).to_json())
    verify(checkpoint)


@pytest.mark.parametrize("name", ["model/.metadata", "model/__0_0.distcp", TRAINING_FILE])
def test_a_planted_pickle_does_not_run(checkpoint: Path, name: str) -> None:
    ran = checkpoint.parent / "ran"
    size = (checkpoint / name).stat().st_size
    planted = pickle.dumps(Payload(ran))
    (checkpoint / name).write_bytes(planted + b"\0" * (size - len(planted)))
    reseal(checkpoint, name)
    with pytest.raises(ConfigError) as refused:
        read_training_state(checkpoint)
        TensorFolder(checkpoint / "model").tensor("weight")
    assert str(checkpoint / Path(name).parent) in str(refused.value) and "\n" not in str(refused.value)
    assert not ran.exists()
    if name == "model/.metadata":
        pickle.loads(planted)
        assert ran.exists()  # the payload works where it is let


def test_metadata_that_points_elsewhere(checkpoint: Path) -> None:
    file = checkpoint / "model" / ".metadata"
    good = file.read_bytes()
    for path in ("../optimizer/__0_0.distcp", "/etc/passwd", "gone.distcp"):
        metadata = pickle.loads(good)
        for info in metadata.storage_data.values():
            info.relative_path = path
        file.write_bytes(pickle.dumps(metadata))
        with pytest.raises(ConfigError, match=r"\.metadata: checkpoint: expected"):
            read_metadata(file.parent)
    metadata = pickle.loads(good)
    metadata.state_dict_metadata["weight"].chunks.pop()
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match="weight: 60 numbers, found"):
        read_metadata(file.parent)


def test_tensors_that_are_not_as_described(checkpoint: Path) -> None:
    tensors = TensorFolder(checkpoint / "model")
    target = torch.zeros(10, 7)
    with pytest.raises(ConfigError, match=r"weight of shape \[10, 7\], found \[10, 6\]"):
        tensors.read({"weight": Sharded((10, 7), (Part.of(target, (0, 0)),))})
    with pytest.raises(ConfigError, match=r"other of shape \[10, 7\], found None"):
        tensors.read({"other": Sharded((10, 7), (Part.of(target, (0, 0)),))})
    file = checkpoint / "model" / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ConfigError, match=r"tensors as \.metadata describes them"):
        TensorFolder(checkpoint / "model").tensor("bias")


def test_a_failed_save_leaves_the_others(checkpoint: Path) -> None:
    """An error at any moment of a save, and what a killed one leaves behind."""
    parent = checkpoint.parent
    before = {name: hash_file(checkpoint / name) for name in names(checkpoint)}
    for error in (RuntimeError("no"), OSError(28, "No space left on device")):
        with pytest.raises((RuntimeError, ConfigError)), folder.staging(checkpoint) as staged:
            (staged / "half").write_text("half")
            raise error
        assert sorted(path.name for path in parent.iterdir()) == ["latest", "step_000001"]
    (parent / ".step_000009.part" / "model").mkdir(parents=True)
    (parent / ".latest.part").write_text("half")
    checkpoint.rename(parent / ".step_000001.old")  # killed between the two renames of a replaced checkpoint
    folder.recover(parent)
    assert sorted(path.name for path in parent.iterdir()) == ["latest", "step_000001"]
    assert {name: hash_file(checkpoint / name) for name in names(checkpoint)} == before


def test_pruning(tmp_path: Path) -> None:
    for step in range(1, 8):
        write(tmp_path / f"step_{step:06d}", step)
    folder.prune(tmp_path, keep_last=2, keep_every=3, keep=["step_000001"])
    left = [each.path.name for each in folder.list_checkpoints(tmp_path)]
    assert left == [f"step_{step:06d}" for step in (7, 6, 3, 1)]
