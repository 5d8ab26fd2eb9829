"""Lightning's checkpoint hooks of `MegatronStrategy`, on the project's own format.

    RUN/checkpoints/step_000200/
        manifest.json      size and SHA-256 of every file
        model.json, processor.json, tokenizer.json, chat_template.jinja      enough to use the model without its recipe
        recipe.json        the run's options, to say what has changed
        model/             weights, whole tensors by their names in the name table (torch DCP)
        optimizer/         moments, and fp32 main weights where the model is bf16 (torch DCP)
        training.pt        loops, loader, scheduler, callbacks, random numbers: plain values and small tensors

Lightning's own dictionary holds neither weights nor moments here: each rank writes and reads its parts of them.
"""

from __future__ import annotations

import dataclasses
import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch.optim.lr_scheduler import LambdaLR

from step37_lit import saved_model
from step37_lit.checkpoint.manifest import (
    Manifest,
    VerifyMode,
    check_hashes,
    check_structure,
    files_to_hash,
    read_manifest,
)
from step37_lit.checkpoint.tensors import found_by_torch
from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError, require
from step37_lit.megatron import random_state
from step37_lit.megatron.chunks import chunks_of
from step37_lit.megatron.layout import ParallelLayout
from step37_lit.megatron.rank_verdict import Progress
from step37_lit.megatron.saver import LAST_CHANCE, CheckpointSaver, Job
from step37_lit.megatron.sharding import MODEL, OPTIMIZER, OwnParts, load_optimizer, load_weights, steps_by_name

TRAINING_FILE, RECIPE_FILE = "training.pt", "recipe.json"
VALIDATION_DUE = "validation_due"  # an entry of TRAINING_FILE


