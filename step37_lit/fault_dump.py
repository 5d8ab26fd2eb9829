"""A step that was not taken, on the disk: the batch that is concerned, and what runs it again.

    RUN/faults/step_000123/
        batch/      manifest.json (a checkpoint's, of kind fault), fault.json, model.json,
                    recipe.json (where the command line started the run),
                    rank_1.json, rank_1.safetensors: the packs of the data-parallel rank that rank 1 is of
        weights/    a checkpoint of weights: those that the step was computed with

JSON and safetensors: nothing in it can run code.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from step37_lit import saved_model
from step37_lit.batch import ImageForInsert, PackedBatch
from step37_lit.checkpoint.folder import commit, staging
from step37_lit.checkpoint.manifest import verify
from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError, require
from step37_lit.faults import Fault, Kind
from step37_lit.hub.fields import read_json_object

FAULTS = "faults"  # in a run's folder
BATCH, WEIGHTS = "batch", "weights"
FAULT_FILE, RECIPE_FILE = "fault.json", "recipe.json"
ROW_TENSORS = ("input_ids", "labels", "loss_mask", "position_ids", "cu_seqlens")
IMAGE_TENSORS = ("images", "image_features", "rope_cu_seqlens")
DTYPES = ("float32", "bfloat16")
RANDOM = "random."  # in front of the names of the generators' states


@dataclass(frozen=True)
class Circumstances:
    """How a step came to its fault.

    Args:
        dtype: Of the weights, as torch names it without `torch.`.
        layout: Sizes of the parallel groups.
        loss: Of the global batch.
        grad_norm: Of the global batch.
        frozen: Names of weights that did not train.
        checkpoint: The run's newest checkpoint, relative to the dump; None where it has none.
    """

    dtype: str
    layout: Mapping[str, Any]
    loss: float
    grad_norm: float
    frozen: tuple[str, ...]
    checkpoint: str | None


@dataclass(frozen=True)
class Dump:
    """What `read_dump` reads.

    Args:
        folder: Of the dump.
        fault: Why the step was not taken.
        circumstances: How it came to that.
        config: The model.
        packs: Of the data-parallel rank that the fault names.
        random: States of torch's generators before the step, by device type.
    """

    folder: Path
    fault: Fault
    circumstances: Circumstances
    config: Step37Config
    packs: list[PackedBatch]
    random: dict[str, Tensor]


def dump_folder(run: Path, fault: Fault) -> Path:
    return run / FAULTS / f"step_{fault.step:06d}"


def write_batch(dump: Dump, recipe: Mapping[str, Any] | None) -> None:
    """Writes the dump without its weights; one of the same step that is there goes.

    Raises:
        ConfigError: the disk has no room for it, or cannot be written to.
    """
    fault, target = dump.fault, dump.folder / BATCH
    described = {"fault": dataclasses.asdict(fault), "circumstances": dataclasses.asdict(dump.circumstances)}
    texts = {FAULT_FILE: described, f"rank_{fault.rank}.json": {"packs": [_described(pack) for pack in dump.packs]}}
    if recipe is not None:
        texts[RECIPE_FILE] = dict(recipe)
    tensors = {f"{RANDOM}{device}": state for device, state in dump.random.items()}
    for number, pack in enumerate(dump.packs):
        tensors |= {f"{number}.{name}": tensor for name, tensor in _tensors(pack).items()}
    with staging(target) as staged:
        shutil.rmtree(dump.folder / WEIGHTS, ignore_errors=True)
        saved_model.write_description(staged, dump.config, None, None)
        for name, text in texts.items():
            (staged / name).write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
        # Copies: safetensors refuses tensors that share memory.
        plain = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        _save(plain, staged / f"rank_{fault.rank}.safetensors")
        commit(target, "fault", fault.step - 1, layout=dump.circumstances.layout, dtype=dump.circumstances.dtype)


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(tensors, file)
    except SafetensorError as error:  # in place of the system's error
        raise OSError(None, str(error), str(file)) from error


def _tensors(pack: PackedBatch) -> dict[str, Tensor]:
    """Every tensor of a pack, by a name that tells its place."""
    found = {name: getattr(pack, name) for name in ROW_TENSORS}
    found |= {f"attribute_spans.{i}": span for i, span in enumerate(pack.attribute_spans.values())}
    for i, image in enumerate(pack.images):
        held = {name: getattr(image, name) for name in IMAGE_TENSORS}
        found |= {f"images.{i}.{name}": tensor for name, tensor in held.items() if tensor is not None}
    return found


def _described(pack: PackedBatch) -> dict[str, Any]:
    """What is no tensor."""
    images = [
        {"insert_start_token": image.insert_start_token, "rope_max_seq_len": image.rope_max_seq_len}
        for image in pack.images
    ]
    return {
        "sample_keys": list(pack.sample_keys),
        "max_seqlen": pack.max_seqlen,
        "attribute_kinds": list(pack.attribute_spans),
        "images": images,
    }


def read_dump(folder: Path) -> Dump:
    """A dump without its weights, every file verified.

    Raises:
        ConfigError: it is none, is damaged, or describes packs that cannot be.
    """
    require((folder / BATCH).is_dir(), "DUMP", f"a folder with {BATCH}/, such as RUN/{FAULTS}/step_000123", str(folder))
    manifest = verify(folder / BATCH)
    file = folder / BATCH / FAULT_FILE
    if manifest.kind != "fault" or FAULT_FILE not in manifest.files:
        raise ConfigError("DUMP", f"a step that was not taken, with {FAULT_FILE}", f"one of {manifest.kind}", folder)
    config = saved_model.read_config(folder / BATCH)
    plain = read_json_object(file)
    try:
        fault = Fault(**_with_tuples(plain["fault"]))
        circumstances = Circumstances(**_with_tuples(plain["circumstances"]))
        _check_types(fault, circumstances, file)
        packs, random = _read_packs(folder / BATCH / f"rank_{fault.rank}", config)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError("DUMP", "what a fault is described by", repr(error), file) from error
    return Dump(folder, fault, circumstances, config, packs, random)


def _check_types(fault: Fault, circumstances: Circumstances, file: Path) -> None:
    """Of what a file's name, a dtype or a decision is made of."""
    rules = {
        "fault.kind": (fault.kind in get_args(Kind), ", ".join(get_args(Kind)), fault.kind),
        "fault.rank": (type(fault.rank) is int, "a rank", fault.rank),
        "fault.limit": (type(fault.limit) is float or fault.kind != "spike", "a number", fault.limit),
        "circumstances.dtype": (circumstances.dtype in DTYPES, " or ".join(DTYPES), circumstances.dtype),
    }
    for field, (holds, expected, found) in rules.items():
        if not holds:
            raise ConfigError(field, expected, found, file)


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _read_packs(stem: Path, config: Step37Config) -> tuple[list[PackedBatch], dict[str, Tensor]]:
    file = stem.with_suffix(".safetensors")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ConfigError("DUMP", "safetensors", str(error), file) from error
    packs = []
    for number, described in enumerate(read_json_object(stem.with_suffix(".json"))["packs"]):
        prefix = f"{number}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        pack = _pack(described, own)
        try:
            pack.validate(config.tokens)
        except ConfigError as error:
            raise ConfigError(f"packs[{number}].{error.field_name}", error.expected, error.found, file) from error
        packs.append(pack)
    states = {name.removeprefix(RANDOM): tensor for name, tensor in tensors.items() if name.startswith(RANDOM)}
    return packs, states


def _pack(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PackedBatch:
    images = []
    for i, image in enumerate(described["images"]):
        held: dict[str, Any] = {name: tensors.get(f"images.{i}.{name}") for name in IMAGE_TENSORS}
        images.append(ImageForInsert(**image, **held))
    kinds = described["attribute_kinds"]
    return PackedBatch(
        **{name: tensors[name] for name in ROW_TENSORS},
        max_seqlen=described["max_seqlen"],
        images=images,
        sample_keys=tuple(described["sample_keys"]),
        attribute_spans={kind: tensors[f"attribute_spans.{i}"] for i, kind in enumerate(kinds)},
    )
