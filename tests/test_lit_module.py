"""`Step37LitModule`'s parts: evaluation sums, swapped pictures, overrides, operation counts, learning-rate schedule."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
from training import TinyData, module_arguments, sample, trainer_arguments

from step37_lit import ConfigError, MegatronStrategy, PackedBatch, Step37Config, Step37LitModule, run_checks
from step37_lit.evaluation import EvaluationSums, swap_images
from step37_lit.flops import forward_flops
from step37_lit.lit_module import split_samples, with_overrides
from step37_lit.lr_schedule import WarmupCosine
from step37_lit.throughput import measure_gemm_peak


def pack(count: int = 3) -> PackedBatch:
    return PackedBatch.from_samples([sample(i, seed=4) for i in range(count)], pad_to=96)


def test_a_word_is_right_only_where_all_its_tokens_are() -> None:
    batch = pack()
    wrong = batch.labels.clone()
    spans = batch.attribute_spans["shape"]  # words of two tokens
    wrong[0, spans[0, 0] + 1] += 1  # the second token of the first word
    sums = EvaluationSums()
    sums.add_pack(batch, torch.ones_like(batch.loss_mask), wrong)
    colours, shapes = len(batch.attribute_spans["colour"]), len(spans)
    assert sums.words == {"colour": (colours, colours), "shape": (shapes - 1, shapes)}
    values = sums.averages("val", "_seen")
    assert values["val/loss_seen"] == pytest.approx(1.0)
    assert values["val/attribute_accuracy_seen/shape"] == pytest.approx((shapes - 1) / shapes)
    expected = (colours + shapes - 1) / (colours + shapes)
    assert values["val/attribute_accuracy_seen"] == pytest.approx(expected)


def test_sums_of_ranks_are_averaged_once() -> None:
    ranks = [EvaluationSums(2.0, 1.0, {"colour": (1, 1)}), EvaluationSums(2.0, 3.0, {"colour": (0, 3)})]
    values = EvaluationSums.total(ranks).averages("val", "")
    assert values["val/loss"] == 1.0  # and not the mean of 2 and 2/3
    assert values["val/attribute_accuracy"] == 0.25


def test_evaluation_equals_the_model_by_hand(tmp_path: Path) -> None:
    trainer = pl.Trainer(strategy=MegatronStrategy(), **trainer_arguments(tmp_path))
    lit = Step37LitModule(**module_arguments())
    found = trainer.validate(lit, datamodule=TinyData(), verbose=False)
    loss = tokens = right = words = 0.0
    for step in TinyData.val_dataloader(trainer.datamodule)[0]:
        for batch in step:
            with torch.no_grad():
                loss += float((lit.model(**batch.model_inputs()) * batch.loss_mask).sum())
                predictions = lit.model(**batch.model_inputs(labels=False)).argmax(-1)[0]
            tokens += float(batch.loss_mask.sum())
            for spans in batch.attribute_spans.values():
                for start, end in spans.tolist():
                    right += torch.equal(predictions[start:end], batch.labels[0, start:end])
                    words += 1
    assert found[0]["val/loss"] == pytest.approx(loss / tokens, rel=1e-6)
    assert found[0]["val/attribute_accuracy"] == pytest.approx(right / words)


def test_swapped_pictures_are_other_samples_pictures(tmp_path: Path) -> None:
    batch = pack(4)
    swapped = swap_images(batch)
    assert torch.equal(swapped.images[0].images, batch.images[0].images[[3, 0, 1, 2]])
    assert torch.equal(swapped.input_ids, batch.input_ids)
    losses = []
    for swap in (False, True):
        trainer = pl.Trainer(strategy=MegatronStrategy(), **trainer_arguments(tmp_path))
        lit = Step37LitModule(**module_arguments(swap_images=swap))
        losses.append(trainer.validate(lit, datamodule=TinyData(), verbose=False)[0]["val/loss"])
    assert losses[0] != losses[1]


def test_prediction_names_its_samples(tmp_path: Path) -> None:
    trainer = pl.Trainer(strategy=MegatronStrategy(), **trainer_arguments(tmp_path))
    steps = trainer.predict(Step37LitModule(**module_arguments()), datamodule=TinyData(), return_predictions=True)
    samples = [sample for step in steps for sample in step]
    assert [sample["key"] for sample in samples] == [str(i) for i in range(24)]
    assert all(sample["input_ids"].shape == sample["predictions"].shape for sample in samples)
    batch = pack()
    for (key, tokens, _), i in zip(split_samples(batch, batch.labels), range(3), strict=True):
        assert (key, len(tokens)) == (str(i), len(sample(i, seed=4)))


def test_operation_count_equals_torchs(one_rank: None) -> None:
    """torch counts the same matrix products; attention is counted by hand here, since its kernels pad."""
    lit = Step37LitModule(**module_arguments())
    lit.configure_model()
    batch = PackedBatch.from_samples([sample(0, seed=4)])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lit.model(**batch.model_inputs())
    attention = sum(
        flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" in str(op) or "bmm" in str(op)
    )
    assert forward_flops(lit.config, batch).total == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert attention < 0.1 * counter.get_total_flops()


def test_gemm_peak_is_plausible() -> None:
    assert 1e8 < measure_gemm_peak(torch.device("cpu"), torch.float32, seconds=0.05) < 1e15


def test_warmup_then_cosine() -> None:
    factor = WarmupCosine(4, 20, 0.1)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1.0
    assert factor(12) == pytest.approx(0.1 + 0.9 / 2)
    assert factor(20) == factor(500) == 0.1
    for broken in ((5, 4, 0.1), (0, 0, 0.1), (1, 2, 1.5)):
        with pytest.raises(ConfigError):
            WarmupCosine(*broken)


def test_overrides_name_what_is_wrong() -> None:
    base = Step37Config.preset("tiny")
    assert with_overrides(base, text={"moe_layers": []}, vision=None).text.moe_layers == ()
    with pytest.raises(ConfigError, match=r"model\.text\.hiden_size: .*did you mean hidden_size"):
        with_overrides(base, text={"hiden_size": 3})
    with pytest.raises(ConfigError, match=r"vision\.num_heads"):
        with_overrides(base, vision={"num_heads": 5})
    with pytest.raises(ConfigError, match=r"model\.vision"):
        with_overrides(base, vision={"num_heads": "four"})


def test_a_module_needs_no_trainer(one_rank: None) -> None:
    lit = Step37LitModule(**module_arguments())
    lit.configure_model()
    batch = pack()
    assert lit.model(**batch.model_inputs(labels=False)).shape == (1, 96, 64)


def test_data_made_for_another_model_is_refused(tmp_path: Path) -> None:
    lit, data = Step37LitModule(**module_arguments()), TinyData()
    trainer = pl.Trainer(strategy=MegatronStrategy(), **trainer_arguments(tmp_path))
    data.config = lit.config
    run_checks.check(lit, trainer, data, fitting=True)
    data.config = dataclasses.replace(lit.config, text=dataclasses.replace(lit.config.text, vocab_size=65))
    with pytest.raises(ConfigError, match="data: vocabulary: expected at most 64"):
        run_checks.check(lit, trainer, data, fitting=True)
