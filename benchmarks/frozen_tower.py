"""What a frozen vision tower saves: time of a step, activations that are kept for backward, the optimizer's moments.

    python benchmarks/frozen_tower.py [--threads 2] [--rounds 7]

Three models of the same weights train on the same pack in one process and take turns, so that a busy machine slows all:
everything trains; the tower is frozen by a schedule that trains it in a later stage (it has its place in megatron's
buffers); the tower is frozen for good (`freeze_vision_model`). The ratio to the first counts. The first losses of all
must be equal, so that a fast wrong answer cannot win. Activations are the bytes of the tensors that autograd saves in
forward, each storage once, without the parameters: their peak is the end of forward.
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
from step37_lit.megatron.optimizer import AdamWSettings, ForwardingOptimizer
from step37_lit.parameter_groups import split_parameters

SIDE, SAMPLES = 224, 8
FACTORS = {"full": 1.0, "scheduled": 0.0}  # of the tower


def config() -> Step37Config:
    """About 15M parameters, most of them in the tower."""
    vision = {"width": 256, "num_layers": 8, "num_heads": 8, "ffn_hidden_size": 1024, "image_size": SIDE}
    return with_overrides(Step37Config.preset("tiny"), text={"hidden_size": 256, "ffn_hidden_size": 704}, vision=vision)


def pictures(config: Step37Config) -> PackedBatch:
    """One picture and 32 words a sample."""
    generator, tokens = torch.Generator().manual_seed(1), config.tokens
    patches = config.vision.num_tokens(SIDE)
    samples = []
    for i in range(SAMPLES):
        words = torch.randint(20, config.text.vocab_size, (32,), generator=generator)
        ids = torch.cat((torch.tensor([tokens.im_start, *[tokens.im_patch] * patches, tokens.im_end]), words))
        mask = torch.ones(len(ids))
        mask[: patches + 2] = 0
        pixels = torch.randint(0, 256, (1, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
        samples.append(Sample(str(i), ids, mask, [ImageForInsert(tokens.im_start, pixels)]))
    return PackedBatch.from_samples(samples)


class Side:
    """One model with its optimizer."""

    def __init__(self, name: str, config: Step37Config, pack: PackedBatch):
        self.pack, self.model = pack, build_model(config)
        part_of = None
        if name in FACTORS:
            groups = split_parameters(config, ["vision_tower", "projector", "text_decoder"], "groups")
            part_of = {parameter: group for group, names in groups.items() for parameter in names}
        else:
            self.model.freeze(freeze_vision_model=True)
        (self.ddp,) = data_parallel.wrap(self.model)
        self.optimizer = ForwardingOptimizer([self.ddp], AdamWSettings(1e-4), 1.0, torch.float32, part_of)
        if part_of is not None:
            rates = [group["lr"] for group in self.optimizer.param_groups]
            factors = {"vision_tower": FACTORS[name], "projector": 1.0, "text_decoder": 1.0}
            self.optimizer.train_parts(factors, rates)

    def step(self) -> float:
        self.ddp.zero_grad_buffer()
        self.optimizer.clear_gradients()
        loss = schedule.train_step([self.ddp], [self.pack]).loss
        self.optimizer.step()
        return float(loss)

    def seconds(self) -> float:
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start

    def activations(self) -> int:
        """Bytes that autograd keeps at the end of forward."""
        return kept_bytes(self.model, self.step)

    def moments(self) -> int:
        states = [state for inner in self.optimizer.inner for state in inner.state.values()]
        return sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    process.initialize()
    model = config()
    pack = pictures(model)
    sides = {name: Side(name, model, pack) for name in (*FACTORS, "for good")}
    losses = {name: side.step() for name, side in sides.items()}
    if len(set(losses.values())) != 1:
        raise SystemExit(f"the sides do not compute the same: {losses}")
    rounds = [{name: side.seconds() for name, side in sides.items()} for _ in range(arguments.rounds)]
    total = sum(p.numel() for p in sides["full"].model.parameters())
    tower = sum(p.numel() for p in sides["full"].model.vision_model.parameters())
    print(
        f"{total / 1e6:.1f}M parameters, {tower / 1e6:.1f}M in the tower, {SAMPLES} pictures, {pack.num_tokens} tokens"
    )
    kept = {name: (side.activations(), side.moments()) for name, side in sides.items()}
    for name in sides:
        ratios = sorted(lap[name] / lap["full"] for lap in rounds)
        milliseconds = 1e3 * statistics.median(lap[name] for lap in rounds)
        activations, moments = kept[name]
        print(
            f"{name:>9}: {milliseconds:7.1f} ms a step, ratio {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}); activations {activations / 2**20:6.1f} MiB, ratio "
            f"{activations / kept['full'][0]:.2f}; moments {moments / 2**20:5.1f} MiB"
        )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
