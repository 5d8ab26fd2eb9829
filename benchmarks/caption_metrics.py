"""BLEU-1..4, ROUGE-L and CIDEr-D of tokenized captions against pycocoevalcap's, and the tokenizer's captions a second.

    python benchmarks/caption_metrics.py [--items 5000] [--references 5] [--rounds 5]

Both sides score the same made-up captions in one process and take turns; ours includes `update`. The median of the
rounds' ratios counts. Needs pycocoevalcap (pure Python for these three: `pip install --no-deps pycocoevalcap`).
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable

from step37_lit.metrics import CIDErD, CocoBLEU, CocoROUGEL, ptb_tokenize
from step37_lit.metrics.ptb import _chunk_tokens

# Words of the k-th rank are as frequent as 1 / k; a caption and a reference of an item share half of their words.
VOCABULARY = [f"word{k}" for k in range(1, 5001)]
WEIGHTS = [1 / k for k in range(1, 5001)]


def made_up_captions(num_items: int, num_references: int) -> tuple[list[str], list[list[str]]]:
    generator = random.Random(0)

    def sentence(topic: list[str]) -> str:
        length = max(4, round(generator.gauss(10.5, 2.5)))
        noise = generator.choices(VOCABULARY, WEIGHTS, k=length)
        return " ".join(topic[i] if generator.random() < 0.5 else noise[i] for i in range(length))

    captions, references = [], []
    for _ in range(num_items):
        topic = generator.choices(VOCABULARY, WEIGHTS, k=40)
        captions.append(sentence(topic))
        references.append([sentence(topic) for _ in range(num_references)])
    return captions, references


def score_ours(captions: list[str], references: list[list[str]]) -> list[float]:
    metrics = CocoBLEU(tokenizer=None), CocoROUGEL(tokenizer=None), CIDErD(tokenizer=None)
    scores: list[float] = []
    for metric in metrics:
        metric.update(captions, references)
        scores += metric.compute().reshape(-1).tolist()
    for metric in metrics:
        metric.reset()  # as between two validations: nothing of this round's work is left for the next
    return scores


def pycocoevalcap_scorer() -> Callable[[list[str], list[list[str]]], list[float]]:
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        sys.exit(f"{error}: pip install --no-deps pycocoevalcap")

    def score(captions: list[str], references: list[list[str]]) -> list[float]:
        results, truths = {i: [caption] for i, caption in enumerate(captions)}, dict(enumerate(references))
        bleu = Bleu(4).compute_score(truths, results, verbose=0)[0]
        return [*bleu, Rouge().compute_score(truths, results)[0], Cider().compute_score(truths, results)[0]]

    return score


def timed(function: Callable, *arguments: object) -> tuple[float, list[float]]:
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def tokenize_all(captions: list[str]) -> float:
    """Captions a second, from an empty cache."""
    _chunk_tokens.cache_clear()
    start = time.perf_counter()
    for caption in captions:
        ptb_tokenize(caption)
    return len(captions) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=5000)
    parser.add_argument("--references", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    score_theirs = pycocoevalcap_scorer()
    captions, references = made_up_captions(options.items, options.references)
    ours, theirs = [], []
    for _ in range(options.rounds):
        seconds, our_scores = timed(score_ours, captions, references)
        ours.append(seconds)
        seconds, their_scores = timed(score_theirs, captions, references)
        theirs.append(seconds)
    difference = max(abs(a - b) for a, b in zip(our_scores, their_scores, strict=True))
    ratios = sorted(their / our for their, our in zip(theirs, ours, strict=True))
    print(f"{options.items} captions with {options.references} references each, median of {options.rounds} rounds")
    print(f"ours          {statistics.median(ours):6.3f} s ({min(ours):.3f} to {max(ours):.3f})")
    print(f"pycocoevalcap {statistics.median(theirs):6.3f} s ({min(theirs):.3f} to {max(theirs):.3f})")
    print(f"ratio {statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f}, target >= 8)")
    print(f"largest difference of a score {difference:.1e}")
    written = [f"{text.capitalize()}, it's a t-shirt." for texts in references for text in texts]
    print(f"ptb_tokenize: {tokenize_all(written):,.0f} captions/s ({len(written)} captions, from an empty cache)")


if __name__ == "__main__":
    main()
