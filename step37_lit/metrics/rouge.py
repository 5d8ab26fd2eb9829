"""ROUGE-L with the definition of the COCO caption evaluation."""

from __future__ import annotations

import math

import numpy as np

from step37_lit.metrics.corpus import CaptionMetric, Corpus

BETA = 1.2


class CocoROUGEL(CaptionMetric):
    """ROUGE-L (Lin 2004) as COCO has it: `compute()` gives the mean over items, 0-dim float64 in [0, 1].

    From the longest common subsequence (LCS) of a caption and each reference: `P = max LCS / len(caption)`,
    `R = max LCS / len(reference)`, the two maxima apart, `F = (1 + b^2) P R / (R + b^2 P)` with b = 1.2.

    Tokens are what single spaces separate, as there: an empty caption is one empty token, which scores 0 unless a
    reference is empty too. That matters for `tokenizer=None` only.
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def _scores(self, corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
        scores = [_rouge_l(*item) for item in zip(corpus.candidates, corpus.references, strict=True)]
        return np.array(math.fsum(scores) / len(scores)), np.array(scores)


def _rouge_l(caption: str, references: list[str]) -> float:
    tokens = caption.split(" ")
    places: dict[str, int] = {}
    for i, token in enumerate(tokens):
        places[token] = places.get(token, 0) | 1 << i
    precision = recall = 0.0
    for reference in references:
        others = reference.split(" ")
        common = _lcs_length(places, len(tokens), others)
        precision = max(precision, common / len(tokens))
        recall = max(recall, common / len(others))
    if precision == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _lcs_length(places: dict[str, int], length: int, tokens: list[str]) -> int:
    """Length of the longest common subsequence of `tokens` and a sequence of `length` tokens, given by their places.

    Bit-parallel (Hyyrö 2004): bit i of `row` is 0 where the LCS grows at place i, so a token costs four operations
    on an integer instead of a row of the table.
    """
    ones = (1 << length) - 1
    row = ones
    for token in tokens:
        if matched := row & places.get(token, 0):
            row = (row + matched) | (row - matched)
    return length - (row & ones).bit_count()