class CheckpointHooks:
    """What `MegatronStrategy` does when Lightning saves and loads; mixed into it."""

    layout: ParallelLayout
    lightning_module: Any
    broadcast: Callable[..., Any]
    optimizers: list[Any]
    verify: VerifyMode
    progress: Progress
    owes_validation: Callable[[], bool]

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        # The options of the run, where the command line started it: plain values, saved with each checkpoint.
        self.recipe: dict[str, Any] | None = None
        # Tried in their order where the checkpoint that is asked for turns out damaged.
        self.fallbacks: Sequence[Path] = ()
        self.saver = CheckpointSaver()
        self._source: tuple[Path, Manifest] | None = None  # the checkpoint that is being loaded, verified

    # ---- saving ----

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """What is small: steps behind each weight's moments, and the freezing schedule's parts. For all ranks."""
        own = steps_by_name(chunks_of(self.lightning_module.model), self.optimizers[0])
        steps = {name: step for each in self.gather_from_all_ranks(own) for name, step in each.items()}
        return {"steps": steps, "parts": self.optimizers[0].parts}

    def random_states(self) -> dict[str, Any]:
        """Generators of every rank and the layout that they are of; all ranks must call it."""
        return {"layout": self.described_layout(), "ranks": self.gather_from_all_ranks(random_state.collect())}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Starts a save in the background while training runs, else saves; all ranks must call it.

        Args:
            checkpoint: Lightning's dictionary.
            filepath: The folder to be.
            storage_options: None.

        Raises:
            ConfigError: this save cannot begin, or the one before it has failed.
        """
        if storage_options is not None:
            raise ConfigError("storage_options", "None (checkpoints are local folders)", storage_options)
        with self.progress.untimed(f"a save to {filepath}"):
            self._save(checkpoint, Path(filepath).absolute())

    def _save(self, checkpoint: dict[str, Any], target: Path) -> None:
        trainer: pl.Trainer = self.lightning_module.trainer
        parts = OwnParts(chunks_of(self.lightning_module.model))
        tensors = {MODEL: parts.model(writing=True)}
        files = dict(checkpoint.pop(saved_model.ENTRY))
        if self.recipe is not None:
            files[RECIPE_FILE] = (json.dumps(self.recipe, indent=1) + "\n").encode()
        whole = "optimizer_states" in checkpoint
        if whole:
            tensors[OPTIMIZER] = parts.optimizer(self.optimizers[0], writing=True)
            checkpoint[VALIDATION_DUE] = self.owes_validation()
            files[TRAINING_FILE] = _plain_bytes(checkpoint)
        described = self._described("training" if whole else "weights")
        self.saver.save(Job(target, tensors, files, described, points=whole))
        if trainer.state.fn != TrainerFn.FITTING or trainer.state.status != TrainerStatus.RUNNING:
            self.saver.wait()

    def _described(self, kind: str) -> dict[str, Any]:
        trainer: pl.Trainer = self.lightning_module.trainer
        return {
            "kind": kind,
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "layout": self.described_layout(),
            "dtype": str(self.lightning_module.strategy.dtype).removeprefix("torch."),
        }

    def save_weights_of(self, rank: int, filepath: Path) -> None:
        """Writes the weights as `rank` has them, in a checkpoint of weights; all ranks must call it between two steps.

        Where ranks should have the same part of a weight and do not, `rank`'s is taken.

        Raises:
            ConfigError: the disk has no room for it, or cannot be written to.
        """
        parts = OwnParts(chunks_of(self.lightning_module.model))
        own = {name: place.replica for name, place in parts.places.items()}
        writers = self.broadcast(own, src=rank)
        files = saved_model.description(self.lightning_module.config, None, None)
        tensors = {MODEL: parts.model(writing=True, writers=writers)}
        self.saver.save(Job(filepath.absolute(), tensors, files, self._described("weights"), points=False))
        self.saver.wait()

    def remove_checkpoint(self, filepath: Any) -> None:
        if dist.get_rank() == 0:
            self.saver.remove(Path(filepath).absolute())

    def on_train_end(self) -> None:
        self.progress.mark("the end of training", timed=False)
        self.saver.wait()

    def on_exception(self, exception: BaseException) -> None:
        """No save begins here, where other ranks may be gone; one that is under way gets a last chance."""
        if not self.saver.failed:
            self.saver.wait(LAST_CHANCE)

    def described_layout(self) -> dict[str, Any]:
        """Sizes of the parallel groups and of the world, as plain values."""
        plain = dataclasses.asdict(self.layout) | {"world_size": dist.get_world_size()}
        return json.loads(json.dumps(plain))  # as it comes back from a file

    def gather_from_all_ranks(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], object]) -> None:
        """Runs `action` on every rank; the first error of any rank is raised on all."""
        error: Exception | None = None
        try:
            action()
        except Exception as found:
            error = found
        for each in self.gather_from_all_ranks(error):
            if each is not None:
                raise each

    # ---- loading ----

    def find_source(self, path: Any) -> None:
        """Verifies the checkpoint that is to be loaded, before anything is set up or written; for all ranks.

        Raises:
            ConfigError: it is damaged and so are all of `fallbacks`, or it is of another model or dtype.
        """
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        candidates = [Path(path), *self.fallbacks]
        for number, candidate in enumerate(candidates):
            try:
                manifest = self._verified(candidate, None if fitting else MODEL)
            except ConfigError as error:
                if number == len(candidates) - 1:
                    raise
                print_once(f"resume      passed over: {error}")
                continue
            self._check_fits(candidate, manifest, fitting)
            if number > 0:
                print_once(f"resume      {manifest.headline(candidate)}")
            self._source = (candidate, manifest)
            return

    def _verified(self, folder: Path, only: str | None) -> Manifest:
        """The ranks share the files among themselves."""
        error, manifest = None, None
        try:
            manifest = read_manifest(folder)
            check_structure(folder, manifest)
            names = files_to_hash(manifest, self.verify, only)
            check_hashes(folder, manifest, names[dist.get_rank() :: dist.get_world_size()])
        except ConfigError as found:
            error = found
        errors = [each for each in self.gather_from_all_ranks(error) if each is not None]
        if errors:
            raise errors[0]
        assert manifest is not None
        return manifest

    def _check_fits(self, folder: Path, manifest: Manifest, fitting: bool) -> None:
        check_same_model(saved_model.read_config(folder), self.lightning_module.config, folder)
        if fitting:
            advice = "a checkpoint of training (to begin with its weights: --model.init_from)"
            if manifest.kind != "training":
                raise ConfigError("ckpt_path", advice, f"one of {manifest.kind} alone", folder)
            own = str(self.lightning_module.strategy.dtype).removeprefix("torch.")
            if manifest.dtype != own:
                raise ConfigError("trainer.precision", f"{manifest.dtype} (of the checkpoint)", own, folder)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Lightning's dictionary of a checkpoint; nothing in its files is executed.

        Raises:
            ConfigError: it is damaged, or `weights_only=False` is asked for.
        """
        if weights_only is False:
            raise ConfigError("weights_only", "True (a checkpoint must not run code)", False)
        if self._source is None:
            self.find_source(checkpoint_path)
        assert self._source is not None
        folder, manifest = self._source
        if manifest.kind == "training":
            state = read_training_state(folder)
            self._validation_due = state.get(VALIDATION_DUE, False)  # checkpoints of earlier versions do not say
            return state
        return {
            "pytorch-lightning_version": pl.__version__,
            "epoch": manifest.epoch,
            "global_step": manifest.step,
            "state_dict": {},
            "random_states": None,
        }

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self._source is not None
        load_weights(chunks_of(self.lightning_module.model), self._source[0])

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Moments, and where the schedulers stand: rates, decay and the like are those of this run."""
        assert self._source is not None
        (state,) = checkpoint["optimizer_states"]
        (optimizer,) = self.optimizers
        require(
            optimizer.parts == state["parts"],
            "checkpoint: groups of a freezing schedule",
            optimizer.parts,
            state["parts"],
        )
        load_optimizer(chunks_of(self.lightning_module.model), optimizer, self._source[0], state["steps"])
        restore_schedulers(self.lightning_module.trainer, checkpoint)
        self._source = None

    def on_train_start(self) -> None:
        """Begins the next epoch where the checkpoint is of an epoch's last batch.

        Lightning counts that epoch as done then, but takes the next one for the rest of it: it is not begun, its
        counters fall behind, and a second resume at an epoch's end repeats an epoch.
        """
        loop = self.lightning_module.trainer.fit_loop
        epochs = loop.epoch_progress.current
        if loop.restarted_mid_epoch and epochs.processed == epochs.started:
            loop.reset_restart_stage()

    def restore_random_state(self, states: dict[str, Any]) -> None:
        """Puts the generators where they were; in another layout they begin anew, as there is no same one."""
        if states["layout"] == self.described_layout():
            random_state.restore(states["ranks"][dist.get_rank()])


def restore_schedulers(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Puts the schedulers at the checkpoint's step, with this run's rates; Lightning finds nothing left to do."""
    states = checkpoint["lr_schedulers"]
    for config, state in zip(trainer.lr_scheduler_configs, states, strict=True):
        scheduler: Any = config.scheduler
        if isinstance(scheduler, LambdaLR):
            # Its own load_state_dict would bring back the old rates, warm-up and decay.
            step = state["last_epoch"]
            scheduler.last_epoch, scheduler._step_count = step, state["_step_count"]
            pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            scheduler._last_lr = [rate * factor(step) for rate, factor in pairs]
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = rate
        else:
            scheduler.load_state_dict(state)
    checkpoint["lr_schedulers"] = []


