"""Greedy decoding against `transformers`' `generate`: new tokens per second, prefill apart.

    python benchmarks/decode.py [--threads 2] [--batch 16] [--new-tokens 64] [--rounds 5] [--dense]

Both sides have the same weights of about 20M parameters, pictures and prompts of different lengths; the other side pads
them on the left, as its `generate` needs. Both run in one process and take turns. The tokens must agree, so that a fast
wrong answer cannot win.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from train_step import mixed_samples, reference_model

from step37_lit.batch import PackedBatch, Sample
from step37_lit.config import Step37Config
from step37_lit.hub.load import load_hub_model
from step37_lit.megatron.inference import RowDecoder, inference_mode
from step37_lit.model.step37_model import Step37Model
from step37_lit.model.vision_tower import normalise


def our_tokens(model: Step37Model, prompts: list[Sample], count: int) -> torch.Tensor:
    """int64 [batch, count], the most likely ones."""
    with inference_mode(model):
        decoder = RowDecoder(model, max(map(len, prompts)) + count)
        tokens = [decoder.prefill(PackedBatch.from_samples(prompts)).argmax(-1)]
        while len(tokens) < count:
            tokens.append(decoder.step(tokens[-1]).argmax(-1))
    return torch.stack(tokens, 1)


def their_tokens(model: Any, prompts: list[Sample], count: int) -> torch.Tensor:
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt.input_ids, 1
    pixels = normalise(torch.cat([prompt.images[0].images for prompt in prompts]), torch.float32)  # type: ignore[misc]
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=pixels,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[:, longest:]


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dense", action="store_true", help="no routed experts")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    reference = reference_model(options.dense).eval()
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        samples = mixed_samples(Step37Config.from_hub(folder), options.batch)
        model = load_hub_model(folder)
    prompts = [replace(sample, loss_mask=torch.zeros(len(sample))) for sample in samples]
    count = options.new_tokens
    ours, theirs = our_tokens(model, prompts, count), their_tokens(reference, prompts, count)
    equal = float((ours == theirs).float().mean())
    print(f"{options.batch} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {count} new ones")
    print(f"tokens that agree: {equal:.1%}")
    if equal < 0.99:  # a tie of two logits may fall either way, and all that follows it
        raise SystemExit("the two sides do not compute the same")
    rounds = []
    for _ in range(options.rounds):
        sides = [(our_tokens, model), (their_tokens, reference)]
        rounds.append([[seconds(lambda f=f, m=m, n=n: f(m, prompts, n)) for n in (1, count)] for f, m in sides])
    first = [tuple(side[0] for side in sides) for sides in rounds]
    further = [tuple(side[1] - side[0] for side in sides) for sides in rounds]
    for name, pairs in (("prefill and one token", first), ("each further token", further)):
        ratios = sorted(their / our for our, their in pairs)
        middle = statistics.median(ratios)
        print(f"{name}: ratio {middle:.2f} (median of {len(ratios)}; {ratios[0]:.2f} to {ratios[-1]:.2f})")
    speeds = [statistics.median(options.batch * (count - 1) / pair[side] for pair in further) for side in (0, 1)]
    print(f"decoding: ours {speeds[0]:,.0f} tokens/s, theirs {speeds[1]:,.0f}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
