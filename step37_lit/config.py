"""`Step37Config`: what a Step-3.7 model is, in one place.

Three parts, as the model has them: `VisionConfig` (Perception Encoder G/14 and two downsamplers), `TextConfig`
(Step-3.5 decoder and its MTP layers) and `TokenIds` (the special tokens that fusion looks for). The defaults of the
fields are the published 200B model, so `Step37Config()` is Step-3.7 Flash. A config is read from a hub `config.json`
by `Step37Config.from_hub` or taken from `Step37Config.preset`.

Nothing here knows megatron-core; `step37_lit.megatron.transformer_config` translates it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from step37_lit.errors import require

AttentionKind = Literal["full_attention", "sliding_attention"]
ATTENTION_KINDS: tuple[AttentionKind, ...] = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class VisionConfig:
    """Perception Encoder G/14 with two stride-2 downsamplers.

    Args:
        width: Channels of the transformer; the downsamplers double it twice.
        num_layers: Number of residual blocks.
        num_heads: Attention heads of each block.
        ffn_hidden_size: Inner width of the MLP.
        image_size: Side of the global view in pixels; fixes the table of learned positions.
        crop_size: Side of a multicrop patch in pixels; a multiple of `patch_size` where multicrop is on.
        patch_size: Side of a patch in pixels.
        layer_norm_eps: Epsilon of every LayerNorm.
        layer_scale_init: Start value of LayerScale's gamma on both branches.
        rope_theta: Base of the 2-D rotary frequencies.
    """

    width: int = 1536
    num_layers: int = 47
    num_heads: int = 16
    ffn_hidden_size: int = 8960
    image_size: int = 728
    crop_size: int = 504
    patch_size: int = 14
    layer_norm_eps: float = 1e-5
    layer_scale_init: float = 0.1
    rope_theta: float = 1e4

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def position_grid(self) -> int:
        """Side of the table of learned positions, in patches."""
        return self.image_size // self.patch_size

    @property
    def output_dim(self) -> int:
        """Channels behind the second downsampler."""
        return 4 * self.width

    def num_tokens(self, height: int, width: int | None = None) -> int:
        """Tokens that an image of these pixels becomes, a square one without `width`: 169 for 728, 81 for 504."""
        tokens = 1
        for side in (height, height if width is None else width):
            require(side > 0 and side % self.patch_size == 0, "image side", f"a multiple of {self.patch_size}", side)
            patches = side // self.patch_size
            for _ in range(2):
                patches = (patches + 1) // 2  # a 3x3 convolution with stride 2 and padding 1
            tokens *= patches
        return tokens

    def __post_init__(self) -> None:
        for name in ("width", "num_layers", "num_heads", "ffn_hidden_size", "image_size", "crop_size", "patch_size"):
            require(getattr(self, name) > 0, f"vision.{name}", "a positive number", getattr(self, name))
        require(
            self.width % self.num_heads == 0, "vision.num_heads", f"a divisor of width {self.width}", self.num_heads
        )
        require(self.head_dim % 4 == 0, "vision.width / num_heads", "a multiple of 4 (2-D rotary pairs)", self.head_dim)
        require(
            self.image_size % self.patch_size == 0,
            "vision.image_size",
            f"a multiple of patch_size {self.patch_size}",
            self.image_size,
        )


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama-3 scaling of the rotary frequencies.

    Args:
        factor: By how much low frequencies are slowed down.
        original_max_position: Context length before scaling.
        low_freq_factor: Wavelengths above original / low are scaled in full.
        high_freq_factor: Wavelengths below original / high are left alone.
    """

    factor: float = 2.0
    original_max_position: int = 131072
    low_freq_factor: float = 1.0
    high_freq_factor: float = 32.0

    def __post_init__(self) -> None:
        require(
            self.high_freq_factor > self.low_freq_factor > 0,
            "rope.scaling.high_freq_factor",
            f"more than low_freq_factor {self.low_freq_factor} > 0",
            self.high_freq_factor,
        )


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of attention.

    Args:
        theta: Base of the frequencies.
        rotary_factor: Share of head_dim that turns, from the front (half-split layout).
        scaling: Llama-3 scaling, or None.
    """

    theta: float
    rotary_factor: float
    scaling: Llama3Scaling | None = None

    def __post_init__(self) -> None:
        require(self.theta > 0, "rope.theta", "a positive number", self.theta)
        require(0 < self.rotary_factor <= 1, "rope.rotary_factor", "in (0, 1]", self.rotary_factor)


def _published_layer_types() -> tuple[AttentionKind, ...]:
    period: tuple[AttentionKind, ...] = ("full_attention",) + ("sliding_attention",) * 3
    return tuple(period[i % 4] for i in range(45)) + ("sliding_attention",) * 3


def _published_limits(limit: float) -> tuple[float | None, ...]:
    return tuple(limit if i in (43, 44) else None for i in range(48))


@dataclass(frozen=True)
class TextConfig:
    """Step-3.5 text decoder.

    Per-layer tuples cover the decoder layers and then the MTP layers (`num_layers + num_mtp_layers` entries).

    Args:
        vocab_size: Rows of the embedding and of the output head (untied).
        hidden_size: Width of the residual stream.
        ffn_hidden_size: Inner width of the SwiGLU of dense layers.
        num_layers: Decoder layers, without MTP.
        num_mtp_layers: Multi-token-prediction layers behind them.
        mtp: Build the MTP layers and train them; without, their weights are left out.
        mtp_loss_weight: Weight of the mean of the MTP layers' losses beside the main loss (DeepSeek-V3's lambda,
            arXiv:2412.19437).
        layer_types: `full_attention` or `sliding_attention` for each layer.
        num_heads: Query heads of full-attention layers.
        num_sliding_heads: Query heads of sliding-attention layers.
        num_kv_groups: Key/value heads (grouped-query attention), the same in every layer.
        head_dim: Channels of a head.
        sliding_window: Keys that a query of a sliding layer sees, itself included.
        full_rope: Rotary embedding of full-attention layers.
        sliding_rope: Rotary embedding of sliding-attention layers.
        max_position: Longest sub-sequence the model was built for.
        norm_eps: Epsilon of every RMSNorm.
        moe_layers: Indices of the layers with routed experts; the others are dense.
        num_experts: Routed experts of a MoE layer.
        top_k: Experts that each token is sent to.
        expert_ffn_size: Inner width of a routed expert.
        shared_expert_ffn_size: Inner width of the expert that every token passes.
        router_scaling_factor: Factor on the normalised weights of the chosen experts.
        router_bias_update_rate: Step of the load-balancing update of the router's bias (auxiliary-loss-free
            balancing, arXiv:2408.15664); 0 leaves the bias as loaded.
        swiglu_limits: Clamp of the routed experts' SwiGLU for each layer, or None.
        swiglu_limits_shared: Clamp of the shared expert's and the dense layers' SwiGLU for each layer, or None.
        init_std: Standard deviation of the normal initialisation.
    """

    vocab_size: int = 128896
    hidden_size: int = 4096
    ffn_hidden_size: int = 11264
    num_layers: int = 45
    num_mtp_layers: int = 3
    mtp: bool = False
    mtp_loss_weight: float = 0.1
    layer_types: tuple[AttentionKind, ...] = field(default_factory=_published_layer_types)
    num_heads: int = 64
    num_sliding_heads: int = 96
    num_kv_groups: int = 8
    head_dim: int = 128
    sliding_window: int = 512
    full_rope: RopeConfig = RopeConfig(theta=5e6, rotary_factor=0.5, scaling=Llama3Scaling())
    sliding_rope: RopeConfig = RopeConfig(theta=1e4, rotary_factor=1.0)
    max_position: int = 262144
    norm_eps: float = 1e-5
    moe_layers: tuple[int, ...] = tuple(range(3, 45))
    num_experts: int = 288
    top_k: int = 8
    expert_ffn_size: int = 1280
    shared_expert_ffn_size: int = 1280
    router_scaling_factor: float = 3.0
    router_bias_update_rate: float = 1e-3
    swiglu_limits: tuple[float | None, ...] = field(default_factory=lambda: _published_limits(7.0))
    swiglu_limits_shared: tuple[float | None, ...] = field(default_factory=lambda: _published_limits(16.0))
    init_std: float = 0.02

    @property
    def total_layers(self) -> int:
        """Decoder layers and MTP layers."""
        return self.num_layers + self.num_mtp_layers

    @property
    def num_built_mtp_layers(self) -> int:
        """MTP layers of the model: all or none."""
        return self.num_mtp_layers if self.mtp else 0

    def heads_of(self, layer: int) -> int:
        """Query heads of a layer (0-based)."""
        return self.num_heads if self.layer_types[layer] == "full_attention" else self.num_sliding_heads

    def rope_of(self, kind: AttentionKind) -> RopeConfig:
        return self.full_rope if kind == "full_attention" else self.sliding_rope

    def rotary_dim(self, kind: AttentionKind) -> int:
        """Channels of a head that turn; even."""
        return int(self.head_dim * self.rope_of(kind).rotary_factor)

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_layers()
        self._check_attention()
        if self.moe_layers:
            self._check_experts()

    def _check_sizes(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "ffn_hidden_size", "num_layers", "num_heads", "num_sliding_heads",
            "num_kv_groups", "head_dim", "sliding_window", "max_position",
        ):  # fmt: skip
            require(getattr(self, name) > 0, f"text.{name}", "a positive number", getattr(self, name))
        require(self.num_mtp_layers >= 0, "text.num_mtp_layers", "0 or more", self.num_mtp_layers)
        require(not self.mtp or self.num_mtp_layers > 0, "text.mtp", "false (num_mtp_layers is 0)", self.mtp)
        require(self.mtp_loss_weight >= 0, "text.mtp_loss_weight", "0 or more", self.mtp_loss_weight)
        require(self.norm_eps > 0, "text.norm_eps", "a positive number", self.norm_eps)

    def _check_layers(self) -> None:
        for name in ("layer_types", "swiglu_limits", "swiglu_limits_shared"):
            found = len(getattr(self, name))
            require(found == self.total_layers, f"text.{name}", f"{self.total_layers} entries (layers and MTP)", found)
        for i, kind in enumerate(self.layer_types):
            require(kind in ATTENTION_KINDS, f"text.layer_types[{i}]", " or ".join(ATTENTION_KINDS), kind)
        for name in ("swiglu_limits", "swiglu_limits_shared"):
            for i, limit in enumerate(getattr(self, name)):
                require(limit is None or limit > 0, f"text.{name}[{i}]", "None or a positive number", limit)
        require(tuple(sorted(set(self.moe_layers))) == self.moe_layers, "text.moe_layers", "ascending", self.moe_layers)
        for i in self.moe_layers:
            require(0 <= i < self.num_layers, "text.moe_layers", f"indices in 0..{self.num_layers - 1}", i)

    def _check_attention(self) -> None:
        for name in ("num_heads", "num_sliding_heads"):
            heads = getattr(self, name)
            require(
                heads % self.num_kv_groups == 0,
                f"text.{name}",
                f"a multiple of num_kv_groups {self.num_kv_groups}",
                heads,
            )
        for kind in ATTENTION_KINDS:
            rotary = self.rotary_dim(kind)
            require(
                rotary > 0 and rotary % 2 == 0, f"text.head_dim x rotary_factor of {kind}", "even and positive", rotary
            )

    def _check_experts(self) -> None:
        for name in ("num_experts", "expert_ffn_size", "shared_expert_ffn_size"):
            require(getattr(self, name) > 0, f"text.{name}", "a positive number", getattr(self, name))
        require(1 <= self.top_k <= self.num_experts, "text.top_k", f"in 1..{self.num_experts}", self.top_k)
        # With a single chosen expert normalisation would make every weight 1; megatron leaves the score instead.
        require(self.top_k > 1, "text.top_k", "2 or more", self.top_k)
        require(
            self.router_bias_update_rate >= 0, "text.router_bias_update_rate", "0 or more", self.router_bias_update_rate
        )


@dataclass(frozen=True)
class TokenIds:
    """Ids of the special tokens that fusion and generation look for.

    Args:
        im_start: Opens the global view of an image; features go in behind it.
        im_patch: Stands for one image feature.
        im_end: Closes the global view.
        patch_start: Opens a multicrop patch.
        patch_newline: Ends a row of multicrop patches.
        patch_end: Closes a multicrop patch.
        bos: Begins a sequence; None where the model has no such token.
        eos: Any of these ends a sequence.
    """

    im_start: int = 128000
    im_patch: int = 128001
    im_end: int = 128002
    patch_start: int = 128003
    patch_newline: int = 128004
    patch_end: int = 128005
    bos: int | None = 0
    eos: tuple[int, ...] = (1, 2, 128007)

    @property
    def of_pictures(self) -> tuple[int, ...]:
        """The tokens that stand for pictures: no author and no model writes them."""
        view = (self.im_start, self.im_patch, self.im_end)
        return (*view, self.patch_start, self.patch_newline, self.patch_end)


@dataclass(frozen=True)
class Step37Config:
    """A whole Step-3.7: vision tower, projector, text decoder and special tokens.

    Args:
        vision: The vision tower and its downsamplers.
        text: The text decoder.
        tokens: Ids of the special tokens.
        projector_bias: Whether the projector from vision to text has a bias.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    tokens: TokenIds = field(default_factory=TokenIds)
    projector_bias: bool = False

    def __post_init__(self) -> None:
        named = {f.name: getattr(self.tokens, f.name) for f in dataclasses.fields(TokenIds)}
        for name, value in named.items():
            ids = value if isinstance(value, tuple) else () if value is None else (value,)
            for token in ids:
                require(0 <= token < self.text.vocab_size, f"tokens.{name}", f"in 0..{self.text.vocab_size - 1}", token)
        image_tokens = [
            named[n] for n in ("im_start", "im_patch", "im_end", "patch_start", "patch_newline", "patch_end")
        ]
        require(len(set(image_tokens)) == 6, "tokens", "six different image tokens", image_tokens)

    @classmethod
    def from_hub(cls, path: str | Path) -> Step37Config:
        """Reads a hub folder or a `config.json`, in the model's own layout or in that of `transformers`.

        Raises:
            ConfigError: a field is unknown, missing or inconsistent; the message names file and field.
            FileNotFoundError: there is no such file.
        """
        from step37_lit.hub.config_json import read_hub_config

        return read_hub_config(path)

    @classmethod
    def preset(cls, name: str, **text_overrides: Any) -> Step37Config:
        """One of `step37_lit.presets.PRESETS` by name, with fields of its `text` part replaced."""
        from step37_lit.presets import PRESETS

        require(name in PRESETS, "preset", " or ".join(sorted(PRESETS)), name)
        config = PRESETS[name]()
        return dataclasses.replace(config, text=dataclasses.replace(config.text, **text_overrides))
