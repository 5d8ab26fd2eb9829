"""Dumps of faults: what is written is what is read, damaged ones are refused, and `replay` says what the step does."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from step37_lit import commands
from step37_lit.batch import ImageForInsert, PackedBatch
from step37_lit.checkpoint.manifest import MANIFEST, files_below, hash_files, read_manifest
from step37_lit.fault_dump import BATCH, FAULT_FILE, WEIGHTS, read_dump, write_batch
from step37_lit.faults import TrainingFault
from step37_lit.replay import load_model, run_again
from tests.reliability.exact_resume import fit, save_at
from tests.training import MTP_TEXT, Steps

POISONED = "decoder.layers.1.mlp.linear_fc2"


class PoisonedWeight(pl.Callback):
    def on_train_batch_start(self, trainer: Any, lit: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            with torch.no_grad():
                lit.model.get_parameter(f"{POISONED}.weight")[3, 5] = math.inf


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with MTP layers that a weight has stopped at step 3, and its checkpoint of step 2."""
    root = tmp_path_factory.mktemp("run")
    callbacks = [PoisonedWeight(), save_at(2, root)]
    with pytest.raises(TrainingFault):
        fit(root, 5, callbacks, module={"text": MTP_TEXT, "freeze_vision_model": True}, enable_checkpointing=True)
    return root


@pytest.fixture
def dump(run: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(run / "faults" / "step_000003", tmp_path / "step_000003")


def replay(*args: str | Path) -> int:
    return commands.run("replay", list(map(str, args)))


def test_a_dump_has_the_batch_and_the_circumstances(run: Path) -> None:
    read = read_dump(run / "faults" / "step_000003")
    for pack, own in zip(read.packs, Steps(40, 4, 0, 1, seed=1)[2], strict=True):  # the data of `fit`
        assert_same(pack, own)
    assert read.fault.step == 3 and read.fault.what == f"weight {POISONED}.weight not finite (1 of 2048 numbers)"
    assert read.circumstances.checkpoint is None and read.circumstances.dtype == "float32"
    assert all(name.startswith("vision_model.") for name in read.circumstances.frozen) and read.circumstances.frozen
    assert set(read.random) == {"cpu"}


def assert_same(pack: PackedBatch, other: PackedBatch) -> None:
    for name in ("input_ids", "labels", "loss_mask", "position_ids", "cu_seqlens"):
        assert torch.equal(getattr(pack, name), getattr(other, name)), name
    assert (pack.max_seqlen, pack.sample_keys) == (other.max_seqlen, other.sample_keys)
    assert list(pack.attribute_spans) == list(other.attribute_spans)
    assert all(torch.equal(pack.attribute_spans[kind], span) for kind, span in other.attribute_spans.items())
    for image, own in zip(pack.images, other.images, strict=True):
        assert image.insert_start_token == own.insert_start_token and image.rope_max_seq_len == own.rope_max_seq_len
        for name in ("images", "image_features", "rope_cu_seqlens"):
            one, another = getattr(image, name), getattr(own, name)
            assert one is another is None or torch.equal(one, another), name


def test_every_field_of_a_pack_is_kept(dump: Path) -> None:
    read = read_dump(dump)
    pack, token = read.packs[0], read.packs[0].images[0].insert_start_token
    given, count = pack.images[0], pack.images[0].num_images
    features = torch.randn(count - 1, 1, 8).bfloat16()
    borders = torch.arange(count, dtype=torch.int32)
    images = [ImageForInsert(token, given.images[:1]), ImageForInsert(token, None, features, borders, 17)]
    read.packs[0] = changed = PackedBatch(**{**vars(pack), "images": images})
    write_batch(read, None)
    assert not (dump / WEIGHTS).exists()  # they were those of another dump
    assert_same(read_dump(dump).packs[0], changed)


def test_replay_brings_a_weight_back(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = run / "faults" / "step_000003"
    assert replay(place) == 0
    out = capsys.readouterr().out
    assert f"not finite  weight: {POISONED}.weight\n" in out
    assert f"not finite  first output: {POISONED} (pack 0)\n" in out
    assert "reproduced  yes: weight" in out
    assert replay(place, "--weights", run / "at2.ckpt") == 1
    out = capsys.readouterr().out
    assert "\nnot finite" not in out and "\nreproduced  no, " in out
    assert "gradient" in out and "vision_model" not in out  # which is frozen


def test_replay_computes_what_the_step_computed(run: Path) -> None:
    """Losses and gradients of the run's own step, from the checkpoint before it."""

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: Any, lit: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen = float(outputs["loss"]), trainer.optimizers[0].grad_norm, lit._result.mtp_losses.tolist()

    keep = Keep()
    module = {"text": MTP_TEXT, "freeze_vision_model": True}
    fit(run, 3, [keep], module=module, ckpt_path=run / "at2.ckpt")
    read = read_dump(run / "faults" / "step_000003")
    model, _ = load_model(read, run / "at2.ckpt")
    again = run_again(model, read.packs)
    loss, norm, mtp = keep.seen
    # Measured: 0, 2e-7, 0.
    assert again.loss == pytest.approx(loss, rel=1e-6)
    assert again.grad_norm == pytest.approx(norm, rel=1e-5)
    assert list(again.mtp_losses) == pytest.approx(mtp, rel=1e-6)
    tokens = sum(sample.tokens for sample in again.samples)
    assert sum(sample.loss * sample.tokens for sample in again.samples) / tokens == pytest.approx(loss, rel=1e-6)
    assert [sample.key for sample in again.samples] == [key for pack in read.packs for key in pack.sample_keys]


def test_replay_names_the_module_whose_gradient_is_not_finite(run: Path) -> None:
    read = read_dump(run / "faults" / "step_000003")
    model, _ = load_model(read, run / "at2.ckpt")

    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0] * math.inf

    layer = model.decoder.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: (Break.apply(output[0]), *output[1:]))
    again = run_again(model, read.packs)
    assert again.output is None and math.isfinite(again.loss)
    assert again.gradient is not None and again.gradient.startswith("decoder.layers.0")
    model.zero_grad()
    for image in read.packs[1].images:
        image.images = image.images.float() * math.nan
    again = run_again(model, read.packs)
    assert again.picture == 1 and again.output is not None and again.output[1] == 1
    assert again.output[0].startswith("vision_model")


