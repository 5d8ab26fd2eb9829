"""Bytes that autograd keeps between forward and backward: one row for each kept tensor.

t = tokens of a micro-batch on this rank, r = rows of the residual stream (t, or t / tensor ranks under sequence
parallelism), m = rows of the routed experts, H = hidden, N = query heads, G = key/value heads, D = head_dim,
F = inner width, E = experts, k = experts of a token, e = bytes of the model's dtype. Heads and inner widths are those
of a tensor rank. tests/layouts/test_planned_memory.py counts the tensors that real runs keep.

A recomputation mode is a set of groups of rows that are not kept (`RECOMPUTED`), and what is kept in their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from step37_lit.config import Step37Config
from step37_lit.planner.layout import PlannedLayout
from step37_lit.planner.spans import Spans
from step37_lit.planner.weights import FP32_BYTES, ITEM_BYTES
from step37_lit.planner.work import Recompute, Training

LAYER_GROUPS = ("norm", "projection", "core", "swiglu", "feed_forward", "experts")
RECOMPUTED: dict[Recompute, tuple[str, ...]] = {"none": (), "selective": ("core", "swiglu"), "full": LAYER_GROUPS}


@dataclass(frozen=True)
class Kept:
    """A tensor that is kept.

    Args:
        group: One of `LAYER_GROUPS`, `input`, `head`, `vision`.
        what: The tensor.
        nbytes: Its size.
        for_weight: Only a weight's gradient needs it: it is not kept where the language model is frozen.
    """

    group: str
    what: str
    nbytes: float
    for_weight: bool = False


@dataclass(frozen=True)
class ActivationTable:
    """Rows of the table for one model, layout and training.

    Args:
        config: The model.
        layout: How it is split.
        training: What runs.
    """

    config: Step37Config
    layout: PlannedLayout
    training: Training

    # ---- sizes ----

    @property
    def item(self) -> int:
        return ITEM_BYTES[self.training.dtype]

    @property
    def tokens(self) -> float:
        return self.training.pack.tokens / self.layout.context

    @property
    def rows(self) -> float:
        return self.training.pack.tokens / self.layout.residual_ranks

    @property
    def on_cpu(self) -> bool:
        return self.training.kernels == "cpu"

    # ---- sums ----

    def layer_bytes(self, layer: int, recompute: Recompute | None = None) -> float:
        """Kept by a decoder layer (or the decoder layer inside an MTP layer) from its forward to its backward pass."""
        recompute = self.training.recompute if recompute is None else recompute
        text = self.config.text
        kind: tuple = (text.layer_types[layer], layer in text.moe_layers, recompute)
        kind += (text.swiglu_limits[layer], text.swiglu_limits_shared[layer])
        if kind not in self._of_kinds:
            self._of_kinds[kind] = self._layer_bytes(layer, recompute)
        return self._of_kinds[kind]

    @cached_property
    def _of_kinds(self) -> dict[tuple, float]:
        """Layers of one kind keep the same; there are few kinds."""
        return {}

    def _layer_bytes(self, layer: int, recompute: Recompute) -> float:
        rows = [row for row in self._needed(self.layer(layer)) if row.group not in RECOMPUTED[recompute]]
        # A checkpointed function keeps its inputs: the residual stream, or the attention's query, key and value.
        if recompute == "full":
            return self.rows * self.config.text.hidden_size * self.item
        if recompute == "selective":
            rows += self._core_inputs(layer)
        return sum(row.nbytes for row in rows)

    def chunk_bytes(self, chunk: int) -> float:
        """Kept of one micro-batch by one chunk of the decoder and what is in front of or behind it."""
        layers = self.layout.layers(self.config.text)[chunk]
        modes = [self.training.layer_mode(number) for number in range(len(layers))]
        total = sum(self.layer_bytes(layer, mode) for layer, mode in zip(layers, modes, strict=True))
        if chunk == 0:
            total += sum(row.nbytes for row in self.front())
        if chunk == self.layout.chunks - 1:
            total += sum(row.nbytes for row in self._needed(self.behind()))
            total += sum(self.layer_bytes(layer) for layer in self._mtp_layers)
        if chunk > 0:
            # What the stage before handed on, with MTP layers the embeddings too. It is the first layer's input, which
            # that keeps itself where it is recomputed, and in fp32 as its norm's input.
            handed = 2 if self.config.text.mtp else 1
            counted = self.item == FP32_BYTES or modes[:1] == ["full"]
            total += (handed - counted) * self.rows * self.config.text.hidden_size * self.item
        return total + sum(row.nbytes for row in self._rotary_table())

    def working_bytes(self, chunk: int) -> float:
        """The largest thing that is made again or for a moment: a recomputed layer, gradients of the logits, the
        vision tower's blocks."""
        own = self.layout.layers(self.config.text)[chunk]
        layers = [(layer, self.training.layer_mode(number)) for number, layer in enumerate(own)]
        largest = 0.0
        if chunk == self.layout.chunks - 1:
            layers += [(layer, self.training.recompute) for layer in self._mtp_layers]
            logits = self.training.pack.learnt * self.config.text.vocab_size / self.layout.tensor / self.layout.context
            largest = logits * (FP32_BYTES + self.item)  # their gradient in fp32 and in the model's dtype
        for layer, mode in layers:
            largest = max(largest, self.layer_bytes(layer, "none") - self.layer_bytes(layer, mode))
        if chunk == 0 and self.training.vision_recompute and not self._vision_frozen:
            largest = max(largest, sum(row.nbytes for row in self._vision_block()))
        return largest

    def _needed(self, rows: Iterable[Kept]) -> Iterator[Kept]:
        frozen = "language" in self.training.frozen
        return (row for row in rows if not (frozen and row.for_weight))

    # ---- rows ----

    def layer(self, layer: int) -> Iterator[Kept]:
        """Rows of decoder layer `layer` (0-based, MTP layers behind)."""
        text, item, rows, tokens = self.config.text, self.item, self.rows, self.tokens
        heads, groups = text.heads_of(layer) // self.layout.tensor, text.num_kv_groups / self.layout.tensor
        width = heads * text.head_dim
        yield from self._norm("input_layernorm", text.hidden_size, rows)
        yield Kept("projection", "input of linear_qkv and linear_gate", rows * text.hidden_size * item, True)
        yield from self._norm("q_layernorm", width, tokens, vectors=heads)
        # In fp32 the key's norm keeps a view, and with it all of linear_qkv's output.
        whole = (width + 2 * groups * text.head_dim) if item == FP32_BYTES else groups * text.head_dim
        yield from self._norm("k_layernorm", groups * text.head_dim, tokens, vectors=groups, input_width=whole)
        if item < FP32_BYTES:
            pairs = text.rotary_dim(text.layer_types[layer]) // 2
            yield Kept("projection", "cosines and sines in the model's dtype", 4 * tokens * pairs * item)
            yield Kept("projection", "gate in the model's dtype", tokens * heads * item)
        yield from self._core(layer)
        yield Kept("projection", "gate", tokens * heads * FP32_BYTES)
        yield Kept("projection", "attended", tokens * width * item)
        yield Kept("projection", "input of linear_proj", tokens * width * item, True)
        yield from self._norm("pre_mlp_layernorm", text.hidden_size, rows)
        yield Kept("feed_forward", "input of linear_fc1", rows * text.hidden_size * item, True)
        if layer in text.moe_layers:
            shared = text.shared_expert_ffn_size / self.layout.tensor
            yield from self._swiglu("feed_forward", shared, tokens, text.swiglu_limits_shared[layer])
            yield from self._experts(layer)
        else:
            inner = text.ffn_hidden_size / self.layout.tensor
            yield from self._swiglu("feed_forward", inner, tokens, text.swiglu_limits_shared[layer])

    def front(self) -> Iterator[Kept]:
        """Vision tower, projector and fusion."""
        vision, item = self.config.vision, self.item
        if "projection" in self.training.frozen and self._vision_frozen and "language" in self.training.frozen:
            return
        for side, number in self.training.pack.images:
            features = number * vision.num_tokens(side)
            yield Kept("vision", "projected features of the pack", features * self.config.text.hidden_size * item)
        for side, number in self._own_images():
            features = number * vision.num_tokens(side)
            yield Kept("vision", "input of align_projector", features * vision.output_dim * item)
            if self._vision_frozen:
                continue
            patches = number * (side // vision.patch_size) ** 2
            yield Kept("vision", "normalised pixels", number * 3 * side**2 * item)
            yield Kept("vision", "ln_pre", patches * (vision.width + 2) * item)
            yield Kept("vision", "inputs of the downsamplers", patches * vision.width * 1.5 * item)
            if self.training.vision_recompute:
                yield Kept("vision", "inputs of the blocks", vision.num_layers * patches * vision.width * item)
        if not self._vision_frozen and not self.training.vision_recompute:
            block = sum(row.nbytes for row in self._vision_block())
            yield Kept("vision", "blocks", vision.num_layers * block)

    def behind(self) -> Iterator[Kept]:
        """Final norm, head and loss, and what MTP layers have beside their decoder layer."""
        text, item, rows = self.config.text, self.item, self.rows
        yield from self._norm("final_layernorm", text.hidden_size, rows)
        yield from self._head()
        for _ in self._mtp_layers:
            for name in ("enorm", "hnorm", "final_layernorm"):
                yield from self._norm(name, text.hidden_size, rows)
            yield Kept("head", "input of eh_proj", rows * 2 * text.hidden_size * item, True)
            yield Kept("head", "borders of the sub-sequences", self.tokens)
            yield from self._head()

    @property
    def _mtp_layers(self) -> list[int]:
        text = self.config.text
        return list(range(text.num_layers, text.num_layers + text.num_built_mtp_layers))

    @property
    def _vision_frozen(self) -> bool:
        return "vision" in self.training.frozen

    def _norm(
        self, what: str, width: float, rows: float, vectors: float = 1, input_width: float | None = None
    ) -> Iterator[Kept]:
        """RMSNorm in fp32: its input and a root for each vector; of single operations (CPU), the normed input too."""
        yield Kept("norm", f"{what}: input", rows * FP32_BYTES * (width if input_width is None else input_width))
        yield Kept("norm", f"{what}: 1 / rms", rows * FP32_BYTES * vectors)
        if self.on_cpu:
            yield Kept("norm", f"{what}: normed", rows * FP32_BYTES * width, True)

    def _core(self, layer: int) -> Iterator[Kept]:
        text, item, tokens = self.config.text, self.item, self.tokens
        heads, groups = text.heads_of(layer) / self.layout.tensor, text.num_kv_groups / self.layout.tensor
        width, key_width = heads * text.head_dim, groups * text.head_dim
        yield Kept("core", "log of the sums", tokens * heads * FP32_BYTES)
        if not self.on_cpu:
            if self.layout.context == 1:
                yield from self._core_inputs(layer)
            else:
                yield Kept("core", "query", tokens * width * item)
                yield Kept("core", "keys and values of all ranks", self.training.pack.tokens * 2 * key_width * item)
            return
        yield Kept("core", "query", tokens * width * item)
        # For each chunk, repeated for each query head.
        yield Kept("core", "keys and values", 2 * self._spans.keys * width * item)
        yield Kept("core", "output of each sub-sequence", tokens * width * item)
        window = text.sliding_window if text.layer_types[layer] == "sliding_attention" else None
        yield Kept("core", "masks of blocks", self._spans.mask_elements(window) * item)

    def _core_inputs(self, layer: int) -> Iterator[Kept]:
        """Query, key and value as they come from the projections."""
        text, item, tokens = self.config.text, self.item, self.tokens
        width = text.heads_of(layer) / self.layout.tensor * text.head_dim
        key_width = text.num_kv_groups / self.layout.tensor * text.head_dim
        yield Kept("core", "query", tokens * width * item)
        yield Kept("core", "key", tokens * key_width * item)
        # The value is a view of linear_qkv's output, which in fp32 the key's norm keeps already.
        yield Kept("core", "value", tokens * (width + 2 * key_width) * item * (item < FP32_BYTES))

    @cached_property
    def _spans(self) -> Spans:
        return Spans(self.training.pack.lengths, self.layout.context)

    def _swiglu(self, group: str, inner: float, tokens: float, limit: float | None) -> Iterator[Kept]:
        size = tokens * inner * self.item
        yield Kept(group, "gate and up", 2 * size)
        yield Kept("swiglu", "silu(gate)", size)
        if limit is not None:
            yield Kept("swiglu", "clamped gate and up", 2 * size)
        if group == "experts":  # weigh it, and the routing weights' gradients need it
            yield Kept("swiglu", "product", size)
        else:
            yield Kept(group, "input of linear_fc2", size, True)

    def _experts(self, layer: int) -> Iterator[Kept]:
        """Router, dispatch and routed experts, with as many tokens on each rank."""
        text, layout, item, rows = self.config.text, self.layout, self.item, self.rows
        if item < FP32_BYTES:
            yield Kept("experts", "input of the router in fp32", rows * text.hidden_size * FP32_BYTES, True)
            yield Kept("experts", "router in fp32", text.num_experts * text.hidden_size * FP32_BYTES)
        yield Kept("experts", "scores", rows * FP32_BYTES * (text.num_experts + text.top_k + 1))
        yield Kept("experts", "chosen experts", rows * 8 * text.top_k)
        yield Kept("experts", "routing map and weights", rows * (1 + FP32_BYTES) * text.num_experts)
        routed = rows * text.top_k * layout.expert_tensor
        yield Kept("experts", "order of the tokens", rows * text.top_k * 8)
        yield Kept("experts", "input of the experts", routed * text.hidden_size * item, True)
        yield Kept("experts", "routing weights", routed * FP32_BYTES)
        inner = text.expert_ffn_size / layout.expert_tensor
        yield from self._swiglu("experts", inner, routed, text.swiglu_limits[layer])
        yield Kept("experts", "weighted input of the second matrix", routed * inner * item, True)

    def _head(self) -> Iterator[Kept]:
        text = self.config.text
        # Under sequence parallelism the head gathers the row itself, and computes every position.
        gathered = self.layout.sequence_parallel
        tokens = self.tokens if gathered else self.training.pack.learnt / self.layout.context
        yield Kept(
            "head", "input of output_layer", (self.rows if gathered else tokens) * text.hidden_size * self.item, True
        )
        yield Kept("head", "softmax", tokens * FP32_BYTES * text.vocab_size / self.layout.tensor)
        yield Kept("head", "labels, indices and losses", tokens * (1 + 2 * 8 + FP32_BYTES))

    def _rotary_table(self) -> Iterator[Kept]:
        """In fp32 the layers keep the table itself, once; else copies, which are in the layers' rows."""
        text = self.config.text
        if self.item == FP32_BYTES:
            width = max(text.rotary_dim(kind) for kind in ("full_attention", "sliding_attention")) // 2
            yield Kept("projection", "rotary table", 4 * self.tokens * width * FP32_BYTES)

    def _own_images(self) -> tuple[tuple[int, int], ...]:
        """Those that the busiest of the tensor and context ranks encodes, which share a pack's images."""
        return self.training.pack.busiest_images(self.layout.tensor * self.layout.context)

    def _vision_block(self) -> Iterator[Kept]:
        """One block over a rank's images."""
        vision, item = self.config.vision, self.item
        patches = sum(number * (side // vision.patch_size) ** 2 for side, number in self._own_images())
        size = patches * vision.width * item
        yield Kept("vision", "inputs of norms, matrices and gains", 7 * size)
        yield Kept("vision", "query and key", 2 * size)
        yield Kept("vision", "query, key and value", 3 * size)
        yield Kept("vision", "attended", size)
        yield Kept("vision", "log of the sums", patches * vision.num_heads * FP32_BYTES)
        yield Kept("vision", "statistics of norms", 4 * patches * item)
        yield Kept("vision", "inner, its sigmoid and their product", 3 * patches * vision.ffn_hidden_size * item)
