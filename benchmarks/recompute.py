"""What recomputation costs and saves: time of a step and activations that are kept for the backward pass.

    python benchmarks/recompute.py [--threads 2] [--rounds 5]

Models of the same weights train on the same pack in one process and take turns, so that a busy machine slows all; the
ratio to `none` counts. The losses of all must be equal. Activations are the bytes of the tensors that autograd saves in
forward, each storage once, without the parameters.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
from activations import kept_bytes

from step37_lit.batch import ImageForInsert, PackedBatch, Sample
from step37_lit.config import Step37Config
from step37_lit.lit_module import with_overrides
from step37_lit.megatron import data_parallel, process, schedule
from step37_lit.megatron.build import build_model
from step37_lit.model.recompute import Recompute

SIDES = {
    "none": Recompute(),
    "selective": Recompute("selective"),
    "full, half of the layers": Recompute("full", layers=2),
    "full": Recompute("full"),
    "vision": Recompute(vision=True),
    "full and vision": Recompute("full", vision=True),
}
PICTURES, WORDS = 4, 384


def config() -> Step37Config:
    """About 4M parameters: four decoder layers, two of them with experts, and four blocks of the tower."""
    vision = {"width": 128, "image_size": 224}
    return with_overrides(Step37Config.preset("tiny_moe"), text={"hidden_size": 256}, vision=vision)


def pack(config: Step37Config) -> PackedBatch:
    generator, tokens = torch.Generator().manual_seed(1), config.tokens
    side = config.vision.image_size
    patches = config.vision.num_tokens(side)
    samples = []
    for number in range(PICTURES):
        words = torch.randint(20, config.text.vocab_size, (WORDS,), generator=generator)
        ids = torch.cat((torch.tensor([tokens.im_start, *[tokens.im_patch] * patches, tokens.im_end]), words))
        pixels = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=generator)
        image = ImageForInsert(tokens.im_start, pixels)
        samples.append(Sample(str(number), ids, (torch.arange(len(ids)) > patches + 2).float(), [image]))
    return PackedBatch.from_samples(samples)


class Side:
    """One model."""

    def __init__(self, config: Step37Config, pack: PackedBatch, recompute: Recompute):
        self.pack, self.model = pack, build_model(config, recompute=recompute)
        (self.ddp,) = data_parallel.wrap(self.model)

    def step(self) -> float:
        self.ddp.zero_grad_buffer()
        return float(schedule.train_step([self.ddp], [self.pack]).loss)

    def seconds(self) -> float:
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start

    def activations(self) -> int:
        """Bytes that autograd keeps at the end of forward."""
        return kept_bytes(self.model, lambda: self.model(**self.pack.model_inputs()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    process.initialize()
    model = config()
    row = pack(model)
    sides = {name: Side(model, row, recompute) for name, recompute in SIDES.items()}
    losses = {name: side.step() for name, side in sides.items()}
    if len(set(losses.values())) != 1:
        raise SystemExit(f"the sides do not compute the same: {losses}")
    rounds = [{name: side.seconds() for name, side in sides.items()} for _ in range(arguments.rounds)]
    kept = {name: side.activations() for name, side in sides.items()}
    print(f"{sum(p.numel() for p in sides['none'].model.parameters()) / 1e6:.1f}M parameters, {row.num_tokens} tokens")
    for name in sides:
        ratios = sorted(lap[name] / lap["none"] for lap in rounds)
        print(
            f"{name:>24}: time {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); activations "
            f"{kept[name] / 2**20:6.1f} MiB, ratio {kept[name] / kept['none']:.2f}"
        )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
