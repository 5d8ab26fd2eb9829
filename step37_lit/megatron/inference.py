"""The model over this rank's model-parallel group as one function: tokens in, logits of what follows out.

All ranks of the group call the same methods with the same arguments and get the same logits, so that each of them can
choose the next token itself. R = rows, V = vocabulary, T = tokens of a pack, H = hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from step37_lit.batch import ImageForInsert, PackedBatch
from step37_lit.errors import require
from step37_lit.megatron.chunks import ModelChunks, chunks_of
from step37_lit.megatron.matmul import PACKED_ROWS, grouped_matmul_of, matmul_of
from step37_lit.model.drafts import Drafts
from step37_lit.model.experts import GroupedExperts
from step37_lit.model.kv_cache import KVCache
from step37_lit.model.step37_model import Step37Model

_OF_CLASS = object()  # in place of an attribute that only the class has


@contextmanager
def inference_mode(model: Step37Model | ModelChunks, rows: int = 1) -> Iterator[None]:
    """Evaluation without gradients, and without sequence parallelism: a step has as many tokens as there are rows.

    The layers stay the model's; what changes is how their matrices are multiplied.

    Args:
        model: This rank's part; its weights must not change inside.
        rows: That a step of decoding has at most. From `PACKED_ROWS` on a CPU lays a second copy of the decoder's fp32
            matrices out for its kernels.

    Raises:
        ConfigError: context ranks share the rows: a step has one token of each.
    """
    advice = "1 to generate (context ranks cannot share one token)"
    require(model.config.context_parallel_size == 1, "strategy.context", advice, model.config.context_parallel_size)
    packed = rows >= PACKED_ROWS
    # megatron's own switch asks for attributes of its GPT model. The linear layers and the configuration have the flag.
    changes: list[tuple[Any, str, Any]] = [(model.config, "sequence_parallel", False)]
    for part in model.modules():
        if isinstance(part, ColumnParallelLinear | RowParallelLinear):
            changes += [(part, "sequence_parallel", False), (part, "_forward_impl", matmul_of(part.weight, packed))]
        if isinstance(part, ColumnParallelLinear):
            changes.append((part, "disable_grad_reduce", True))
        if isinstance(part, GroupedExperts) and packed:
            changes.append((part, "grouped_matmul", grouped_matmul_of(part.weight1, part.weight2)))
    training = model.training
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(_attribute(owner, name, value))
        stack.callback(model.train, training)
        stack.enter_context(torch.inference_mode())
        model.eval()
        yield


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name, _OF_CLASS)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _OF_CLASS:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


class RowDecoder:
    """Rows of prompts and their continuations; use within `inference_mode`.

    Args:
        model: This rank's part.
        capacity: Tokens of the longest row, prompt and continuation together, drafts included.
        drafts: Tokens that the MTP layers draft for each row and step, at most the layers that are built.
    """

    def __init__(self, model: Step37Model | ModelChunks, capacity: int, drafts: int = 0):
        self.config = model.config
        self.num_drafts = drafts
        self.chunks = [(chunk, KVCache(capacity, pass_tokens=drafts + 1)) for chunk in chunks_of(model)]
        last = self.chunks[-1][0]
        self.drafts = Drafts(last.mtp, last.step37, drafts, capacity) if drafts and last.post_process else None

    def prefill(self, prompts: PackedBatch) -> Tensor:
        """The prompts of a pack without padding, a row each: fp32 [R, V]."""
        return self._forward(**prompts.model_inputs(labels=False))

    def step(self, tokens: Tensor) -> Tensor:
        """A few more tokens for each row, int64 [R, m]: fp32 [R, m, V], what follows each of them."""
        rows, count = tokens.shape
        borders = torch.arange(rows + 1, dtype=torch.int32, device=tokens.device) * count
        return self._forward(input_ids=tokens.reshape(1, -1), cu_seqlens=borders).view(rows, count, -1)

    def draft(self, tokens: Tensor) -> Tensor:
        """What probably follows the tokens that were chosen for each row and are not in it yet.

        Args:
            tokens: int64 [R].

        Returns:
            int64 [R, drafts].
        """
        found = [tokens]
        if self.drafts is not None:
            self.drafts.begin()
        for layer in range(self.num_drafts):
            embeddings = self._embed(found[-1])
            drafted = torch.empty_like(tokens) if self.drafts is None else self.drafts.next(layer, embeddings)
            found.append(_from_stage(drafted, parallel_state.get_pipeline_model_parallel_last_rank))
        if self.drafts is not None:
            self.drafts.end()
        return torch.stack(found, dim=1)[:, 1:]

    def select(self, rows: Tensor) -> None:
        """Goes on with these rows, int64 [any]; see `KVCache.select`."""
        for part in self._parts():
            part.select(rows)

    def take_back(self, counts: Tensor) -> None:
        """Forgets the last tokens of each row, int64 [R] on the CPU; once behind each step with drafts."""
        for part in self._parts():
            part.take_back(counts)

    def _embed(self, tokens: Tensor) -> Tensor:
        """[R] -> [R, 1, H] on all stages; only the first one has the embedding."""
        first = self.chunks[0][0]
        if first.pre_process:
            embeddings = first.forward_head(tokens[None])
        else:
            shape = (len(tokens), 1, self.config.hidden_size)
            embeddings = torch.empty(shape, dtype=self.config.params_dtype, device=tokens.device)
        return _from_stage(embeddings, parallel_state.get_pipeline_model_parallel_first_rank)

    def _parts(self) -> list[KVCache | Drafts]:
        return [cache for _, cache in self.chunks] + ([] if self.drafts is None else [self.drafts])

    def _forward(self, input_ids: Tensor, images: list[ImageForInsert] | None = None, **inputs: object) -> Tensor:
        # Virtual stage by virtual stage: the last rank hands what it has to the first one's next chunk.
        with_mtp = self.num_drafts > 0
        for model, cache in self.chunks:
            if not model.pre_process:
                tokens = input_ids.shape[1] * (2 if with_mtp else 1)  # the embeddings come behind
                hidden = torch.empty(
                    tokens, 1, self.config.hidden_size, dtype=self.config.params_dtype, device=input_ids.device
                )
                dist.recv(hidden, src=parallel_state.get_pipeline_model_parallel_prev_rank())
                model.set_input_tensor(hidden)
            own = images if model.pre_process else []
            context = {"inference_context": cache, "runtime_gather_output": True, "with_mtp": with_mtp}
            out = model(input_ids=input_ids, images=own, **context, **inputs)
            if not model.post_process:
                dist.send(out.contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank())
        if self.drafts is not None:
            assert cache.mtp_inputs is not None, "a pass without the inputs of the MTP layers"
            self.drafts.keep(*cache.mtp_inputs)
        if model.post_process:
            logits = out[0].float()
        else:
            logits = out.new_empty(cache.num_answers, self.config.step37.text.vocab_size, dtype=torch.float32)
        return _from_stage(logits, parallel_state.get_pipeline_model_parallel_last_rank)


def _from_stage(values: Tensor, rank_of_source: Callable[[], int]) -> Tensor:
    """The source stage's values on all stages, where the others have room for them."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(values, src=rank_of_source(), group=parallel_state.get_pipeline_model_parallel_group())
    return values


def any_expert_rank(flag: bool) -> bool:
    """Whether `flag` holds on any rank that shares the routed experts with this one; collective among them."""
    group = parallel_state.get_expert_model_parallel_group()
    if dist.get_world_size(group) == 1:
        return flag
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    held = torch.tensor(float(flag), device=device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX, group=group)
    return bool(held)


def idle(model: Step37Model | ModelChunks) -> None:
    """A pass over one token for a rank without rows, while others of its experts' ranks have some."""
    device = next(model.parameters()).device
    borders = torch.tensor([0, 1], dtype=torch.int32, device=device)
    RowDecoder(model, 1)._forward(torch.zeros(1, 1, dtype=torch.int64, device=device), cu_seqlens=borders)
