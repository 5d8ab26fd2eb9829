"""Shares of a row: chunks, borders, the attention of every context rank put together, refusals."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from callbacks.caption_metrics import CaptionMetrics
from datamodules.scenes import ScenesDataModule
from step37_lit import MegatronStrategy, Step37Config, Step37LitModule, build_model, run_checks
from step37_lit.errors import ConfigError
from step37_lit.megatron.context import ContextSeqParams, with_chunks
from step37_lit.megatron.core_attention import FlashCoreAttention, SDPACoreAttention
from step37_lit.megatron.inference import inference_mode
from step37_lit.megatron.layout import ParallelLayout
from step37_lit.megatron.shares import balanced
from tests.test_core_attention import borders, by_definition, random_qkv
from tests.training import module_arguments, trainer_arguments

# Sums to 144: chunks of 36, 18 and 12 tokens for 2, 4 and 6 ranks; some sub-sequences end on a chunk's border.
LENGTHS = (1, 35, 7, 0, 16, 17, 68)


def shares(lengths: tuple[int, ...], ranks: int, device: str = "cpu") -> list[tuple[ContextSeqParams, Tensor]]:
    """Each rank's borders, and the places of its tokens in the row."""
    packed = borders(lengths, device)
    chunks = torch.arange(sum(lengths), device=device).chunk(2 * ranks)
    places = [torch.cat((chunks[rank], chunks[-1 - rank])) for rank in range(ranks)]
    return [(with_chunks(packed, rank, ranks), place) for rank, place in enumerate(places)]


def together(attention: nn.Module, inputs: list[Tensor], lengths: tuple[int, ...], ranks: int) -> Tensor:
    """What the ranks' chunks give, in the order of the row; keys and values as `gather_row` hands them over."""
    q, k, v = inputs
    out = torch.zeros_like(q)
    for packed, places in shares(lengths, ranks, q.device.type):
        parts = [
            attention.attend(part, k[chunk.first_key : chunk.end], v[chunk.first_key : chunk.end], chunk.borders)
            for part, chunk in zip(q[places].chunk(2), packed.chunks, strict=True)
        ]
        out = out.index_copy(0, places, torch.cat(parts))
    return out


@pytest.mark.parametrize("ranks", [2, 4, 6])
@pytest.mark.parametrize("window", [None, 1, 16, 1000])
def test_shares_together_are_the_definition(window: int | None, ranks: int) -> None:
    """Outputs and gradients. Measured 4e-7."""
    scale = 0.2
    inputs, reference_inputs = (random_qkv(sum(LENGTHS), seed=3) for _ in range(2))
    out = together(SDPACoreAttention(scale, window), inputs, LENGTHS, ranks)
    expected = by_definition(*reference_inputs, LENGTHS, window, scale)
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-6)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    for ours, reference in zip(inputs, reference_inputs, strict=True):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=0, atol=2e-5)


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None,
    reason="flash-attn's kernels need CUDA and the package flash-attn",
)
@pytest.mark.parametrize("window", [None, 16])
def test_flash_shares_together_are_sdpa(window: int | None) -> None:
    inputs = random_qkv(sum(LENGTHS), seed=6, dtype=torch.bfloat16, device="cuda")
    flash = together(FlashCoreAttention(0.2, window), inputs, LENGTHS, ranks=2)
    sdpa = SDPACoreAttention(0.2, window)(*inputs, borders(LENGTHS, "cuda"))
    torch.testing.assert_close(flash, sdpa, rtol=0, atol=2e-2)


def pairs(lengths: tuple[int, ...], ranks: int) -> list[int]:
    """Query-key pairs of full attention for each rank."""
    work = []
    for packed, _ in shares(lengths, ranks):
        total = 0
        for chunk in packed.chunks:
            queries, keys = chunk.borders.cu_seqlens_q.diff(), chunk.borders.cu_seqlens_kv.diff()
            total += int((queries * keys - queries * (queries - 1) // 2).sum())
        work.append(total)
    return work


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_one_long_sequence_is_balanced_exactly(ranks: int) -> None:
    work = pairs((1024,), ranks)
    assert sum(work) == 1024 * 1025 // 2
    assert set(work) == {1024 * 1025 // 2 // ranks}


def test_images_go_to_the_rank_with_least_to_do() -> None:
    assert balanced([4, 9, 4, 1, 4], 2) == [1, 0, 1, 0, 1]
    assert balanced([5, 5], 4) == [0, 1]
    assert balanced([], 3) == []


@pytest.mark.parametrize(
    ("layout", "multiple"),
    [
        (ParallelLayout(), 1),
        (ParallelLayout(context=2), 4),
        (ParallelLayout(tensor=2, context=2, sequence_parallel=True), 4),
        (ParallelLayout(tensor=8, context=2, sequence_parallel=True), 16),
        (ParallelLayout(tensor=8, sequence_parallel=True), 8),
    ],
)
def test_rows_must_divide(layout: ParallelLayout, multiple: int) -> None:
    assert layout.row_multiple == multiple
    layout.check_row("data.max_length", 32)
    if multiple > 1:
        for tokens in (33, None):
            with pytest.raises(ConfigError, match=f"data.max_length: expected a multiple of {multiple} .*such as"):
                layout.check_row("data.max_length", tokens)


def test_generation_is_refused(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(Step37Config.preset("tiny"))
    monkeypatch.setattr(model.config, "context_parallel_size", 2)
    with pytest.raises(ConfigError, match=r"strategy.context: expected 1 to generate .*found 2"), inference_mode(model):
        pass


def test_caption_metrics_are_refused(tmp_path: Path) -> None:
    trainer = pl.Trainer(
        strategy=MegatronStrategy(context=2),
        callbacks=[CaptionMetrics()],
        **trainer_arguments(tmp_path, devices=2),
    )
    lit = Step37LitModule(**module_arguments())
    with pytest.raises(ConfigError, match=r"strategy.context: expected 1 with CaptionMetrics .*found 2"):
        run_checks.check(lit, trainer, None, fitting=True)


def test_rows_that_do_not_divide_are_refused_before_anything_starts(tmp_path: Path) -> None:
    trainer = pl.Trainer(strategy=MegatronStrategy(context=2), **trainer_arguments(tmp_path, devices=2))
    lit = Step37LitModule("tiny")
    for pad_to in (None, 202):
        data = ScenesDataModule(num_steps=2, val_samples=8, samples_per_pack=4, microbatches=1, pad_to=pad_to)
        with pytest.raises(ConfigError, match=f"data.pad_to: expected a multiple of 4 .*, found {pad_to}"):
            run_checks.check(lit, trainer, data, fitting=False)


def test_tokens_of_an_image_that_is_not_square() -> None:
    vision = Step37Config().vision
    assert vision.num_tokens(728) == vision.num_tokens(728, 728) == 169
    assert vision.num_tokens(728, 504) == 13 * 9
