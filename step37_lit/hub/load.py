"""A hub folder -> a `Step37Model` on this process."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from step37_lit.config import ConfigError, Step37Config
from step37_lit.hub.names import Row, name_table
from step37_lit.hub.safetensors_folder import SafetensorsFolder
from step37_lit.megatron import process
from step37_lit.megatron.build import build_model
from step37_lit.model.recompute import Recompute
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


def load_hub_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    config: Step37Config | None = None,
    recompute: Recompute | None = None,
) -> Step37Model:
    """Builds the model of a hub folder on this process (one rank) and loads its weights.

    Every tensor of the checkpoint is used exactly once, but for those of MTP layers where the config does not build
    them (`text.mtp`): a warning says how many tensors that leaves out.

    Args:
        path: Folder with `config.json` and safetensors, one file or shards with an index.
        dtype: Of the parameters; the router's bias is always fp32.
        config: The model, where it is not quite the folder's; None reads it there.
        recompute: What training computes again in its backward pass; None is nothing.

    Raises:
        ConfigError: config and tensors do not fit: unknown fields, missing or unexpected tensors, wrong shapes.
        FileNotFoundError: a file is missing.
    """
    config = Step37Config.from_hub(path) if config is None else config
    with SafetensorsFolder(path) as folder:
        plan = plan_load(config, folder.names(), path)
        for row in plan.rows.values():
            for tensor in row.hub:
                folder.check_shape(tensor.name, tensor.shape)
        _say_what_mtp_becomes(config, plan, path)
        process.initialize()
        model = build_model(config, dtype=dtype, seed=None, recompute=recompute)
        weights = loadable_weights(model)
        differing = sorted(set(weights) ^ set(plan.rows))
        if differing:
            raise RuntimeError(f"model and name table differ: {differing}")
        with torch.no_grad():
            for name, row in plan.rows.items():
                fused = row.conversion.from_hub([folder.tensor(tensor.name) for tensor in row.hub])
                if fused.shape != weights[name].shape:
                    raise RuntimeError(f"{name}: model {list(weights[name].shape)}, name table {list(fused.shape)}")
                weights[name].copy_(fused)
    return model


def _say_what_mtp_becomes(config: Step37Config, plan: LoadPlan, path: str | Path) -> None:
    layers = config.text.num_mtp_layers
    if plan.not_loaded:
        logger.warning("%s: %d tensors of %d MTP layers are not loaded", path, len(plan.not_loaded), layers)
    elif layers and not config.text.mtp:
        logger.warning("%s: the config has %d MTP layers, the checkpoint none of their tensors", path, layers)


def loadable_weights(model: Step37Model) -> dict[str, Tensor]:
    """Parameters and the routers' biases by name: what a checkpoint holds (one rank)."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    weights |= {name: buffer for name, buffer in model.named_buffers() if name.endswith(".expert_bias")}
    return weights
