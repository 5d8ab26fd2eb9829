"""What is done in a step: the packs, and how they are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from step37_lit.config import Step37Config
from step37_lit.errors import require
from step37_lit.flops import Flops, decoder_flops, head_flops, mtp_flops, vision_flops
from step37_lit.megatron.shares import balanced
from step37_lit.planner.weights import DType, Part

Recompute = Literal["none", "selective", "full"]
Kernels = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Pack:
    """The shape of a micro-batch.

    Args:
        lengths: Tokens of each sub-sequence.
        learnt: Tokens with a loss.
        images: (side in pixels, number) of the images in it.
    """

    lengths: tuple[int, ...]
    learnt: int
    images: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        require(len(self.lengths) > 0 and min(self.lengths) > 0, "lengths", "positive numbers", self.lengths)
        require(0 <= self.learnt <= self.tokens, "learnt", f"in 0..{self.tokens} (tokens of the pack)", self.learnt)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @classmethod
    def uniform(
        cls, config: Step37Config, tokens: int, mean_length: int, images: int, learnt_share: float = 1.0
    ) -> Pack:
        """`tokens` in sub-sequences of about `mean_length`, with `images` global views.

        Raises:
            ConfigError: more image tokens than tokens, or a mean length that is not in 1..tokens.
        """
        require(0 < mean_length <= tokens, "sequence length", f"in 1..{tokens} (tokens of a pack)", mean_length)
        side = config.vision.image_size
        room = tokens // config.vision.num_tokens(side)
        require(0 <= images <= room, "images", f"in 0..{room} (their tokens fit a pack of {tokens})", images)
        number = max(1, round(tokens / mean_length))
        lengths = tuple(tokens // number + (i < tokens % number) for i in range(number))
        return cls(lengths, round(learnt_share * tokens), ((side, images),) if images else ())

    def busiest_images(self, ranks: int) -> tuple[tuple[int, int], ...]:
        """Images that the rank with most pixels encodes, where ranks share them as training does."""
        sides = [side for side, number in self.images for _ in range(number)]
        owners = balanced([side**2 for side in sides], ranks)
        shares = [[side for side, owner in zip(sides, owners, strict=True) if owner == rank] for rank in range(ranks)]
        largest = max(shares, key=lambda share: sum(side**2 for side in share))
        return tuple((side, largest.count(side)) for side in dict.fromkeys(largest))

    def flops(self, config: Step37Config) -> Flops:
        """Forward pass by part."""
        text = config.text
        learnt = [float(self.learnt)] * text.num_built_mtp_layers
        heads = Flops(
            head=head_flops(text, self.learnt),
            mtp=mtp_flops(text, self.lengths, learnt),
            vision=vision_flops(config, self.images),
        )
        return decoder_flops(text, self.lengths, range(text.num_layers)) + heads


@dataclass(frozen=True)
class Training:
    """How packs are trained.

    Args:
        pack: Every micro-batch.
        microbatches: Of a step, on each data-parallel rank.
        dtype: Of parameters and activations.
        recompute: What the decoder layers compute again in the backward pass: nothing, core attention and SwiGLUs, or
            whole layers.
        recompute_layers: Only the first layers of each chunk, this many, beside the MTP layers; None is all.
        vision_recompute: Compute the vision tower's blocks again in the backward pass.
        frozen: Parts that do not train.
        kernels: Whose kernels run, which decides what they keep: flash-attn and fused norms (`cuda`), or this
            project's for CPUs.
    """

    pack: Pack
    microbatches: int = 1
    dtype: DType = "bf16"
    recompute: Recompute = "none"
    recompute_layers: int | None = None
    vision_recompute: bool = False
    frozen: frozenset[Part] = frozenset()
    kernels: Kernels = "cuda"

    def __post_init__(self) -> None:
        require(self.microbatches > 0, "microbatches", "a positive number", self.microbatches)
        layers = self.recompute_layers
        require(layers is None or layers > 0, "recompute_layers", "null or a positive number", layers)

    def layer_mode(self, number: int) -> Recompute:
        """Of a chunk's layer `number`, from 0."""
        return self.recompute if self.recompute_layers is None or number < self.recompute_layers else "none"

    @property
    def passes(self) -> Flops:
        """How many times the forward pass's operations each part costs: backward is twice forward, once where only the
        gradient of its input is wanted, and what is recomputed runs once more (of MTP layers: see `again`)."""
        language = 2.0 if "language" in self.frozen else 3.0
        vision = 1.0 if "vision" in self.frozen else 3.0 + self.vision_recompute
        return self.again + Flops(vision, language, 3.0, language, language, language, language)

    @property
    def again(self) -> Flops:
        """How many times a recomputed decoder layer runs forward once more."""
        whole, core = (float(self.recompute in modes) for modes in (("full",), ("selective", "full")))
        return Flops(projections=whole, attention=core, dense=whole, experts=whole)
