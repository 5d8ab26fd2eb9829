"""`transformers`' MTP path as the oracle: the layers that `generate(use_mtp=True)` drafts with, one sample at a time.

Three things that its models of 5.23 do not know are set here from outside: the sliding layers' heads and the clamps of
MTP layers (it takes those of the decoder's first layers), the layers' own output heads (it has the main head in their
place), and images as inputs (it embeds token ids; `forward_layer` takes the embeddings as well).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from step37_lit.batch import Sample
from step37_lit.config import TokenIds
from tests.parity.cases import Case
from tests.parity.oracle import build_oracle, oracle_logits, oracle_loss

FILE = "model.safetensors"


@dataclass(frozen=True)
class MTPOracle:
    """A model with MTP layers.

    Args:
        main: `Step3p7ForConditionalGeneration`.
        mtp: `MtpModel` around it.
        heads: Output head of each MTP layer, [V, H].
    """

    main: Any
    mtp: Any
    heads: list[Tensor]


def build_mtp_oracle(case: Case, folder: Path, seed: int) -> MTPOracle:
    """A random model with MTP layers without any neutral value, saved in `folder` in the hub's layout; fp32."""
    from transformers.modeling_layers import MtpModel

    main = build_oracle(case, folder, seed)
    text = main.config.text_config
    hidden, vocabulary, layers = text.hidden_size, text.vocab_size, text.num_nextn_predict_layers
    heads_of_sliding = {"num_attention_heads": text.num_sliding_attention_heads}
    main.config.text_config.mtp_per_layer_config = dict.fromkeys(range(layers), heads_of_sliding)
    main.config.text_config.swiglu_limits_shared = None
    mtp = MtpModel(main, layers).float().eval()
    generator = torch.Generator().manual_seed(seed + 2)
    heads = [torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5 for _ in range(layers)]
    with torch.no_grad():
        for weight in mtp.layers.parameters():
            std = 0.3 if weight.dim() == 1 else weight.shape[1] ** -0.5
            weight.copy_(std * torch.randn(weight.shape, generator=generator))
    own = hub_tensors(mtp.layers.named_parameters(), heads, text.num_hidden_layers)
    save_file(load_file(folder / FILE) | own, folder / FILE, metadata={"format": "pt"})
    return MTPOracle(main, mtp, [head.requires_grad_() for head in heads])


def hub_tensors(named: Any, heads: list[Tensor], first: int) -> dict[str, Tensor]:
    """Weights (or gradients) of the MTP layers by their hub names; `first` is the number of decoder layers."""
    tensors = {f"model.layers.{first + k}.transformer.shared_head.output.weight": h for k, h in enumerate(heads)}
    for name, tensor in named:
        layer, _, rest = name.partition(".")
        rest = rest.removeprefix("mtp_block.").replace("post_norm.", "transformer.shared_head.norm.")
        tensors[f"model.layers.{first + int(layer)}.{rest}"] = tensor.detach().clone()
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def mtp_logits(oracle: MTPOracle, sample: Sample, tokens: TokenIds) -> list[Tensor]:
    """Of one sample alone: the main head's [n, V], then layer k's [n - k - 1, V] of the tokens from k + 2 on."""
    from transformers.cache_utils import MtpCache

    seen: dict[str, Tensor] = {}

    def keep(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen["embeddings"], seen["hidden"] = kwargs["inputs_embeds"], output.last_hidden_state

    hook = oracle.main.model.language_model.register_forward_hook(keep, with_kwargs=True)
    logits = [oracle_logits(oracle.main, sample, tokens)]
    hook.remove()
    embeddings, hidden = seen["embeddings"], seen["hidden"]
    positions = torch.arange(len(sample))[None]
    cache = MtpCache(config=oracle.mtp.config)
    for layer, head in enumerate(oracle.heads):
        ahead = layer + 1
        if len(sample) <= ahead:
            logits.append(head.new_zeros(0, head.shape[0]))
            continue
        hidden = oracle.mtp.forward_layer(
            layer,
            hidden[:, : len(sample) - ahead],
            positions[:, ahead:],
            cache,
            inputs_embeds=embeddings[:, ahead:],
        )
        logits.append(F.linear(hidden[0], head))
    return logits


def mtp_losses(logits: list[Tensor], sample: Sample) -> list[Tensor]:
    """Sums of the main head's and of each MTP layer's losses where the mask says so."""
    losses = [oracle_loss(logits[0], sample)]
    for ahead, of_layer in enumerate(logits[1:], start=2):
        targets, mask = sample.input_ids[ahead:], sample.loss_mask[ahead:]
        each = F.cross_entropy(of_layer[: len(targets)], targets, reduction="none")
        losses.append((each * mask).sum())
    return losses


def mtp_results(
    oracle: MTPOracle, samples: list[Sample], tokens: TokenIds, scratch: Path
) -> tuple[list[list[Tensor]], list[list[float]], dict[str, Tensor]]:
    """Logits and losses of each sample's heads, and gradients of the sum of all losses by hub name."""
    parts = [oracle.main, oracle.mtp.layers]
    for part in parts:
        part.zero_grad(set_to_none=True)
    logits, losses = [], []
    for sample in samples:
        logits.append(mtp_logits(oracle, sample, tokens))
        losses.append(mtp_losses(logits[-1], sample))
        torch.stack(losses[-1]).sum().backward()
    shadow = copy.deepcopy(oracle.main)
    with torch.no_grad():
        for weight, copied in zip(oracle.main.parameters(), shadow.parameters(), strict=True):
            copied.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    shadow.save_pretrained(scratch)
    own = [(name, weight.grad) for name, weight in oracle.mtp.layers.named_parameters()]
    gradients = load_file(scratch / FILE) | hub_tensors(
        own, [head.grad for head in oracle.heads], oracle.main.config.text_config.num_hidden_layers
    )
    return [[x.detach() for x in of] for of in logits], [[float(x) for x in of] for of in losses], gradients
