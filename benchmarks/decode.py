"""Greedy decoding against `transformers`' `generate`: prefill, each further token, and both together.

    python benchmarks/decode.py [--threads 2] [--batch 16] [--new-tokens 64] [--rounds 5] [--width 320] [--dense]
    python benchmarks/decode.py --speculate 3 [--train-steps 300] [--model FOLDER] [--unseen] ...

Both sides have the same weights (20M parameters at a width of 320), pictures and prompts of different lengths; the
other side pads them on the left, as its `generate` needs. Both run in one process and take turns. Times are those of
the processor, all threads together, which other load lengthens least; a step's is the median over the steps of a run.
The tokens must agree, so that a fast wrong answer cannot win. Last come captions of different lengths, evenly spread up
to the longest: a row that is done leaves our batch and is padded in the other, whose time is the same.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from train_step import mixed_samples, reference_model
from trained_model import SceneTexts, train_into

from step37_lit.batch import PackedBatch, Sample
from step37_lit.config import Step37Config
from step37_lit.generation import Generator
from step37_lit.hub.load import load_hub_model
from step37_lit.megatron import process
from step37_lit.megatron.inference import RowDecoder, inference_mode
from step37_lit.model.step37_model import Step37Model
from step37_lit.model.vision_tower import normalise
from step37_lit.sampling import GenerationSettings
from step37_lit.tokenizer import Step37Tokenizer


class Clock:
    """When each token was there, in seconds of the processor; the first entry is the start."""

    def __init__(self) -> None:
        self.marks = [time.process_time()]

    def __call__(self, ids: Any, scores: torch.Tensor) -> torch.Tensor:
        self.marks.append(time.process_time())
        return scores

    @property
    def first(self) -> float:
        return self.marks[1] - self.marks[0]

    @property
    def step(self) -> float:
        return statistics.median(after - before for before, after in itertools.pairwise(self.marks[1:]))

    @property
    def all(self) -> float:
        return self.marks[-1] - self.marks[0]


def our_tokens(
    model: Step37Model, prompts: list[Sample], count: int, leaving: bool = False
) -> tuple[torch.Tensor, Clock]:
    """int64 [rows, count], the most likely ones; `leaving` rows are done one after another and are not in it."""
    clock = Clock()
    with inference_mode(model, rows=len(prompts)):
        decoder = RowDecoder(model, max(map(len, prompts)) + count)
        logits = decoder.prefill(PackedBatch.from_samples(prompts))
        tokens: list[torch.Tensor] = []
        while True:
            tokens.append(clock(prompts, logits).argmax(-1))
            if len(tokens) == count:
                return torch.stack(tokens, 1), clock
            stay = len(prompts) - len(prompts) * len(tokens) // count
            if leaving and stay < len(logits):
                decoder.select(torch.arange(stay))
                tokens = [each[:stay] for each in tokens]
            logits = decoder.step(tokens[-1][:, None])[:, 0]


def their_tokens(model: Any, prompts: list[Sample], count: int) -> tuple[torch.Tensor, Clock]:
    clock = Clock()
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
            logits_processor=[clock],
        )
    return out[:, longest:], clock


def our_drafted_tokens(
    generator: Generator, prompts: list[Sample], count: int, drafts: int
) -> tuple[torch.Tensor, float, float]:
    """int64 [rows, count], and seconds of the processor for the first token and for all."""
    marks = [time.process_time()]
    for tokens in (1, count):
        settings = GenerationSettings(max_new_tokens=tokens, speculate=drafts)
        found = generator.generate(prompts, settings)
        marks.append(time.process_time())
    rows = torch.tensor([completion.tokens for (completion,) in found])
    return rows, marks[1] - marks[0], marks[2] - marks[1]


def same_weights(options: argparse.Namespace, folder: str) -> tuple[Any, Step37Model, list[Sample]]:
    """Their model, ours and the prompts."""
    from transformers import Step3p7ForConditionalGeneration

    if not options.speculate:
        reference = reference_model(options.dense, options.width).eval()
        reference.save_pretrained(folder)
        samples = mixed_samples(Step37Config.from_hub(folder), options.batch)
        prompts = [replace(sample, loss_mask=torch.zeros(len(sample))) for sample in samples]
        return reference, load_hub_model(folder), prompts
    if not (Path(folder) / "config.json").exists():
        train_into(Path(folder), options.dense, options.width, options.train_steps)
    config = Step37Config.from_hub(folder)
    model = load_hub_model(folder, config=replace(config, text=replace(config.text, mtp=True)))
    reference = Step3p7ForConditionalGeneration.from_pretrained(folder).float().eval()
    return reference, model, SceneTexts(config).prompts(options.batch, "unseen" if options.unseen else "train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--dense", action="store_true", help="no routed experts")
    parser.add_argument("--speculate", type=int, default=0, help="drafts, up to 3; trains a model")
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--model", help="folder of the trained model; one that is not there is made")
    parser.add_argument("--unseen", action="store_true", help="prompts that the model was not trained on")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    process.initialize()
    with tempfile.TemporaryDirectory() as folder:
        reference, model, prompts = same_weights(options, options.model or folder)
    count, drafts = options.new_tokens, options.speculate
    generator = Generator(model, Step37Tokenizer.train(["a"], 300), options.batch)
    theirs, _ = their_tokens(reference, prompts, count)
    print(f"{options.batch} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {count} new ones")
    sides = {"": our_tokens(model, prompts, count)[0]}
    if drafts:
        sides[" with drafts"] = our_drafted_tokens(generator, prompts, count, drafts)[0]
    for name, ours in sides.items():
        equal = float((ours == theirs).float().mean())
        print(f"tokens that agree{name}: {equal:.1%}")
        if equal < 0.99:  # a tie of two logits may fall either way, and all that follows it
            raise SystemExit("the two sides do not compute the same")
    ratios: dict[str, list[float]] = {}
    ours_ms, theirs_ms = [], []
    for _ in range(options.rounds):
        our, their = our_tokens(model, prompts, count)[1], their_tokens(reference, prompts, count)[1]
        leaving = our_tokens(model, prompts, count, leaving=True)[1]
        found = {
            "prefill and one token": their.first / our.first,
            "each further token": their.step / our.step,
            "all": their.all / our.all,
            "all, of different lengths": their.all / leaving.all,
        }
        if drafts:
            _, first, all_tokens = our_drafted_tokens(generator, prompts, count, drafts)
            found |= {
                "with drafts, prefill and one token": their.first / first,
                "with drafts, further tokens": (their.all - their.first) / (all_tokens - first),
                "with drafts, all": their.all / all_tokens,
                "with drafts against without, further tokens": (our.all - our.first) / (all_tokens - first),
            }
        for name, ratio in found.items():
            ratios.setdefault(name, []).append(ratio)
        ours_ms.append(1e3 * our.step), theirs_ms.append(1e3 * their.step)
    for name, values in ratios.items():
        print(f"{name}: ratio {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
    print(f"a step: ours {statistics.median(ours_ms):.1f} ms, theirs {statistics.median(theirs_ms):.1f} ms")
    if drafts:
        print(f"{drafts} drafts: {generator.tokens_per_step:.2f} tokens a step of each row")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
