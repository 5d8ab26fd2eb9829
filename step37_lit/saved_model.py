"""What a checkpoint says of its model beside the weights, so that it can be used without its recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from step37_lit.config import (
    ConfigError,
    Llama3Scaling,
    RopeConfig,
    Step37Config,
    TextConfig,
    TokenIds,
    VisionConfig,
    require,
)
from step37_lit.megatron import process
from step37_lit.megatron.build import build_model
from step37_lit.model.step37_model import Step37Model
from step37_lit.processor import Step37Processor
from step37_lit.tokenizer import Step37Tokenizer

ENTRY = "step37"  # of a checkpoint
LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"  # in a run's folder


def description(config: Step37Config, processor: Step37Processor | None, prompt: str | None) -> dict[str, Any]:
    """Plain values that `read_checkpoint` makes a `SavedModel` of."""
    described: dict[str, Any] = {"config": dataclasses.asdict(config), "processor": None, "prompt": prompt}
    if processor is not None:
        described["processor"] = {
            "tokenizer": processor.tokenizer.content,
            "chat_template": processor.chat_template,
            "multicrop": processor.multicrop,
            "resize": processor.resize,
        }
    return described


def config_from(plain: Mapping[str, Any]) -> Step37Config:
    """The reverse of `dataclasses.asdict`."""
    text = dict(plain["text"])
    for name in ("full_rope", "sliding_rope"):
        rope = dict(text[name])
        scaling = rope.pop("scaling")
        text[name] = RopeConfig(**rope, scaling=None if scaling is None else Llama3Scaling(**scaling))
    return Step37Config(
        vision=VisionConfig(**plain["vision"]),
        text=TextConfig(**text),
        tokens=TokenIds(**plain["tokens"]),
        projector_bias=plain["projector_bias"],
    )


@dataclass(frozen=True)
class SavedModel:
    """A model that can be used at once.

    Args:
        model: The whole model.
        processor: Its processor.
        prompt: What it was trained to answer; None where its data do not say.
    """

    model: Step37Model
    processor: Step37Processor
    prompt: str | None


def read_checkpoint(path: str | Path, dtype: torch.dtype = torch.float32) -> SavedModel:
    """The model of a training checkpoint, whole on this process; its optimizer is not read.

    Args:
        path: A checkpoint file, or a run's folder, whose last checkpoint is taken.
        dtype: Of the parameters.

    Raises:
        ConfigError: there is no checkpoint, or it does not describe its model, or was written without a processor.
    """
    file = Path(path) / LAST_CHECKPOINT if Path(path).is_dir() else Path(path)
    require(file.is_file(), "checkpoint", "a checkpoint file, or a run's folder with checkpoints/last.ckpt", str(path))
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch and pickle raise nearly everything for a file that is no checkpoint
        raise ConfigError(
            "checkpoint", "a file that torch.load reads", str(error).splitlines()[0], file=file
        ) from error
    described = content.get(ENTRY) if isinstance(content, dict) else None
    if described is None:
        raise ConfigError("checkpoint", f"an entry {ENTRY} (written by this version)", None, file=file)
    processor = described["processor"]
    if processor is None:
        raise ConfigError("checkpoint", "a processor (a data module with one)", None, file=file)
    config = config_from(described["config"])
    process.initialize()
    model = build_model(config, dtype=dtype, seed=None)
    prefix = "model."
    weights = {name.removeprefix(prefix): t for name, t in content["state_dict"].items() if name.startswith(prefix)}
    model.load_state_dict(weights)
    tokenizer = Step37Tokenizer(processor.pop("tokenizer"), file=file)
    return SavedModel(model, Step37Processor(tokenizer, config, **processor), described["prompt"])
