"""`trainer.deterministic`: two runs give the same bits, and what is built asks for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

sys.path.insert(0, str(Path(__file__).parent))
from training import Record, TinyData, module_arguments, trainer_arguments

from step37_lit import ConfigError, MegatronStrategy, Step37LitModule, run_checks
from step37_lit.megatron.core_attention import FlashCoreAttention

EXPERTS = {"moe_layers": [1], "num_experts": 4, "top_k": 2, "expert_ffn_size": 32, "shared_expert_ffn_size": 32}


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    torch.set_num_threads(threads)


def fit(root: Path, deterministic: Any) -> tuple[list, Step37LitModule]:
    record = Record()
    arguments = trainer_arguments(root, max_steps=3, deterministic=deterministic)
    trainer = pl.Trainer(strategy=MegatronStrategy(cpu_threads=1), callbacks=[record], **arguments)
    text = module_arguments()["text"] | EXPERTS
    lit = Step37LitModule(**module_arguments(text=text, decay_steps=20))
    trainer.fit(lit, datamodule=TinyData())
    return record.rows, lit


def test_two_runs_have_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (rows, lit), (again, other) = fit(tmp_path, True), fit(tmp_path, True)
    assert len({loss for loss, _, _ in rows}) == 3 and rows == again
    weights = other.model.state_dict()
    for name, weight in lit.model.state_dict().items():
        assert not torch.is_tensor(weight) or torch.equal(weight, weights[name]), name
    assert torch.are_deterministic_algorithms_enabled() and lit.model.embedding.word_embeddings.deterministic_mode
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("determinism")]
    expected = (
        "determinism all operations; not the same bits with another number of ranks, another number of threads than 1"
    )
    assert lines == [expected] * 2


def test_without_it_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, lit = fit(tmp_path, False)
    assert "determinism" not in capsys.readouterr().out
    assert not lit.model.embedding.word_embeddings.deterministic_mode


def test_flash_attention_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need CUDA; what they are called with does not."""
    calls = []
    fake = SimpleNamespace(flash_attn_varlen_func=lambda *args, **kwargs: calls.append(kwargs["deterministic"]))
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    borders = PackedSeqParams("thd", torch.tensor([0, 2]), torch.tensor([0, 2]), max_seqlen_q=2, max_seqlen_kv=2)
    row = torch.zeros(2, 2, 4)
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        FlashCoreAttention(0.5, None).attend(row, row, row, borders)
    assert calls == [False, True]


def test_cudnn_may_not_try_its_algorithms(tmp_path: Path) -> None:
    arguments = trainer_arguments(tmp_path, deterministic=True, benchmark=True)
    trainer = pl.Trainer(strategy=MegatronStrategy(), **arguments)
    with pytest.raises(
        ConfigError, match=r"trainer\.benchmark: expected false with trainer\.deterministic, found True"
    ):
        run_checks.check(Step37LitModule(**module_arguments()), trainer, None, fitting=True)
