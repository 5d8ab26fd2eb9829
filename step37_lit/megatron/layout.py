"""`ParallelLayout`: over how many ranks each part of the work is split."""

from __future__ import annotations

import math
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
        context: Ranks that share each pack's row.
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

    @property
    def row_multiple(self) -> int:
        """What the tokens of a pack must be a multiple of: two chunks a context rank, and a context rank's share over
        the tensor ranks under sequence parallelism."""
        chunks = 2 * self.context if self.context > 1 else 1
        shares = self.context * self.tensor if self.sequence_parallel else 1
        return math.lcm(chunks, shares)

    def check_row(self, field_name: str, tokens: int | None) -> None:
        """Refuses packs that cannot be shared.

        Args:
            field_name: Field of the recipe that sets their length.
            tokens: Length of every pack; None where packs differ.

        Raises:
            ConfigError: packs of a length that does not divide, or of no fixed one where it must.
        """
        multiple = self.row_multiple
        if multiple == 1:
            return
        nearest = multiple if tokens is None else max(1, round(tokens / multiple)) * multiple
        parts = f"strategy.context {self.context}, tensor {self.tensor}, sequence_parallel {self.sequence_parallel}"
        fits = tokens is not None and tokens % multiple == 0
        require(fits, field_name, f"a multiple of {multiple} ({parts}), such as {nearest}", tokens)

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
