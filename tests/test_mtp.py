"""MTP layers: shifts inside each sample, one objective with the main loss, what is refused; parity is in `parity/`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from training import MTP_TEXT, TinyData, module_arguments, trainer_arguments
from training import sample as training_sample

from step37_lit import ConfigError, MegatronStrategy, PackedBatch, Step37Config, Step37LitModule
from step37_lit.batch import Sample
from step37_lit.megatron import data_parallel, schedule
from step37_lit.megatron.build import build_model
from step37_lit.model.packing import following


def test_following() -> None:
    values = torch.arange(1, 9)
    borders = torch.tensor([0, 0, 3, 4, 8], dtype=torch.int32)
    once = following(values, borders)
    assert once.tolist() == [2, 3, 0, 0, 6, 7, 8, 0]
    assert following(once, borders).tolist() == [3, 0, 0, 0, 7, 8, 0, 0]
    wide = following(values.float().view(8, 1, 1).expand(8, 1, 2), borders)
    assert torch.equal(wide[:, 0, 1], once.float())


# ---- the objective ----


def tiny(mtp_loss_weight: float = 0.3, **text: object) -> Step37LitModule:
    fields = MTP_TEXT | {"mtp_loss_weight": mtp_loss_weight} | text
    return Step37LitModule(**module_arguments(text=fields))


def packs() -> list[PackedBatch]:
    """Two packs of three samples that are learnt from their first token to their last."""
    samples = [training_sample(number, 4) for number in range(6)]
    learnt = [dataclasses.replace(sample, loss_mask=torch.ones(len(sample))) for sample in samples]
    return [PackedBatch.from_samples(learnt[first : first + 3], pad_to=72) for first in (0, 3)]


def test_the_objective_is_the_main_loss_and_the_weighted_mean_of_the_others(one_rank: None) -> None:
    """Gradients of a step against autograd over losses that are computed from the logits by hand."""
    batches, weight = packs(), 0.3
    config = tiny(weight).config
    model = build_model(config, seed=5)
    sums = torch.zeros(3, dtype=torch.float64)
    counts = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        logits = model(**batch.model_inputs(labels=False), with_mtp=True)
        for sample, rows in zip(batch.samples(), logits.split(batch.cu_seqlens.diff().tolist(), 1), strict=False):
            for head in range(3):
                ahead = head + 1
                targets, mask = sample.input_ids[ahead:], sample.loss_mask[ahead:]
                each = F.cross_entropy(rows[head, : len(targets)], targets, reduction="none")
                sums[head] = sums[head] + (each * mask).sum()
                counts[head] += mask.sum()
    means = sums / counts
    assert counts[0] > counts[1] > counts[2] > 0
    (means[0] + weight * means[1:].mean()).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    (ddp,) = data_parallel.wrap(model)
    result = schedule.train_step([ddp], batches)
    assert float(result.loss) == pytest.approx(float(means[0]), rel=1e-6)
    assert result.mtp_losses.tolist() == pytest.approx(means[1:].tolist(), rel=1e-6)
    assert result.learnt_tokens == int(counts[0])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.main_grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
        assert not name.startswith("mtp.") or parameter.main_grad.any(), name


def test_the_main_loss_is_the_same_with_and_without(one_rank: None) -> None:
    """Weights that both models have start alike, so forward gives the same bits, and so does a step of weight 0."""
    batches = packs()
    models = [build_model(tiny(0.0, mtp=on).config, seed=5) for on in (True, False)]
    names = [set(dict(model.named_parameters())) for model in models]
    assert names[1] < names[0] and all(name.startswith("mtp.") for name in names[0] - names[1])
    with torch.no_grad():
        rows = [model(**batches[0].model_inputs()) for model in models]
        logits = [model(**batches[0].model_inputs(labels=False)) for model in models]
    assert torch.equal(*rows) and torch.equal(*logits) and rows[0].shape == (1, 72)
    wrapped = [data_parallel.wrap(model) for model in models]
    results = [schedule.train_step(ddps, batches) for ddps in wrapped]
    assert results[0].loss == results[1].loss
    assert [len(result.mtp_losses) for result in results] == [2, 0]
    on = dict(models[0].named_parameters())
    for name, parameter in models[1].named_parameters():
        assert torch.equal(parameter.main_grad, on[name].main_grad), name


def test_samples_that_are_too_short_have_no_mtp_loss(one_rank: None) -> None:
    sample = Sample("short", torch.tensor([11, 12, 13]), torch.tensor([0.0, 0.0, 1.0]))
    (ddp,) = data_parallel.wrap(build_model(tiny().config, seed=5))
    result = schedule.train_step([ddp], [PackedBatch.from_samples([sample, sample])])
    assert torch.isfinite(result.loss) and torch.isfinite(result.mtp_losses[0])
    assert torch.isnan(result.mtp_losses[1])
    assert all(torch.isfinite(parameter.main_grad).all() for parameter in ddp.module.parameters())


def test_training_lowers_every_loss_and_logs_it(tmp_path: Path) -> None:
    losses: list[list[float]] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, *args) -> None:
            metrics = trainer.callback_metrics
            losses.append([float(metrics[f"train/{name}"]) for name in ("loss", "mtp_loss_1", "mtp_loss_2")])

    arguments = trainer_arguments(tmp_path, max_steps=20)
    trainer = pl.Trainer(strategy=MegatronStrategy(), callbacks=[Keep()], **arguments)
    lit = Step37LitModule(**module_arguments(text=MTP_TEXT, lr=1e-2))
    trainer.fit(lit, datamodule=TinyData(steps=20))
    firsts, lasts = (torch.tensor(part).mean(0) for part in (losses[:4], losses[-4:]))
    assert bool((lasts < firsts - 0.02).all()), (firsts, lasts)


# ---- building and refusing ----


def test_the_language_model_freezes_with_its_mtp_layers(one_rank: None) -> None:
    model = build_model(tiny().config)
    model.freeze(freeze_language_model=True)
    assert not any(parameter.requires_grad for parameter in model.mtp.parameters())


def test_refused(one_rank: None) -> None:
    with pytest.raises(ConfigError, match=r"text\.mtp: expected false \(num_mtp_layers is 0\), found True"):
        Step37Config.preset("tiny", mtp=True)
    with pytest.raises(ConfigError, match=r"text\.mtp_loss_weight: expected 0 or more, found -1"):
        Step37Config.preset("tiny", mtp_loss_weight=-1)
