"""The command line: LightningCLI with one model class, safe class paths and errors of one line.

A recipe is data: it may name classes of this project and a list of Lightning's, and naming anything else is refused
before it is imported.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentError, set_parsing_settings
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from step37_lit import run_checks, signals
from step37_lit.errors import DISK_ERRORS, ConfigError, UserError, disk_error, require
from step37_lit.exit_codes import FAULT, USER_ERROR
from step37_lit.faults import TrainingFault
from step37_lit.lit_module import Step37LitModule, megatron_strategy
from step37_lit.megatron.launch import PROJECT_PACKAGES
from step37_lit.planner.short import short_form
from step37_lit.recipe import inherits, load_recipe
from step37_lit.report import write_report
from step37_lit.resume import Resume, ResumeMode, choose, compare, explicit, left_to_train
from step37_lit.run_checkpoints import RunCheckpoints
from step37_lit.run_log import RunCSVLogger, figures

LIGHTNING_LOGGERS = ("lightning.pytorch", "lightning.fabric")
LIGHTNING_CLASSES = {
    "lightning.pytorch.callbacks": {
        "early_stopping": ["EarlyStopping"],
        "lr_monitor": ["LearningRateMonitor"],
        "model_checkpoint": ["ModelCheckpoint"],
        "model_summary": ["ModelSummary"],
        "rich_model_summary": ["RichModelSummary"],
        "timer": ["Timer"],
        "device_stats_monitor": ["DeviceStatsMonitor"],
        "progress.rich_progress": ["RichProgressBar"],
        "progress.tqdm_progress": ["TQDMProgressBar"],
    },
    "lightning.pytorch.loggers": {"csv_logs": ["CSVLogger"], "tensorboard": ["TensorBoardLogger"]},
    "lightning.pytorch.profilers": {"simple": ["SimpleProfiler"], "advanced": ["AdvancedProfiler"]},
}
CONFIG_OPTIONS = ("-c", "--config")
TRAINER_DEFAULTS = {
    "strategy": {"class_path": "step37_lit.MegatronStrategy"},
    "devices": 1,
    "default_root_dir": "runs/step37",
    "log_every_n_steps": 1,
    "use_distributed_sampler": False,  # the data modules give each rank its share
    "reload_dataloaders_every_n_epochs": 1,  # epochs of packs differ in length, and a loader knows its own
    "max_epochs": 1,
}


def allowed_paths() -> list[str]:
    """Import paths that a recipe may name: each Lightning class under its public and its defining module."""
    paths = list(PROJECT_PACKAGES)
    for package, modules in LIGHTNING_CLASSES.items():
        for module, names in modules.items():
            paths += [f"{package}.{name}" for name in names] + [f"{package}.{module}.{name}" for name in names]
    return paths


class Step37Trainer(pl.Trainer):
    """Lightning's Trainer, whose strategy is given as a class.

    Args:
        strategy: A strategy class and its arguments; `step37_lit.MegatronStrategy` is the one that trains this model.
    """

    def __init__(self, strategy: Strategy, **kwargs: Any):
        # Lightning's own signature also takes a name, so that a class path would be taken for one.
        super().__init__(strategy=strategy, **kwargs)


class Step37CLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict` of a `Step37LitModule` on any data module of this project."""

    def __init__(self, args: list[str]):
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=allowed_paths())
        quiet: dict[str, Any] = {"exit_on_error": False}
        super().__init__(
            Step37LitModule,
            pl.LightningDataModule,
            trainer_class=Step37Trainer,
            subclass_mode_data=True,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs=quiet | {name: dict(quiet) for name in self.subcommands()},
            args=args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: Any) -> None:
        # One seed for the weights, the order of the data and what is drawn while training.
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.add_argument(
            "--resume",
            type=ResumeMode,
            default="auto",
            help="of fit: auto goes on from the run's newest good checkpoint where it has one, must fails without, "
            "never begins at step 0 (--ckpt_path names one)",
        )

    def parse_arguments(self, parser: Any, args: Any) -> None:
        refuse_own_seed(args)
        self.config = parser.parse_args(with_bases(args))

    def before_instantiate_classes(self) -> None:
        self._resume = self._choose_checkpoint()
        if self.subcommand != "fit":  # an evaluation of a run must not overwrite what the run wrote
            self.save_config_callback = None

    def _choose_checkpoint(self) -> Resume:
        config = self.config[self.subcommand]
        if config["ckpt_path"] is not None:
            return explicit(config["ckpt_path"])
        if self.subcommand != "fit" or config["trainer"]["enable_checkpointing"] is False:
            return Resume(None)
        return choose(config["resume"], Path(config["trainer"]["default_root_dir"]))

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except FileNotFoundError as error:  # a file that the recipe names; its message names it
            raise MisconfigurationException(str(error)) from error
        except ValueError as error:
            # jsonargparse wraps what a class's constructor raises in an account of every type it tried.
            within: BaseException | None = error
            while within is not None and not isinstance(within, ConfigError):
                within = within.__cause__ or within.__context__
            raise within or error from None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The Trainer. Where the recipe names no logger, training writes one metrics.csv and TensorBoard's files into
        the run's folder, and an evaluation prints."""
        config = self._get(self.config_init, "trainer")
        if config["logger"] in (None, True):
            kwargs["logger"] = self._run_loggers(config["default_root_dir"]) if self.subcommand == "fit" else False
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise ConfigError("trainer", "options that Lightning's Trainer takes", str(error)) from error

    def _run_loggers(self, root: str) -> list[Logger]:
        metrics = RunCSVLogger(root, continues=self._resume.path is not None)
        return [metrics, TensorBoardLogger(root, name="tensorboard", version="")]

    def after_instantiate_classes(self) -> None:
        """Everything that can be refused is refused here, before a process starts or a file is written."""
        run_checks.check(self.model, self.trainer, self.datamodule, fitting=self.subcommand == "fit")
        strategy = megatron_strategy(self.trainer)
        plain = json.loads(self.parser.dump(self.config, skip_none=False, format="json"))[self.subcommand]
        plain.pop("config", None)  # paths, as this rank was given them
        strategy.recipe, strategy.fallbacks = plain, self._resume.fallbacks
        lines = list(self._resume.lines)
        if self._resume.path is not None:
            self.trainer.ckpt_path = str(self._resume.path)
            if self.subcommand == "fit":
                lines += compare(self._resume.path, plain, self.model, self.datamodule)
                lines += left_to_train(self._resume.path, self.trainer.max_steps)
        if rank_zero_only.rank == 0 and self.subcommand == "fit":
            print("\n".join(lines), flush=True)

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would read options out of any file that is named, and put them above the recipe's."""

    def _set_seed(self) -> None:
        seed = self.config[self.subcommand]["seed_everything"]
        known = type(seed) is int and 0 <= seed < 2**32
        require(known, "seed_everything", "0 to 4294967295 (a run has one seed, which is written down)", seed)
        super()._set_seed()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # The Trainer knows the path already, so that it is verified before anything is set up.
        return super()._prepare_subcommand_kwargs(subcommand) | {"ckpt_path": None}

    def before_fit(self) -> None:
        """Prints the plan."""
        if self.trainer.is_global_zero:
            print(short_form(*run_checks.planned(self.model, self.trainer)), flush=True)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except signals.Stopped:
            if subcommand == "fit":  # what was reached is told all the same
                self.after_fit()
            raise
        except OSError as error:
            if (told := disk_error(error, self.trainer.default_root_dir)) is not None:
                raise told from error
            raise

    def after_fit(self) -> None:
        if self.trainer.is_global_zero:
            print(summary(self.trainer))
            self._write_report(Path(self.trainer.default_root_dir))

    def _write_report(self, folder: Path) -> None:
        """A page that cannot be written does not fail a run that is done."""
        if not (folder / "metrics.csv").is_file():
            return  # the recipe has loggers of its own
        try:
            print(f"report      {write_report(folder, ended=not self.trainer.strategy.stop)}")
        except ConfigError as error:
            print(f"report      none: {error}")


