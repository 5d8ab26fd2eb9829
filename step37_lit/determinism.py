"""`trainer.deterministic`: two runs of a command give the same bits; what it covers is told when training begins.

Lightning turns on torch's deterministic algorithms (an operation that has none is an error, or a warning with `warn`),
and what is built then asks torch: megatron's embeddings and permutations of tokens, and flash-attn's backward pass.
"""

from __future__ import annotations

import os

import torch

from step37_lit.errors import require


def enabled() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def check() -> None:
    """Raises `ConfigError` where cuDNN is to choose its algorithms by trying them."""
    benchmark = torch.backends.cudnn.benchmark
    require(not (enabled() and benchmark), "trainer.benchmark", "false with trainer.deterministic", benchmark)


def described(device: torch.device, ranks: int) -> str:
    """What the mode covers and what it does not, as one line.

    Args:
        device: That computes.
        ranks: Of the run.
    """
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    covered = "what torch has no deterministic algorithm for is named in a warning" if warns else "all operations"
    other = ["another number of ranks"]
    if device.type == "cpu":
        other.append(f"another number of threads than {torch.get_num_threads()}")
    else:
        other.append("another kind of GPU or other versions of its libraries")
        if ranks > 1 and "NCCL_ALGO" not in os.environ:
            other.append("NCCL's sums over ranks (it chooses by size and topology; NCCL_ALGO=Ring pins them)")
    return f"determinism {covered}; not the same bits with {', '.join(other)}"
