"""A hub folder -> the weights of a `Step37Model`, each rank reading only what it holds."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError
from step37_lit.hub.names import Row, name_table
from step37_lit.hub.safetensors_file import Cut
from step37_lit.hub.safetensors_folder import SafetensorsFolder
from step37_lit.megatron import process
from step37_lit.megatron.build import build_model
from step37_lit.megatron.initialize import global_name
from step37_lit.megatron.reading import RankPart, parts, raise_together
from step37_lit.model.step37_model import Step37Model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadPlan:
    """What becomes of a checkpoint's tensors.

    Args:
        rows: Rows of the name table that are loaded, by the name of our weight.
        not_loaded: Tensors of MTP layers that the config does not build; empty where the checkpoint has none.
    """

    rows: dict[str, Row]
    not_loaded: tuple[str, ...]


def plan_load(config: Step37Config, names: set[str], folder: str | Path) -> LoadPlan:
    """Accounts for every tensor of a checkpoint.

    MTP layers are all there or all absent (`transformers` does not save them). Where the config builds them
    (`text.mtp`) they must be there; where it does not they are named in `not_loaded`.

    Raises:
        ConfigError: tensors are missing or unexpected; gives their numbers and the first names.
    """
    table = name_table(config)
    loaded = {row.ours: row for row in table if row.ours is not None}
    mtp = {tensor.name for row in table if row.ours is None for tensor in row.hub}
    wanted = {tensor.name for row in loaded.values() for tensor in row.hub}
    if names & mtp:
        wanted |= mtp
    missing, unexpected = sorted(wanted - names), sorted(names - wanted)
    if missing or unexpected:
        found = f"{len(missing)} missing{_first(missing)}, {len(unexpected)} unexpected{_first(unexpected)}"
        raise ConfigError("tensors", f"the {len(wanted)} of the config", found, folder)
    return LoadPlan(loaded, tuple(sorted(names & mtp)))


def _first(names: list[str], count: int = 3) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:count])}{', ...' if len(names) > count else ''})"


def check_folder(config: Step37Config, folder: SafetensorsFolder) -> LoadPlan:
    """`plan_load` of an open folder, whose tensors must also have the table's shapes, those not loaded too.

    Raises:
        ConfigError: tensors are missing, unexpected or misshapen.
    """
    plan = plan_load(config, folder.names(), folder.folder)
    names = folder.names()
    for row in name_table(config):
        for tensor in row.hub:
            if tensor.name in names:
                folder.check(tensor)
    return plan


def load_hub_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    config: Step37Config | None = None,
) -> Step37Model:
    """Builds the model of a hub folder on this process (one rank) and loads its weights.

    Every tensor of the checkpoint is used exactly once, but for those of MTP layers where the config does not build
    them (`text.mtp`): a warning says how many tensors that leaves out.

    Args:
        path: Folder with `config.json` and safetensors, one file or shards with an index.
        dtype: Of the parameters; the router's bias is always fp32.
        config: The model, where it is not quite the folder's; None reads it there.

    Raises:
        ConfigError: config and tensors do not fit: unknown fields, missing or unexpected tensors, wrong shapes.
        FileNotFoundError: a file is missing.
    """
    config = Step37Config.from_hub(path) if config is None else config
    with SafetensorsFolder(path) as folder:
        check_folder(config, folder)  # before a model is built
    process.initialize()
    model = build_model(config, dtype=dtype, seed=None)
    load_hub_weights([model], path)
    return model


def load_hub_weights(chunks: Sequence[Step37Model], path: str | Path) -> int:
    """Fills this rank's part of a model, of any layout, from a hub folder; every rank must call it.

    Args:
        chunks: The model chunks of this rank, built already; their values so far are lost.
        path: As `load_hub_model`.

    Returns:
        Bytes of tensors that this rank has read.

    Raises:
        ConfigError: as `load_hub_model`; also on the ranks that could read theirs, where another could not.
        RuntimeError: model and name table differ.
    """
    error: Exception | None = None
    count = 0
    try:
        count = _load(chunks, path)
    except (ConfigError, FileNotFoundError) as found:
        error = found
    raise_together(error, next(chunks[0].parameters()).device)
    return count


def _load(chunks: Sequence[Step37Model], path: str | Path) -> int:
    config = chunks[0].step37
    with SafetensorsFolder(path) as folder, torch.no_grad():
        plan = check_folder(config, folder)
        _say_what_mtp_becomes(config, plan, path)
        for chunk in chunks:
            places = parts(chunk)
            for local, weight in loadable_weights(chunk).items():
                name = global_name(chunk, local)
                if name not in plan.rows:
                    raise RuntimeError(f"{name}: in the model, not in the name table")
                _read(plan.rows[name], weight.detach(), folder, places)
        return folder.bytes_read


def _read(row: Row, weight: Tensor, folder: SafetensorsFolder, places: dict[str, RankPart]) -> None:
    cuts = [Cut(split.dim, *places[split.over]) for split in row.splits]
    shapes = [functools.reduce(lambda shape, cut: cut.of(shape), cuts, tensor.shape) for tensor in row.hub]
    fused = row.conversion.fused_shape(shapes)
    if weight.shape != fused:
        raise RuntimeError(f"{row.ours}: model {list(weight.shape)}, name table {list(fused)} of {cuts}")
    for tensor, view in zip(row.hub, row.conversion.views(weight, shapes), strict=True):
        folder.read(tensor.name, view, cuts)


def _say_what_mtp_becomes(config: Step37Config, plan: LoadPlan, path: str | Path) -> None:
    layers = config.text.num_mtp_layers
    if plan.not_loaded:
        logger.warning("%s: %d tensors of %d MTP layers are not loaded", path, len(plan.not_loaded), layers)
    elif layers and not config.text.mtp:
        logger.warning("%s: the config has %d MTP layers, the checkpoint none of their tensors", path, layers)


def loadable_weights(model: Step37Model) -> dict[str, Tensor]:
    """Parameters and the routers' biases by name: what a checkpoint holds of a rank's part of the model."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    weights |= {name: buffer for name, buffer in model.named_buffers() if name.endswith(".expert_bias")}
    return weights
