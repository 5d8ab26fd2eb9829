"""What a run starts from: a hub folder, or a checkpoint (of weights, or of a training whose state is left behind).

Either form says what the model is; whether its MTP layers are built is the recipe's choice (`text.mtp`), whatever the
checkpoint was trained with.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from step37_lit import saved_model
from step37_lit.checkpoint.manifest import verify
from step37_lit.checkpoint.tensors import TensorFolder
from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError, require
from step37_lit.hub.config_json import read_hub_config
from step37_lit.hub.load import check_folder, load_hub_weights
from step37_lit.hub.names import name_table
from step37_lit.hub.safetensors_folder import SafetensorsFolder
from step37_lit.hub.text_files import CONFIG_FILE
from step37_lit.megatron.reading import on_first_rank, raise_together
from step37_lit.megatron.sharding import MODEL, OwnParts
from step37_lit.model.step37_model import Step37Model

logger = logging.getLogger(__name__)


def is_hub_folder(path: str | Path) -> bool:
    return (Path(path) / CONFIG_FILE).is_file()


def read_initial_config(path: str | Path) -> Step37Config:
    """The model of a hub folder or of a checkpoint, without MTP layers built.

    Raises:
        ConfigError: `path` is neither, or inconsistent.
    """
    if is_hub_folder(path):
        return read_hub_config(path)
    require(Path(path).is_dir(), "model.init_from", "a hub folder or a checkpoint's folder", str(path))
    config = saved_model.read_config(saved_model.find_checkpoint(path))
    return dataclasses.replace(config, text=dataclasses.replace(config.text, mtp=False))


def check_initial_weights(config: Step37Config, path: str | Path) -> None:
    """Refuses weights that are not `config`'s by their names and shapes; no tensor is read.

    Raises:
        ConfigError: names the file, the tensor, what was expected and what was found.
    """
    if is_hub_folder(path):
        try:
            with SafetensorsFolder(path) as folder:
                check_folder(config, folder)
        except FileNotFoundError as error:  # of a file that a hub folder must have
            raise ConfigError("model.init_from", "a hub folder", str(error)) from error
    else:
        _check_checkpoint(config, TensorFolder(saved_model.find_checkpoint(path) / MODEL))


def load_initial_weights(chunks: Sequence[Step37Model], path: str | Path) -> None:
    """Fills this rank's part of a model of any layout, reading only that; every rank must call it.

    Raises:
        ConfigError: as `check_initial_weights`, or the checkpoint is damaged.
    """
    if is_hub_folder(path):
        load_hub_weights(chunks, path)
        return
    device = next(chunks[0].parameters()).device
    checkpoint = saved_model.find_checkpoint(path)
    on_first_rank(lambda: verify(checkpoint, only=MODEL), device)
    error: ConfigError | None = None
    try:
        folder = TensorFolder(checkpoint / MODEL)
        left = _check_checkpoint(chunks[0].step37, folder)
        if left:
            logger.warning("%s: %d weights of MTP layers are not loaded", path, left)
        folder.read(OwnParts(chunks).model())
    except ConfigError as found:
        error = found
    raise_together(error, device)


def _check_checkpoint(config: Step37Config, folder: TensorFolder) -> int:
    """Compares a checkpoint with a model; returns how many weights of MTP layers the model leaves out."""
    built = dataclasses.replace(config, text=dataclasses.replace(config.text, mtp=config.text.num_mtp_layers > 0))
    shapes = {str(row.ours): row.shape for row in name_table(config) if row.ours is not None}
    mtp = {str(row.ours) for row in name_table(built)} - set(shapes)
    missing, unexpected = sorted(set(shapes) - folder.names()), sorted(folder.names() - set(shapes) - mtp)
    if missing or unexpected:
        found = f"missing {missing[:3]}, unexpected {unexpected[:3]}"
        raise ConfigError("tensors", f"the {len(shapes)} weights of the model", found, folder.folder)
    for name, shape in shapes.items():
        if folder.shape(name) != shape:
            raise ConfigError(name, f"shape {shape}", folder.shape(name), folder.folder)
    return len(mtp & folder.names())
