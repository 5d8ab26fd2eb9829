"""What a checkpoint says of its model beside the weights, so that it can be used without its recipe."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from step37_lit.checkpoint.folder import LATEST, list_checkpoints
from step37_lit.checkpoint.manifest import MANIFEST, verify
from step37_lit.config import Llama3Scaling, RopeConfig, Step37Config, TextConfig, TokenIds, VisionConfig
from step37_lit.errors import ConfigError, require
from step37_lit.hub.fields import read_json_object
from step37_lit.megatron import process
from step37_lit.megatron.build import build_model
from step37_lit.megatron.sharding import MODEL, load_weights
from step37_lit.model.step37_model import Step37Model
from step37_lit.processor import Step37Processor
from step37_lit.text_file import read_text
from step37_lit.tokenizer import Step37Tokenizer

ENTRY = "step37"  # of what Lightning saves
MODEL_FILE, PROCESSOR_FILE = "model.json", "processor.json"
TOKENIZER_FILE, TEMPLATE_FILE = "tokenizer.json", "chat_template.jinja"
CHECKPOINTS = "checkpoints"  # in a run's folder


def description(config: Step37Config, processor: Step37Processor | None, prompt: str | None) -> dict[str, bytes]:
    """Contents by file name that `read_checkpoint` makes a `SavedModel` of."""
    texts = {MODEL_FILE: json.dumps(dataclasses.asdict(config), indent=1) + "\n"}
    if processor is not None:
        settings = {"multicrop": processor.multicrop, "resize": processor.resize, "prompt": prompt}
        texts[PROCESSOR_FILE] = json.dumps(settings, indent=1) + "\n"
        texts[TOKENIZER_FILE] = processor.tokenizer.content
        texts[TEMPLATE_FILE] = processor.chat_template
    return {name: text.encode() for name, text in texts.items()}


def write_description(
    folder: Path, config: Step37Config, processor: Step37Processor | None, prompt: str | None
) -> None:
    """Writes the files of `description` into a checkpoint's folder."""
    for name, content in description(config, processor, prompt).items():
        (folder / name).write_bytes(content)


def config_from(plain: Mapping[str, Any]) -> Step37Config:
    """The reverse of `dataclasses.asdict`, also behind JSON, which has lists for tuples."""
    text = _with_tuples(plain["text"])
    for name in ("full_rope", "sliding_rope"):
        rope = dict(text[name])
        scaling = rope.pop("scaling")
        text[name] = RopeConfig(**rope, scaling=None if scaling is None else Llama3Scaling(**scaling))
    return Step37Config(
        vision=VisionConfig(**plain["vision"]),
        text=TextConfig(**text),
        tokens=TokenIds(**_with_tuples(plain["tokens"])),
        projector_bias=plain["projector_bias"],
    )


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


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


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` is, or the newest one of the run whose folder it is.

    Raises:
        ConfigError: there is none.
    """
    given = Path(path)
    if (given / MANIFEST).is_file():
        return given
    parent = given if (given / LATEST).is_file() else given / CHECKPOINTS
    whole = [found.path for found in list_checkpoints(parent) if found.manifest is not None]
    advice = "a checkpoint's folder, or a run's folder with checkpoints"
    require(len(whole) > 0, "checkpoint", advice, str(path))
    return whole[0]


def read_config(checkpoint: Path) -> Step37Config:
    """The model of a checkpoint.

    Raises:
        ConfigError: the file cannot be read or describes no model.
    """
    file = checkpoint / MODEL_FILE
    try:
        return config_from(read_json_object(file))
    except ConfigError as error:
        raise error if error.file else ConfigError(error.field_name, error.expected, error.found, file) from error
    except (KeyError, TypeError) as error:
        raise ConfigError("model", "the fields of Step37Config", str(error), file) from error


def read_checkpoint(path: str | Path, dtype: torch.dtype = torch.float32) -> SavedModel:
    """The model of a checkpoint, whole on this process; its optimizer is neither read nor hashed.

    Args:
        path: A checkpoint, or a run's folder, whose newest checkpoint is taken.
        dtype: Of the parameters.

    Raises:
        ConfigError: there is no checkpoint, it is damaged, or it was written without a processor.
    """
    folder = find_checkpoint(path)
    manifest = verify(folder, only=MODEL)
    for name in (PROCESSOR_FILE, TOKENIZER_FILE, TEMPLATE_FILE):
        require(name in manifest.files, "checkpoint", f"a file {name} (of a data module with a processor)", str(folder))
    config = read_config(folder)
    settings = read_json_object(folder / PROCESSOR_FILE)
    prompt = settings.pop("prompt")
    template = read_text(folder / TEMPLATE_FILE)
    tokenizer = Step37Tokenizer.from_file(folder / TOKENIZER_FILE)
    process.initialize()
    model = build_model(config, dtype=dtype, seed=None)
    load_weights([model], folder)
    return SavedModel(model, Step37Processor(tokenizer, config, template, **settings), prompt)