def edit(dump: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Changes a file, and the manifest with it."""
    file = dump / BATCH / name
    file.write_bytes(change(file.read_bytes()))
    names = [name for name in files_below(dump / BATCH) if name != MANIFEST]
    manifest = dataclasses.replace(read_manifest(dump / BATCH), files=hash_files(dump / BATCH, names))
    (dump / BATCH / MANIFEST).write_text(manifest.to_json())


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no dump": (lambda dump: shutil.rmtree(dump / BATCH), "DUMP: expected a folder with batch/"),
    "no manifest": (lambda dump: (dump / BATCH / MANIFEST).unlink(), "half-written"),
    "cut short": (lambda dump: cut(dump / BATCH / "rank_0.safetensors"), "bytes, found"),
    "flipped": (lambda dump: flip(dump / BATCH / "rank_0.safetensors"), "expected SHA-256"),
    "weights flipped": (lambda dump: flip(next((dump / WEIGHTS / "model").glob("*.distcp"))), "expected SHA-256"),
    "no weights": (lambda dump: shutil.rmtree(dump / WEIGHTS), "--weights: expected a checkpoint"),
    "a checkpoint": (
        lambda dump: (shutil.rmtree(dump / BATCH), shutil.copytree(dump / WEIGHTS, dump / BATCH)),
        "expected a step that was not taken",
    ),
    "no fault": (lambda dump: edit(dump, FAULT_FILE, lambda _: b"{}"), "expected what a fault is described by"),
    "a rank that is a path": (
        lambda dump: edit(dump, FAULT_FILE, lambda text: text.replace(b'"rank": 0', b'"rank": "../../0"')),
        "fault.rank: expected a rank",
    ),
    "a dtype that is none": (
        lambda dump: edit(dump, FAULT_FILE, lambda text: text.replace(b'"float32"', b'"load"')),
        "circumstances.dtype: expected float32 or bfloat16",
    ),
    "no JSON": (lambda dump: edit(dump, "rank_0.json", lambda text: text[:-9]), "expected JSON"),
    "no tensors": (lambda dump: edit(dump, "rank_0.safetensors", lambda data: data[:50]), "expected safetensors"),
    "packs that cannot be": (
        lambda dump: edit(dump, "rank_0.json", lambda text: text.replace(b'"max_seqlen": ', b'"max_seqlen": 9')),
        "packs[0].max_seqlen: expected",
    ),
    "no labels": (
        lambda dump: edit(dump, "rank_0.safetensors", lambda data: data.replace(b'"0.labels"', b'"0.babels"')),
        "expected what a fault is described by",
    ),
}  # fmt: skip


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_dump_is_one_line(damage: str, dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, named = DAMAGES[damage]
    change(dump)
    assert replay(dump) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], captured.err
    assert "found" in lines[0]


def test_weights_of_another_model_are_refused(dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, 1, [save_at(1, tmp_path)], enable_checkpointing=True)
    assert replay(dump, "--weights", tmp_path / "at1.ckpt") == 2
    assert "error: " in capsys.readouterr().err
