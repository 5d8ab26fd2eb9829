"""`transformers` as the oracle: random models saved by `save_pretrained`, logits and gradients of one sample at a time.

Names of tensors are the hub's throughout. Gradients get them by the same way as weights: a copy of the oracle with
gradients in place of its parameters is saved, and its file read.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from step37_lit.batch import ImageForInsert, PackedBatch, Sample
from step37_lit.config import TokenIds
from tests.parity.cases import GLOBAL_SIDE, IMAGE_TOKEN, PATCH_SIDE, VISION, Case

CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64).view(3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64).view(3, 1, 1)
WORDS = 280  # ids below stand for words


def build_oracle(case: Case, folder: Path, seed: int) -> Any:
    """A random model without any neutral value, saved in `folder`; fp32, plain attention."""
    from transformers import Step3p7Config, Step3p7ForConditionalGeneration

    torch.manual_seed(seed)
    config = Step3p7Config(
        vision_config=dict(VISION), text_config=case.text_config, image_token_id=IMAGE_TOKEN, **case.root
    )
    model = Step3p7ForConditionalGeneration._from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                stacked = weight.dim() == 3  # experts
                weight.normal_(0, (weight.shape[-1] if stacked else weight[0].numel()) ** -0.5)
            else:
                weight.add_(0.3 * torch.randn_like(weight))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model


def make_samples(case: Case, tokens: TokenIds, seed: int) -> list[Sample]:
    """The case's samples, with random words, pixels and loss mask."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number, segments in enumerate(case.samples):
        ids: list[int] = []
        images: list[ImageForInsert] = []
        for segment in segments:
            if isinstance(segment, int):
                ids += torch.randint(0, WORDS, (segment,), generator=generator).tolist()
                continue
            if segment == "crops":
                patch = [tokens.patch_start] + [tokens.im_patch] * _num_tokens(PATCH_SIDE) + [tokens.patch_end]
                ids += [*patch, tokens.patch_newline, *patch]
                images.append(ImageForInsert(tokens.patch_start, _pixels(2, PATCH_SIDE, generator)))
            ids += [tokens.im_start] + [tokens.im_patch] * _num_tokens(GLOBAL_SIDE) + [tokens.im_end]
            images.append(ImageForInsert(tokens.im_start, _pixels(1, GLOBAL_SIDE, generator)))
        mask = (torch.rand(len(ids), generator=generator) < 0.8).float()
        samples.append(Sample(f"sample {number}", torch.tensor(ids), mask, images))
    return samples


def _num_tokens(side: int) -> int:
    """Two convolutions of stride 2 with padding 1 halve the grid, rounding up."""
    grid = side // VISION["patch_size"]
    return ((((grid + 1) // 2) + 1) // 2) ** 2


def _pixels(count: int, side: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def oracle_logits(model: Any, sample: Sample, tokens: TokenIds) -> Tensor:
    """[n, V] of one sample alone."""
    pixels: dict[int, list[Tensor]] = {tokens.im_start: [], tokens.patch_start: []}
    local_counts: list[int] = []
    waiting = 0
    for image in sample.images:
        assert image.images is not None
        normal = (image.images.double() / 255 - CLIP_MEAN) / CLIP_STD
        pixels[image.insert_start_token].append(normal.float())
        if image.insert_start_token == tokens.patch_start:
            waiting = image.num_images
        else:
            local_counts.append(waiting)
            waiting = 0
    inputs: dict[str, Any] = {"input_ids": sample.input_ids[None]}
    if pixels[tokens.im_start]:
        inputs["pixel_values"] = torch.cat(pixels[tokens.im_start])
    if pixels[tokens.patch_start]:
        inputs |= {"pixel_values_local": torch.cat(pixels[tokens.patch_start]), "num_local_patches": local_counts}
    return model(**inputs, use_cache=False).logits[0]


def oracle_loss(logits: Tensor, sample: Sample) -> Tensor:
    """Sum of the next-token losses of one sample where the mask says so."""
    losses = F.cross_entropy(logits[:-1], sample.input_ids[1:], reduction="none")
    return (losses * sample.loss_mask[1:]).sum()


def oracle_results(
    model: Any, samples: list[Sample], tokens: TokenIds, scratch: Path
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits of each sample, and gradients of the summed loss by hub name."""
    model.zero_grad(set_to_none=True)
    all_logits = []
    for sample in samples:
        logits = oracle_logits(model, sample, tokens)
        oracle_loss(logits, sample).backward()
        all_logits.append(logits.detach())
    shadow = copy.deepcopy(model)
    with torch.no_grad():
        for weight, copied in zip(model.parameters(), shadow.parameters(), strict=True):
            copied.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    shadow.save_pretrained(scratch)
    return all_logits, load_file(scratch / "model.safetensors")


def our_results(model: torch.nn.Module, batch: PackedBatch) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits of each sample of the pack, and gradients of the summed loss by hub name."""
    from step37_lit.hub.names import name_table

    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        logits = model(**batch.model_inputs(labels=False))[0].split(batch.cu_seqlens.diff().tolist())
    model(**batch.model_inputs()).sum().backward()
    parameters = dict(model.named_parameters())
    gradients: dict[str, Tensor] = {}
    for row in name_table(model.step37):
        if row.ours in parameters:
            weight = parameters[row.ours]
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            parts = row.conversion.to_hub(gradient, [tensor.shape for tensor in row.hub])
            gradients |= {tensor.name: part for tensor, part in zip(row.hub, parts, strict=True)}
    return list(logits), gradients
