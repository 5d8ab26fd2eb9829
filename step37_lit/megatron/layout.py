"""`ParallelLayout`: over how many ranks each part of the work is split."""

from __future__ import annotations

from dataclasses import dataclass

from step37_lit.config import Step37Config, require


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel groups; the rest of the world is data parallel.

    Args:
        tensor: Ranks that share each matrix.
        pipeline: Pipeline stages.
        virtual_pipeline: Model chunks of each stage (interleaved schedule), or None for one.
        expert: Ranks that share the routed experts.
        context: Ranks that share each pack.
        sequence_parallel: Split the residual stream over the tensor ranks between matrices.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    expert: int = 1
    context: int = 1
    sequence_parallel: bool = False

    @property
    def model_parallel_size(self) -> int:
        """Ranks that work on one pack."""
        return self.tensor * self.pipeline * self.context

    def data_parallel_size(self, world_size: int) -> int:
        return world_size // self.model_parallel_size

    def validate(self, config: Step37Config, world_size: int) -> None:
        """Refuses a layout that cannot work, before any process group is made.

        Raises:
            ConfigError: a size does not divide what it splits; names the field with both numbers.
        """
        for name in ("tensor", "pipeline", "expert", "context"):
            require(getattr(self, name) >= 1, f"strategy.{name}", "1 or more", getattr(self, name))
        self._check_built()
        require(
            world_size % self.model_parallel_size == 0,
            "strategy.tensor x pipeline x context",
            f"a divisor of the {world_size} processes",
            self.model_parallel_size,
        )
        text = config.text
        for field_name in ("num_heads", "num_sliding_heads", "num_kv_groups", "vocab_size", "ffn_hidden_size"):
            self._check_divides("tensor", self.tensor, f"text.{field_name}", getattr(text, field_name))
        self._check_divides("pipeline", self.pipeline, "text.num_layers", text.num_layers)
        if text.moe_layers:
            self._check_divides("expert", self.expert, "text.num_experts", text.num_experts)
            self._check_divides("tensor", self.tensor, "text.shared_expert_ffn_size", text.shared_expert_ffn_size)
        else:
            require(self.expert == 1, "strategy.expert", "1 (the model has no experts)", self.expert)
        ranks_of_stage = world_size // self.pipeline
        require(
            ranks_of_stage % self.expert == 0,
            "strategy.expert",
            f"a divisor of the {ranks_of_stage} processes of a pipeline stage",
            self.expert,
        )
        require(
            not self.sequence_parallel or self.tensor > 1,
            "strategy.sequence_parallel",
            "false with strategy.tensor 1",
            self.sequence_parallel,
        )

    def _check_built(self) -> None:
        """Parts of the layouts that later versions bring; refused here so that nothing trains on wrong numbers."""
        require(self.context == 1, "strategy.context", "1 (context parallelism is not there yet)", self.context)
        require(
            self.virtual_pipeline is None,
            "strategy.virtual_pipeline",
            "null (interleaved stages are not there yet)",
            self.virtual_pipeline,
        )

    @staticmethod
    def _check_divides(name: str, size: int, what: str, total: int) -> None:
        divisors = [d for d in range(1, total + 1) if total % d == 0]
        nearest = min(divisors, key=lambda d: (abs(d - size), d))
        require(total % size == 0, f"strategy.{name}", f"a divisor of {what} {total} (nearest: {nearest})", size)
