"""`PlannedLayout`: a layout over a given number of ranks, with the layers of each pipeline stage.

It knows more splits than a strategy of this version may run, so that they can be planned before they are built;
`ParallelLayout.validate` says what runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from step37_lit.config import Step37Config, TextConfig
from step37_lit.errors import ConfigError, require
from step37_lit.megatron.layout import ParallelLayout


@dataclass(frozen=True)
class PlannedLayout:
    """Sizes of the parallel groups of `ranks` processes.

    Args:
        ranks: Processes, one a GPU.
        tensor: Ranks that share each matrix.
        pipeline: Pipeline stages.
        virtual_pipeline: Model chunks of each stage (interleaved schedule); 1 is the plain schedule.
        expert: Ranks that share the routed experts.
        expert_tensor: Ranks that share each routed expert's matrices: 1, or as many as `tensor`.
        context: Ranks that share each pack.
        sequence_parallel: Split the residual stream over the tensor ranks between matrices.
        stage_layers: Decoder layers of each chunk in the model's order (chunk c is on stage c % pipeline), or empty
            for equal ones.
    """

    ranks: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    context: int = 1
    sequence_parallel: bool = False
    stage_layers: tuple[int, ...] = ()

    @classmethod
    def of(cls, layout: ParallelLayout, ranks: int) -> PlannedLayout:
        """A strategy's layout on `ranks` processes."""
        return cls(
            ranks=ranks,
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            virtual_pipeline=layout.virtual_pipeline or 1,
            expert=layout.expert,
            expert_tensor=layout.expert_tensor,
            context=layout.context,
            sequence_parallel=layout.sequence_parallel,
            stage_layers=tuple(layout.pipeline_layout or ()),
        )

    @property
    def chunks(self) -> int:
        """Pieces that the decoder is cut into."""
        return self.pipeline * self.virtual_pipeline

    @property
    def data(self) -> int:
        """Data-parallel ranks: how many packs are worked on at a time."""
        return self.ranks // (self.tensor * self.pipeline * self.context)

    @property
    def dense_shards(self) -> int:
        """Ranks over which gradients and optimizer state of weights that are not experts' are spread."""
        return self.data * self.context

    @property
    def expert_shards(self) -> int:
        """Ranks over which gradients and optimizer state of routed experts are spread."""
        return self.ranks // (self.pipeline * self.expert * self.expert_tensor)

    @property
    def residual_ranks(self) -> int:
        """Ranks that the rows of the residual stream are divided by."""
        return self.context * (self.tensor if self.sequence_parallel else 1)

    def layers(self, text: TextConfig) -> list[range]:
        """Decoder layers of each chunk, in the model's order."""
        counts = self.stage_layers or (text.num_layers // self.chunks,) * self.chunks
        starts = [sum(counts[:chunk]) for chunk in range(len(counts))]
        return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]

    def chunks_of_stage(self, stage: int) -> range:
        return range(stage, self.chunks, self.pipeline)

    def validate(self, config: Step37Config) -> None:
        """Refuses a layout that cannot work.

        Raises:
            ConfigError: see `validate_sizes`; or `stage_layers` do not cut the decoder into the chunks.
        """
        self.validate_sizes(config)
        self._check_stages(config.text)

    def validate_sizes(self, config: Step37Config) -> None:
        """Refuses sizes that cannot work, whatever layers the stages get.

        Raises:
            ConfigError: a size does not divide what it splits; names the field, both numbers and the nearest size
                that would do.
        """
        text = config.text
        for name in ("ranks", "tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor", "context"):
            require(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        for name in ("num_heads", "num_sliding_heads", "num_kv_groups", "vocab_size", "ffn_hidden_size"):
            _divides("tensor", self.tensor, f"text.{name}", getattr(text, name))
        product = self.tensor * self.pipeline * self.context
        require(self.ranks % product == 0, "tensor x pipeline x context", f"a divisor of {self.ranks} ranks", product)
        single = "1 with one pipeline stage"
        require(self.pipeline > 1 or self.virtual_pipeline == 1, "virtual_pipeline", single, self.virtual_pipeline)
        self._check_experts(text)
        require(not self.sequence_parallel or self.tensor > 1, "sequence_parallel", "false with tensor 1", True)

    def _check_stages(self, text: TextConfig) -> None:
        if not self.stage_layers:
            _divides("pipeline x virtual_pipeline", self.chunks, "text.num_layers", text.num_layers)
            return
        require(len(self.stage_layers) == self.chunks, "stage_layers", f"{self.chunks} counts", self.stage_layers)
        require(min(self.stage_layers) >= 0, "stage_layers", "counts of 0 or more", self.stage_layers)
        total = sum(self.stage_layers)
        require(total == text.num_layers, "stage_layers", f"a sum of {text.num_layers} (text.num_layers)", total)

    def _check_experts(self, text: TextConfig) -> None:
        stage_ranks = self.ranks // self.pipeline
        if not text.moe_layers:
            require(self.expert == self.expert_tensor == 1, "expert", "1 (the model has no experts)", self.expert)
            return
        _divides("expert", self.expert, "text.num_experts", text.num_experts)
        sizes = "1" if self.tensor == 1 else f"1 or {self.tensor} (tensor)"
        require(self.expert_tensor in (1, self.tensor), "expert_tensor", sizes, self.expert_tensor)
        _divides("expert_tensor", self.expert_tensor, "text.expert_ffn_size", text.expert_ffn_size)
        _divides("tensor", self.tensor, "text.shared_expert_ffn_size", text.shared_expert_ffn_size)
        product = self.expert * self.expert_tensor
        expected = f"a divisor of the {stage_ranks} ranks of a pipeline stage"
        require(stage_ranks % product == 0, "expert x expert_tensor", expected, product)

    @cached_property
    def label(self) -> str:
        """Short name: TP2 SP PP8 VPP2 EP8 ETP1 CP1 DP4, without sizes of 1."""
        sizes = {
            "TP": self.tensor, "PP": self.pipeline, "VPP": self.virtual_pipeline, "EP": self.expert,
            "ETP": self.expert_tensor, "CP": self.context, "DP": self.data,
        }  # fmt: skip
        parts = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        if self.sequence_parallel:
            parts.insert(1, "SP")
        return " ".join(parts) or "one rank"


def _divides(name: str, size: int, what: str, total: int) -> None:
    if total % size == 0:
        return
    nearest = min((d for d in range(1, total + 1) if total % d == 0), key=lambda d: (abs(d - size), d))
    raise ConfigError(name, f"a divisor of {what} {total} (nearest: {nearest})", size)
