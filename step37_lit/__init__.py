"""Step-3.7, StepFun's multimodal mixture-of-experts model, in PyTorch Lightning on megatron-core.

The public names are imported when they are first used, so that `python -m step37_lit -h` needs neither torch nor
megatron.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "ConfigError": "step37_lit.errors",
    "ImageForInsert": "step37_lit.batch",
    "MegatronStrategy": "step37_lit.megatron.strategy",
    "PackedBatch": "step37_lit.batch",
    "ParallelLayout": "step37_lit.megatron.layout",
    "RunCheckpoints": "step37_lit.run_checkpoints",
    "Sample": "step37_lit.batch",
    "Step37Captioner": "step37_lit.captioner",
    "Step37Config": "step37_lit.config",
    "Step37LitModule": "step37_lit.lit_module",
    "Step37Model": "step37_lit.model.step37_model",
    "build_model": "step37_lit.megatron.build",
    "load_hub_model": "step37_lit.hub.load",
}

__all__ = [*_PUBLIC, "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
