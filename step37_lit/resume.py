"""Where `fit` goes on: `--resume must|auto|never`, and what has changed since the checkpoint was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from step37_lit.checkpoint.folder import list_checkpoints
from step37_lit.checkpoint.manifest import check_hashes, check_structure, read_manifest
from step37_lit.errors import ConfigError
from step37_lit.hub.fields import read_json_object
from step37_lit.lit_module import Step37LitModule
from step37_lit.megatron.checkpointing import RECIPE_FILE, changed_fields, check_same_model, read_training_state
from step37_lit.saved_model import CHECKPOINTS, TOKENIZER_FILE, find_checkpoint, read_config

ResumeMode = Literal["must", "auto", "never"]
# Options that say how a command is run, not what is trained.
NOT_OF_THE_RUN = ("ckpt_path", "config", "resume", "verbose", "weights_only")


@dataclass(frozen=True)
class Resume:
    """What was decided.

    Args:
        path: The checkpoint to go on from; None begins at step 0.
        fallbacks: Taken in their order where `path` turns out damaged.
        lines: What to tell the user.
    """

    path: Path | None
    fallbacks: Sequence[Path] = ()
    lines: Sequence[str] = ()


def choose(mode: ResumeMode, run: Path) -> Resume:
    """The checkpoint to go on from among those of a run.

    Names, sizes and small files are checked here; tensors are hashed by all ranks when they have started.

    Args:
        mode: `must` takes the newest or fails; `auto` takes the newest good one, or begins at step 0 where there is
            none at all; `never` begins at step 0.
        run: The run's folder.

    Raises:
        ConfigError: `must` without a checkpoint, or nothing but damaged ones.
    """
    parent = run / CHECKPOINTS
    found = [each for each in list_checkpoints(parent) if each.manifest is None or each.manifest.kind == "training"]
    if mode == "never":
        return Resume(None, (), [_line(f"never: {len(found)} checkpoints in {parent} are left alone")] if found else [])
    lines, good = [], []
    for each in found:
        problem = each.problem or _problem(each.path)
        if problem is None:
            good.append(each.path)
        elif mode == "must" and each.manifest is not None and not good:
            raise ConfigError("resume", f"must: a good checkpoint ({each.path})", problem)
        else:
            lines.append(_line(f"passed over: {problem}"))
    if not good and (mode == "must" or any(each.manifest is not None for each in found)):
        advice = "a good checkpoint (--resume never begins at step 0)"
        raise ConfigError("resume", f"{mode}: {advice}", f"{len(found)} damaged ones" if found else "none", parent)
    if not good:
        return Resume(None, (), [*lines, _line(f"no checkpoint in {parent}: begins at step 0")])
    return Resume(good[0], good[1:] if mode == "auto" else (), [*lines, _found(good[0])])


def explicit(path: str) -> Resume:
    """The checkpoint that `--ckpt_path` names: a checkpoint's or a run's folder."""
    try:
        folder = find_checkpoint(path)
    except ConfigError as error:
        raise ConfigError("ckpt_path", error.expected, path) from error
    return Resume(folder, (), [_found(folder)])


def _problem(folder: Path) -> str | None:
    try:
        manifest = read_manifest(folder)
        check_structure(folder, manifest)
        check_hashes(folder, manifest, [name for name in manifest.files if "/" not in name])
    except ConfigError as error:
        return str(error)
    return None


def _found(folder: Path) -> str:
    return _line(read_manifest(folder).headline(folder))


def _line(text: str) -> str:
    return f"resume      {text}"


def compare(
    checkpoint: Path, recipe: dict[str, Any], module: Step37LitModule, datamodule: pl.LightningDataModule | None
) -> list[str]:
    """Refuses to go on with another model, tokenizer or other data, and lists the other options that changed.

    Returns:
        A line for each option whose value is taken from this command and not from the checkpoint.

    Raises:
        ConfigError: names what differs.
    """
    check_same_model(read_config(checkpoint), module.config, checkpoint)
    saved = checkpoint / TOKENIZER_FILE
    processor = getattr(datamodule, "processor", None)
    if saved.is_file() and processor is not None and saved.read_bytes() != processor.tokenizer.content.encode():
        raise ConfigError("data: tokenizer", "the checkpoint's", "another one", saved)
    if datamodule is not None:
        _check_position(checkpoint, datamodule)
    file = checkpoint / RECIPE_FILE
    if not file.is_file():  # of a notebook
        return []
    changes = changed_fields(read_json_object(file), recipe)
    return [_line(f"changed: {name}: {was!r} -> {now!r}") for name, was, now in changes if name not in NOT_OF_THE_RUN]


def left_to_train(checkpoint: Path, max_steps: int) -> list[str]:
    """A line where the run has ended already; `max_steps` of -1 is no bound."""
    step = read_manifest(checkpoint).step
    if not 0 <= max_steps <= step:
        return []
    return [_line(f"nothing is left of {max_steps} steps: --trainer.max_steps for more, --resume never to begin anew")]


def _check_position(checkpoint: Path, datamodule: pl.LightningDataModule) -> None:
    """A loader refuses a position in other data; asked here, before anything is written."""
    fit_loop = read_training_state(checkpoint)["loops"]["fit_loop"]
    loader: Any = datamodule.train_dataloader()
    for state in fit_loop["state_dict"].get("combined_loader", []):
        if state:
            loader.load_state_dict(state)
