"""`ParallelLayout`: over how many ranks each part of the work is split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from step37_lit.config import Step37Config
from step37_lit.errors import require


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel groups; the rest of the world is data parallel.

    Args:
        tensor: Ranks that share each matrix.
        pipeline: Pipeline stages.
        virtual_pipeline: Model chunks of each stage (interleaved schedule), or None for one. Chunk v of stage p holds
            the (v x pipeline + p)-th piece of the decoder.
        pipeline_layout: Decoder layers of each piece, in the model's order; None splits them evenly.
        expert: Ranks that share the routed experts.
        expert_tensor: Ranks that share each routed expert's matrices: 1, or as many as `tensor`.
        context: Ranks that share each pack's row.
        sequence_parallel: Split the residual stream over the tensor ranks between matrices.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    pipeline_layout: Sequence[int] | None = None
    expert: int = 1
    expert_tensor: int = 1
    context: int = 1
    sequence_parallel: bool = False

    @property
    def model_parallel_size(self) -> int:
        """Ranks that work on one pack."""
        return self.tensor * self.pipeline * self.context

    @property
    def pieces(self) -> int:
        """Parts that the decoder is cut into: pipeline stages x virtual stages."""
        return self.pipeline * (self.virtual_pipeline or 1)

    def data_parallel_size(self, world_size: int) -> int:
        return world_size // self.model_parallel_size

    def layers_of_pieces(self, num_layers: int) -> list[int]:
        """Decoder layers of each piece, in the model's order; `validate` has found them right."""
        if self.pipeline_layout is not None:
            return list(self.pipeline_layout)
        return [num_layers // self.pieces] * self.pieces

    def check_microbatches(self, microbatches: int, ranks: int, field: str) -> None:
        """Refuses what the interleaved schedule cannot run.

        Args:
            microbatches: Of a global step, over all data-parallel ranks.
            ranks: Data-parallel ranks.
            field: That `ConfigError` names.
        """
        if self.virtual_pipeline is not None:
            step = self.pipeline * ranks
            nearest = max(1, round(microbatches / step)) * step
            advice = f"a multiple of pipeline {self.pipeline} x {ranks} data-parallel ranks (virtual stages)"
            require(microbatches % step == 0, field, f"{advice} (nearest: {nearest})", microbatches)

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
        for name in ("tensor", "pipeline", "expert", "expert_tensor", "context"):
            require(getattr(self, name) >= 1, f"strategy.{name}", "1 or more", getattr(self, name))
        size = self.model_parallel_size
        require(
            world_size % size == 0,
            "strategy.tensor x pipeline x context",
            f"a divisor of the {world_size} processes (nearest: {_nearest_divisor(world_size, size)})",
            size,
        )
        text = config.text
        for field_name in ("num_heads", "num_sliding_heads", "num_kv_groups", "vocab_size", "ffn_hidden_size"):
            self._check_divides("tensor", self.tensor, f"text.{field_name}", getattr(text, field_name))
        self._check_pieces(text.num_layers)
        self._check_experts(config, world_size // self.pipeline)
        require(
            not self.sequence_parallel or self.tensor > 1,
            "strategy.sequence_parallel",
            "false with strategy.tensor 1",
            self.sequence_parallel,
        )

    def _check_experts(self, config: Step37Config, ranks_of_stage: int) -> None:
        text = config.text
        if not text.moe_layers:
            for name in ("expert", "expert_tensor"):
                require(
                    getattr(self, name) == 1, f"strategy.{name}", "1 (the model has no experts)", getattr(self, name)
                )
            return
        self._check_divides("expert", self.expert, "text.num_experts", text.num_experts)
        self._check_divides("tensor", self.tensor, "text.shared_expert_ffn_size", text.shared_expert_ffn_size)
        sizes = "1" if self.tensor == 1 else f"1 or {self.tensor} (strategy.tensor)"
        require(self.expert_tensor in (1, self.tensor), "strategy.expert_tensor", sizes, self.expert_tensor)
        self._check_divides("expert_tensor", self.expert_tensor, "text.expert_ffn_size", text.expert_ffn_size)
        groups = ranks_of_stage // self.expert_tensor  # tensor divides the ranks of a stage
        split = "" if self.expert_tensor == 1 else f" / expert_tensor {self.expert_tensor}"
        nearest = _nearest_divisor(groups, self.expert)
        advice = f"a divisor of the {ranks_of_stage} processes of a pipeline stage{split} (nearest: {nearest})"
        require(groups % self.expert == 0, "strategy.expert", advice, self.expert)

    def _check_pieces(self, num_layers: int) -> None:
        virtual, pieces = self.virtual_pipeline, self.pieces
        if virtual is not None:
            require(virtual >= 2, "strategy.virtual_pipeline", "null or 2 or more", virtual)
            require(self.pipeline > 1, "strategy.virtual_pipeline", "null with strategy.pipeline 1", virtual)
        field = "strategy.pipeline" if virtual is None else "strategy.pipeline x virtual_pipeline"
        require(pieces <= num_layers, field, f"at most text.num_layers {num_layers}", pieces)
        if self.pipeline_layout is None:
            nearest = f"nearest: {_nearest_divisor(num_layers, pieces)}"
            suggested = f"strategy.pipeline_layout, such as {_spread(num_layers, pieces)}"
            advice = f"a divisor of text.num_layers {num_layers} ({nearest}), or {suggested}"
            require(num_layers % pieces == 0, field, advice, pieces)
            return
        field, counts = "strategy.pipeline_layout", self.pipeline_layout
        # A list and not a string: YAML's `6,6` would otherwise be taken letter by letter.
        whole = isinstance(counts, list | tuple) and all(type(count) is int for count in counts)
        suggested = f"such as {_spread(num_layers, pieces)}"
        require(whole, field, f"a list of numbers of layers, {suggested}", counts)
        require(len(counts) == pieces, field, f"{pieces} numbers (stages x virtual stages), {suggested}", list(counts))
        require(min(counts) >= 1, field, f"at least one layer everywhere, {suggested}", list(counts))
        found = f"{list(counts)} of sum {sum(counts)}"
        require(sum(counts) == num_layers, field, f"text.num_layers {num_layers} in all, {suggested}", found)

    @staticmethod
    def _check_divides(name: str, size: int, what: str, total: int) -> None:
        nearest = f"nearest: {_nearest_divisor(total, size)}"
        require(total % size == 0, f"strategy.{name}", f"a divisor of {what} {total} ({nearest})", size)


def _spread(num_layers: int, pieces: int) -> list[int]:
    """Layers as evenly as they go, the shorter pieces at both ends: they also have the vision tower and the heads."""
    least, longer = divmod(num_layers, pieces)
    first = (pieces - longer) // 2
    return [least + (first <= piece < first + longer) for piece in range(pieces)]


def _nearest_divisor(total: int, size: int) -> int:
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    return min(divisors, key=lambda d: (abs(d - size), d))
