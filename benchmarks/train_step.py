"""Training speed against `transformers` + `torch.optim.AdamW`, in real tokens per second.

    python benchmarks/train_step.py [--threads 2] [--rounds 7] [--dense]

Both sides start from the same weights of about 20M parameters and train on the same samples of mixed length. Ours packs
them into one row; the other pads them to the longest of the batch, as its trainers do. A step is forward, backward,
clipping at 1 and AdamW. Both run in one process and take turns, so that a busy machine slows both; the ratio counts.
The first losses of both must agree, so that a fast wrong answer cannot win.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from step37_lit.batch import ImageForInsert, PackedBatch, Sample
from step37_lit.config import Step37Config
from step37_lit.flops import training_flops
from step37_lit.hub.load import load_hub_model
from step37_lit.megatron import data_parallel, schedule
from step37_lit.megatron.optimizer import AdamWSettings, ForwardingOptimizer
from step37_lit.model.vision_tower import normalise
from step37_lit.throughput import measure_gemm_peak

LR, BETAS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 0.1
IMAGE_SIDE, VOCABULARY = 224, 4096
LAYER_TYPES = ["full_attention", *["sliding_attention"] * 3] * 2


def reference_model(dense: bool, width: int = 320) -> Any:
    """A `transformers` model; of about 20M parameters at a width of 320."""
    from transformers import Step3p7ForConditionalGeneration

    torch.manual_seed(0)
    return Step3p7ForConditionalGeneration(reference_config(dense, width)).float().train()


def reference_config(dense: bool, width: int, mtp_layers: int = 0) -> Any:
    """Of `reference_model`; the model itself never has the MTP layers."""
    from transformers import Step3p7Config

    layers = len(LAYER_TYPES)
    experts = {"moe_layers_enum": "" if dense else "3,4,5,6,7", "n_routed_experts": 8, "num_experts_per_tok": 2}
    vision = {"width": 192, "layers": 6, "heads": 6, "mlp_ratio": 512 / 192, "image_size": IMAGE_SIDE}
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": width * 14 // 5,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "layer_types": [*LAYER_TYPES, *["sliding_attention"] * mtp_layers],
        "num_nextn_predict_layers": mtp_layers,
        "sliding_window": 64,
        "attention_other_setting": {"num_attention_heads": 6},
        "moe_intermediate_size": width // 2,
        "share_expert_dim": width // 2,
        "moe_router_scaling_factor": 3.0,
        "rope_theta": [5e6 if kind == "full_attention" else 1e4 for kind in LAYER_TYPES],
        "partial_rotary_factors": [0.5 if kind == "full_attention" else 1.0 for kind in LAYER_TYPES],
        **experts,
    }
    grid = IMAGE_SIDE // 14
    return Step3p7Config(
        vision_config={**vision, "patch_size": 14, "max_position_embeddings": grid * grid},
        text_config=text,
        image_token_id=4000,
    )


def mixed_samples(config: Step37Config, number: int) -> list[Sample]:
    """Pictures with 16 to 220 words each."""
    generator = torch.Generator().manual_seed(1)
    tokens, patches = config.tokens, config.vision.num_tokens(IMAGE_SIDE)
    samples = []
    for i in range(number):
        words = torch.randint(20, 3900, (int(torch.randint(16, 220, (1,), generator=generator)),), generator=generator)
        ids = torch.cat((torch.tensor([tokens.im_start, *[tokens.im_patch] * patches, tokens.im_end]), words))
        mask = torch.ones(len(ids))
        mask[: patches + 2] = 0
        pixels = torch.randint(0, 256, (1, 3, IMAGE_SIDE, IMAGE_SIDE), dtype=torch.uint8, generator=generator)
        samples.append(Sample(str(i), ids, mask, [ImageForInsert(tokens.im_start, pixels)]))
    return samples


def our_step(folder: str, samples: list[Sample]) -> tuple[Callable[[], float], PackedBatch, Step37Config]:
    model = load_hub_model(folder)
    pack = PackedBatch.from_samples(samples)
    (ddp,) = data_parallel.wrap(model)
    optimizer = ForwardingOptimizer([ddp], AdamWSettings(LR, WEIGHT_DECAY, BETAS), clip_grad=1.0, dtype=torch.float32)

    def step() -> float:
        ddp.zero_grad_buffer()
        optimizer.clear_gradients()
        loss = schedule.train_step([ddp], [pack]).loss
        optimizer.step()
        return float(loss)

    return step, pack, model.step37


def their_step(model: Any, samples: list[Sample]) -> Callable[[], float]:
    longest = max(len(sample.input_ids) for sample in samples)
    shape = (len(samples), longest)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        ids[row, :length], mask[row, :length] = sample.input_ids, 1
        labels[row, :length] = torch.where(sample.loss_mask > 0, sample.input_ids, -100)
    pixels: Tensor = torch.cat([sample.images[0].images for sample in samples])  # type: ignore[misc]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        values = normalise(pixels, torch.float32)
        loss = model(input_ids=ids, attention_mask=mask, pixel_values=values, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def seconds(step: Callable[[], float]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--dense", action="store_true", help="no routed experts")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    reference = reference_model(arguments.dense)
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        samples = mixed_samples(Step37Config.from_hub(folder), arguments.samples)
        ours, pack, config = our_step(folder, samples)
    theirs = their_step(reference, samples)

    first = ours(), theirs()
    difference = abs(first[0] - first[1]) / first[1]
    print(f"first loss: ours {first[0]:.6f}, theirs {first[1]:.6f}, relative difference {difference:.1e}")
    if difference > 1e-5:
        raise SystemExit("the two sides do not compute the same")
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(arguments.rounds)]
    peak = measure_gemm_peak(torch.device("cpu"), torch.float32)
    our_median, their_median = (statistics.median(column) for column in zip(*pairs, strict=True))
    padded = len(samples) * max(len(sample.input_ids) for sample in samples)
    parameters = sum(p.numel() for p in reference.parameters())
    flops = training_flops(config, pack)
    print(f"{parameters / 1e6:.1f}M parameters, {arguments.threads} threads, {pack.num_tokens} real tokens")
    print(f"positions computed: ours {pack.input_ids.numel()}, theirs {padded}")
    for name, median in (("ours", our_median), ("theirs", their_median)):
        share = flops / median / peak
        print(f"{name:>6}: {pack.num_tokens / median:8.0f} real tokens/s, {share:.0%} of the GEMM peak")
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    print(
        f"ratio: {statistics.median(ratios):.2f} (median of {len(ratios)} pairs; {ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