def summary(trainer: pl.Trainer) -> str:
    """Three lines for the end of a run: what was reached, the checkpoint, and where everything is."""
    root = Path(trainer.default_root_dir)
    checkpoint = trainer.checkpoint_callback
    saved = "none"
    if isinstance(checkpoint, RunCheckpoints | ModelCheckpoint):
        saved = checkpoint.last_model_path or checkpoint.best_model_path or "none"
    return (
        f"reached     step {trainer.global_step}: {figures(trainer.callback_metrics, training=True)}\n"
        f"checkpoint  {saved}\n"
        f"files       {root}: metrics.csv, config.yaml, pictures; curves: tensorboard --logdir {root}"
    )


def run(args: list[str]) -> int:
    """Runs one command.

    Returns:
        The exit code, see `exit_codes`: 0, 2 for a mistake of the user's and 65 for a fault of training (one line on
        stderr), a signal's.
    """
    threading.excepthook = _thread_ended
    for name in LIGHTNING_LOGGERS:  # which device was found is not news, and an error is one line
        logging.getLogger(name).setLevel(logging.WARNING)
    with signals.listening():
        try:
            Step37CLI(args)
        except (UserError, MisconfigurationException, ArgumentError) as error:
            print(f"error: {one_line(error, args)}", file=sys.stderr)
            return USER_ERROR
        except TrainingFault as fault:
            if rank_zero_only.rank == 0:  # all ranks have the same line
                print(f"fault: {fault}", file=sys.stderr)
            return FAULT
        except signals.Stopped as stopped:
            return stopped.stop.exit_code
        return signals.requested().exit_code  # of a signal that came when nothing was left to do


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread, which prints how a full disk ended it and raises it in the main thread again."""
    if not (isinstance(ended.exc_value, OSError) and ended.exc_value.errno in DISK_ERRORS):
        threading.__excepthook__(ended)


def recipes_of(args: list[str]) -> list[str]:
    """Values of `--config` among the arguments."""
    values = [value for option, value in itertools.pairwise(args) if option in CONFIG_OPTIONS]
    return values + [option.partition("=")[2] for option in args if option.startswith("--config=")]


def refuse_own_seed(args: list[str]) -> None:
    """Raises `ConfigError` for a seed of the data, as an option or in a recipe: it is linked to `seed_everything`, and
    jsonargparse, which refuses `model.seed`, would pass over it without a word."""
    advice = "seed_everything, of which it is taken"
    for option in args:
        if option.partition("=")[0] in ("--data.seed", "--data.init_args.seed"):
            raise ConfigError("data.seed", advice, option)
    for file in recipes_of(args):
        data = load_recipe(file).get("data") if Path(file).is_file() else None
        own = (data.get("init_args") or {}) if isinstance(data, dict) else {}
        if "seed" in own:
            raise ConfigError("data.init_args.seed", advice, own["seed"], file)


def with_bases(args: list[str]) -> list[str]:
    """The arguments with the content of a recipe that has a base, merged with it, in place of the recipe's path."""

    def resolved(value: str) -> str:
        return yaml.safe_dump(load_recipe(value), sort_keys=False) if inherits(value) else value

    given = list(args)
    for i, (option, value) in enumerate(itertools.pairwise(args), start=1):
        if option in CONFIG_OPTIONS:
            given[i] = resolved(value)
    for i, option in enumerate(args):
        name, equals, value = option.partition("=")
        if equals and name == "--config":
            given[i] = f"--config={resolved(value)}"
    return given


def one_line(error: Exception, args: list[str]) -> str:
    """The error as one line that begins with the recipe's name, where one was given."""
    text = " ".join(str(error).split())
    values = recipes_of(args)
    recipes = ", ".join(values)
    return text if not recipes or any(value in text for value in values) else f"{recipes}: {text}"
