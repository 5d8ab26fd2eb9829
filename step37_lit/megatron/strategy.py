"""`MegatronStrategy`: Lightning's Trainer on megatron-core's parallelism.

What happens in one global step, in Lightning's order:

    strategy.optimizer_step -> ForwardingOptimizer.step(closure)
      |- closure: LightningModule.training_step(list of packs)
      |    `- strategy.train_step          zero gradients, forward and backward of all microbatches, reduce, normalise
      |           zero_grad, backward      nothing: done already
      `- megatron's step                   clip by the global norm, AdamW on this rank's shard, gather the weights
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.optim import Optimizer

from step37_lit.batch import PackedBatch
from step37_lit.checkpoint.manifest import VerifyMode
from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError, require
from step37_lit.megatron import data_parallel, launch, pack_exchange, process, schedule
from step37_lit.megatron.checkpointing import CheckpointHooks
from step37_lit.megatron.chunks import chunks_of, whole_names
from step37_lit.megatron.finite import StepWatch
from step37_lit.megatron.launcher import RankLauncher
from step37_lit.megatron.layout import ParallelLayout
from step37_lit.megatron.lightning_plugins import MegatronPrecision
from step37_lit.megatron.optimizer import AdamWSettings, ForwardingOptimizer
from step37_lit.megatron.stopping import StopHooks
from step37_lit.megatron.watching import WatchHooks
from step37_lit.model.recompute import Recompute, RecomputeMode

# Callbacks of Lightning that would act on something other than what megatron trains, and what to use in their place.
REFUSED_CALLBACKS: dict[type[pl.Callback], str] = {
    BatchSizeFinder: "none that looks for a batch size (set the data module's packs and samples per pack)",
    LearningRateFinder: "none that looks for a learning rate (set model.lr)",
    GradientAccumulationScheduler: "none that accumulates (set the data module's microbatches)",
    StochasticWeightAveraging: "none that averages weights (the optimizer holds only a shard of them)",
    BackboneFinetuning: "callbacks.freeze_schedule.FreezeSchedule (it freezes megatron's optimizer too, and resumes)",
}


class MegatronStrategy(StopHooks, WatchHooks, CheckpointHooks, DDPStrategy):
    """Trains a `Step37LitModule` over megatron's parallel groups.

    One process needs no launcher, so notebooks and debuggers work; with more devices Lightning's launcher or torchrun
    starts the ranks. Microbatches are the packs in the list that the loader hands over, not
    `accumulate_grad_batches`; clipping is the Trainer's `gradient_clip_val`, by the norm over all ranks.

    Args:
        tensor: Ranks that share each matrix.
        pipeline: Pipeline stages.
        virtual_pipeline: Model chunks of each stage (interleaved schedule), or None for one. Chunk v of stage p holds
            the (v x pipeline + p)-th piece of the decoder.
        pipeline_layout: Decoder layers of each piece in the model's order, pipeline x virtual_pipeline numbers; None
            splits them evenly.
        expert: Ranks that share the routed experts.
        expert_tensor: Ranks that share each routed expert's matrices: 1, or as many as `tensor`.
        context: Ranks that share each pack's row.
        sequence_parallel: Split the residual stream over the tensor ranks between matrices.
        recompute: `none` keeps all activations; `selective` computes core attention and SwiGLUs again in the backward
            pass, `full` whole layers.
        recompute_layers: Only the first layers of each (virtual) stage, this many; None is all.
        recompute_vision: Compute the vision tower's blocks again.
        overlap_data_parallel: Reduce gradients during the backward pass and gather weights during the next forward
            pass. Every pack needs a picture then, and no part may freeze in the course of the run.
        seed: Of megatron's random-number generators.
        launch_timeout: Seconds within which all ranks must be there, with the same recipe and code.
        hang_timeout: Seconds without an answer of a rank, or without any step or batch of all, behind which every rank
            ends and the one that hangs is named. Loading and saving may take longer. Null waits forever, as for a
            debugger; a rank that dies is named all the same.
        cpu_threads: Threads of this process's operations on the CPU; None leaves torch's choice, one a core. Loader
            processes need cores too.
        verify: What of a checkpoint is hashed before it is loaded: `full` everything; `sample` every small file and
            one in eight of those above 16 MiB, for checkpoints of terabytes.

    The other arguments are Lightning's own and set by the Trainer.
    """

    def __init__(
        self,
        tensor: int = 1,
        pipeline: int = 1,
        virtual_pipeline: int | None = None,
        pipeline_layout: list[int] | None = None,
        expert: int = 1,
        expert_tensor: int = 1,
        context: int = 1,
        sequence_parallel: bool = False,
        recompute: RecomputeMode = "none",
        recompute_layers: int | None = None,
        recompute_vision: bool = False,
        overlap_data_parallel: bool = False,
        seed: int = 0,
        launch_timeout: float = 300.0,
        hang_timeout: float | None = 600.0,
        cpu_threads: int | None = None,
        verify: VerifyMode = "full",
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        precision_plugin: Precision | None = None,
    ):
        self.layout = ParallelLayout(
            tensor, pipeline, virtual_pipeline, pipeline_layout, expert, expert_tensor, context, sequence_parallel
        )
        self.overlap_data_parallel = overlap_data_parallel
        self.recompute = Recompute(recompute, recompute_layers, recompute_vision)
        require(
            cpu_threads is None or cpu_threads > 0, "strategy.cpu_threads", "null or a positive number", cpu_threads
        )
        require(launch_timeout > 0, "strategy.launch_timeout", "a positive number of seconds", launch_timeout)
        seconds = hang_timeout is None or hang_timeout > 0
        require(seconds, "strategy.hang_timeout", "null or a positive number of seconds", hang_timeout)
        self.seed, self.launch_timeout, self.cpu_threads, self.verify = seed, launch_timeout, cpu_threads, verify
        self.hang_timeout = hang_timeout
        # Set by a freezing schedule before `setup`: the part of the model that a parameter freezes and trains with, by
        # its name in the whole model. Parameters without one never train.
        self.part_of: Mapping[str, str] | None = None
        self.ddps: list[DistributedDataParallel] | None = None  # one for each chunk of this rank's stage
        self.step_watch: StepWatch | None = None  # of `ddps`
        self._clip_grad = 0.0
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            precision_plugin=precision_plugin,
        )

    # ---- what callbacks and modules may ask ----

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters: fp32, or bf16 (with fp32 main parameters in the optimizer)."""
        return self.precision_plugin.dtype

    @property
    def data_parallel_rank(self) -> int:
        return parallel_state.get_data_parallel_rank()

    @property
    def data_parallel_size(self) -> int:
        return parallel_state.get_data_parallel_world_size()

    @property
    def rank_of_stage(self) -> int:
        """Number of this rank among those that share a pack on its pipeline stage; the first one writes for them."""
        return parallel_state.get_tensor_and_context_parallel_rank()

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes losses and logits."""
        return parallel_state.is_pipeline_last_stage()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which share of the data is this rank's: all ranks that share a pack have the same."""
        return {"num_replicas": self.data_parallel_size, "rank": self.data_parallel_rank}

    @property
    def reads_data(self) -> bool:
        """Whether this process's loaders make the packs, which the others of its model-parallel group get from it."""
        return pack_exchange.is_reader()

    @property
    def precision_plugin(self) -> MegatronPrecision:
        return MegatronPrecision.from_flag(self._precision_plugin)

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        self._precision_plugin = None if plugin is None else MegatronPrecision.from_flag(plugin)

    def gather_from_data_ranks(self, value: Any) -> list[Any]:
        """`value` of each data-parallel rank of this rank's group, in their order."""
        values: list[Any] = [None] * self.data_parallel_size
        dist.all_gather_object(values, value, group=parallel_state.get_data_parallel_group())
        return values

    def broadcast_from_last_stage(self, value: Any) -> Any:
        """`value` of the last pipeline stage, on every stage."""
        group = parallel_state.get_pipeline_model_parallel_group()
        if dist.get_world_size(group) == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
        return held[0]

    # ---- steps, called by the LightningModule ----

    def train_step(self, microbatches: Sequence[PackedBatch]) -> schedule.StepResult:
        """Forward and backward of one global step; the optimizer's step follows from Lightning."""
        assert self.ddps is not None, "train_step outside of fit"
        if self.overlap_data_parallel:  # a rank that leaves out its vision tower would exchange other weights
            bare = [pack.sample_keys for pack in microbatches if not pack.images]
            require(not bare, "strategy.overlap_data_parallel", "false with packs without pictures", bare)
        self.progress.mark(f"step {self.step} (forward and backward)")
        for ddp in self.ddps:
            ddp.zero_grad_buffer()
        for optimizer in self.optimizers:
            optimizer.clear_gradients()
        result = schedule.train_step(self.ddps, microbatches, self.requested, self.step_watch)
        self.progress.mark(f"step {self.step} (optimizer)")
        if result.stop:  # on all ranks: one that could not write its part has made them stop here
            self.end_behind_step(result.stop)
            with self.progress.untimed("a wait for the last save"):
                self.saver.wait()
        return result

    @property
    def step(self) -> int:
        """Number of the optimizer step that is under way, from 1."""
        return self.lightning_module.trainer.global_step + 1

    def evaluate_step(self, microbatches: Sequence[PackedBatch]) -> list[tuple[PackedBatch, Tensor, Tensor]]:
        """Teacher-forced losses and most likely tokens on the last stage; see `schedule.evaluate_step`."""
        data_parallel.gather_weights(self.ddps or [])
        return schedule.evaluate_step(chunks_of(self.lightning_module.model), microbatches)

    def build_optimizer(self, settings: AdamWSettings) -> ForwardingOptimizer:
        """megatron's distributed optimizer for the model, to be returned by `configure_optimizers`."""
        assert self.ddps is not None, "build_optimizer outside of fit"
        return ForwardingOptimizer(self.ddps, settings, self._clip_grad, self.dtype, self.part_of)

    # ---- hooks of Lightning ----

    def check(self, config: Step37Config, trainer: pl.Trainer, fitting: bool) -> None:
        """Refuses what cannot work, before any process starts or any group is made.

        Args:
            config: The model.
            trainer: The Trainer that has this strategy.
            fitting: Whether training is to follow.

        Raises:
            ConfigError: names the Trainer's or the strategy's field.
        """
        self._check_world_size()
        self.layout.validate(config, self.num_nodes * self.num_processes)
        self.recompute.validate(max(self.layout.layers_of_pieces(config.text.num_layers)))
        accumulate = trainer.accumulate_grad_batches
        advice = "1 (the loader hands over the microbatches of a step as a list: set them in the data module)"
        require(accumulate == 1, "trainer.accumulate_grad_batches", advice, accumulate)
        algorithm = trainer.gradient_clip_algorithm
        require(algorithm in (None, "norm"), "trainer.gradient_clip_algorithm", "norm", algorithm and algorithm.value)
        if self.num_nodes * self.num_processes > 1:
            wraps = trainer._accelerator_connector.use_distributed_sampler
            advice = "false (the data module gives each rank its share; Lightning would halve it again)"
            require(not wraps, "trainer.use_distributed_sampler", advice, wraps)
        if fitting:
            self._check_callbacks(trainer)

    def _check_world_size(self) -> None:
        """Launchers that start the ranks themselves have a number of their own."""
        environment = self.cluster_environment
        if isinstance(environment, TorchElasticEnvironment | SLURMEnvironment):
            started, asked = environment.world_size(), self.num_nodes * self.num_processes
            found = f"{self.num_processes} x {self.num_nodes}"
            field, advice = "trainer.devices x num_nodes", f"the {started} processes that were started"
            require(started == asked, field, advice, found)

    def _check_callbacks(self, trainer: pl.Trainer) -> None:
        for callback in trainer.callbacks:
            name = type(callback).__name__
            for refused, advice in REFUSED_CALLBACKS.items():
                require(not isinstance(callback, refused), "trainer.callbacks", advice, name)

    def _configure_launcher(self) -> None:
        self._launcher = RankLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        module = self.lightning_module
        self.check(module.config, module.trainer, module.trainer.state.fn == TrainerFn.FITTING)
        super().setup_environment()
        if module.trainer.ckpt_path is not None:
            self.find_source(module.trainer.ckpt_path)

    def setup_distributed(self) -> None:
        if self.cpu_threads is not None:
            torch.set_num_threads(self.cpu_threads)
        if self.num_nodes * self.num_processes > 1:
            store = None if dist.is_initialized() else self._agree()
            super().setup_distributed()
            del store  # rank 0 had its server
        else:
            self.set_world_ranks()
        process.initialize(self.layout, self.seed)
        self.progress.mark("loading", timed=False)
        self.begin_watch()

    def _agree(self) -> dist.Store:
        self.set_world_ranks()
        environment, module = self.cluster_environment, self.lightning_module
        own = launch.fingerprint(recipe=self.recipe or {}, model=asdict(module.config), layout=asdict(self.layout))
        ranks = environment.global_rank(), self.num_nodes * self.num_processes
        return launch.agree(environment.main_address, environment.main_port, *ranks, own, self.launch_timeout)

    def setup(self, trainer: pl.Trainer) -> None:
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self.watch_validations(trainer)
            self._clip_grad = float(trainer.gradient_clip_val or 0.0)
            model = self.lightning_module.model
            if self.part_of is not None:
                for name, parameter in whole_names(model):
                    parameter.requires_grad_(name in self.part_of)
            self.ddps = data_parallel.wrap(model, self.overlap_data_parallel)
            self.step_watch = StepWatch(self.ddps)
            self.setup_optimizers(trainer)
            for optimizer in self.optimizers:
                if not isinstance(optimizer, ForwardingOptimizer):
                    advice = "trainer.strategy.build_optimizer(AdamWSettings(...))"
                    raise ConfigError("configure_optimizers", advice, type(optimizer).__name__)
                optimizer.take_over_model_weights()
        self.setup_precision_plugin()

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """A step's packs on the device; all ranks of a model-parallel group have their reader's."""
        trainer = self.lightning_module.trainer
        if not trainer.training:
            self.progress.mark(f"{trainer.state.stage.value} behind step {trainer.global_step}")
            self.end_here_if_asked()
        else:
            self.progress.mark(f"step {self.step} (packs)")
        return pack_exchange.share_packs(super().batch_to_device(batch, device, dataloader_idx))

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Only the hooks: the gradients are there already."""
        module = self.lightning_module
        self.precision_plugin.pre_backward(closure_loss, module)
        return self.precision_plugin.post_backward(closure_loss, module)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        data_parallel.gather_weights(self.ddps or [])
        return super().lightning_module_state_dict()

    def teardown(self) -> None:
        data_parallel.gather_weights(self.ddps or [])
        self.agree_at_the_end()
        self.end_watch()
        super().teardown()