def read_training_state(folder: Path) -> dict[str, Any]:
    """`training.pt` of a verified checkpoint.

    Raises:
        ConfigError: it holds anything but plain values and tensors.
    """
    file = folder / TRAINING_FILE
    try:
        with warnings.catch_warnings(action="ignore"):  # of a pickle's protocol
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise nearly everything for a file that is none of theirs
        raise ConfigError("checkpoint", "plain values and tensors", found_by_torch(error), file) from error
    if not isinstance(state, dict):
        raise ConfigError("checkpoint", "a dictionary", type(state).__name__, file)
    return state


def check_same_model(saved: Step37Config, own: Step37Config, folder: Path) -> None:
    """Raises `ConfigError` with every field of the model that differs."""
    differing = changed_fields(dataclasses.asdict(saved), dataclasses.asdict(own))
    if differing:
        expected = ", ".join(f"{name} {was!r}" for name, was, _ in differing)
        found = ", ".join(f"{name} {now!r}" for name, _, now in differing)
        raise ConfigError("model", f"{expected} (of the checkpoint)", found, folder)


def changed_fields(was: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Name, former and present value of each leaf that differs between two nested dictionaries."""
    if isinstance(was, dict) and isinstance(now, dict):
        names = [*was, *(key for key in now if key not in was)]
        absent = "absent"
        return [
            change
            for key in names
            for change in changed_fields(was.get(key, absent), now.get(key, absent), f"{name}.{key}".lstrip("."))
        ]
    return [] if was == now else [(name, was, now)]


def print_once(line: str) -> None:
    """Prints on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(line, flush=True)


def _plain_bytes(checkpoint: dict[str, Any]) -> bytes:
    """`training.pt`. Raises `RuntimeError` where it could not be read back: a callback's state must be plain."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except Exception as error:
        names = sorted(checkpoint["callbacks"])
        raise RuntimeError(f"state of callbacks must be plain values and tensors ({names}): {error}") from error
    return buffer.getvalue()
