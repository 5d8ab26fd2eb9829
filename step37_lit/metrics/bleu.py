"""BLEU-1..4 with the definitions of the COCO caption evaluation."""

from __future__ import annotations

import numpy as np

from step37_lit.metrics.corpus import CaptionMetric, Corpus
from step37_lit.metrics.ngrams import MAX_ORDER, CorpusNgrams

TINY, SMALL = 1e-15, 1e-9


class CocoBLEU(CaptionMetric):
    """BLEU-1..4 (Papineni et al. 2002) as COCO has it: `compute()` gives [4] float64 in [0, 1].

    Counts are pooled over the corpus; an n-gram of a caption is correct as often as the reference with most of it has
    it. The reference length is the closest one, of two as close the shorter one. `p_k = (correct + 1e-15) /
    (guess + 1e-9)`, `B_n = (p_1 ... p_n)^(1/n)`, times `exp(1 - 1/ratio)` where the ratio of lengths is below 1.
    `per_item()` applies the same formulas to each caption alone.
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def _scores(self, corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
        ngrams = corpus.ngrams
        correct = _correct(ngrams)
        guess = np.maximum(0, ngrams.lengths[:, None] - np.arange(MAX_ORDER))
        closest = _closest_length(ngrams)
        pooled = _bleu(correct.sum(axis=0), guess.sum(axis=0), ngrams.lengths.sum(), closest.sum())
        return pooled, _bleu(correct, guess, ngrams.lengths, closest)


def _correct(ngrams: CorpusNgrams) -> np.ndarray:
    """Clipped counts, [items, 4]."""
    columns = []
    for order in ngrams.orders:
        matched = order.match >= 0
        allowed = np.zeros(len(order.candidates.count), dtype=np.int64)
        np.maximum.at(allowed, order.match[matched], order.references.count[matched])
        correct = np.minimum(order.candidates.count, allowed)
        columns.append(np.bincount(order.candidates.sentence, correct, minlength=len(ngrams.lengths)))
    return np.stack(columns, axis=1)


def _closest_length(ngrams: CorpusNgrams) -> np.ndarray:
    """Length of the closest reference of each item, [items]."""
    distance = np.abs(ngrams.reference_lengths - ngrams.lengths[ngrams.item])
    width = ngrams.reference_lengths.max() + 1  # sorts by distance, then by length
    return np.minimum.reduceat(distance * width + ngrams.reference_lengths, ngrams.first_reference) % width


def _bleu(correct: np.ndarray, guess: np.ndarray, length: np.ndarray, closest: np.ndarray) -> np.ndarray:
    """[..., 4] from counts [..., 4] and lengths [...]."""
    precision = (correct + TINY) / (guess + SMALL)
    mean = np.cumprod(precision, axis=-1) ** (1 / np.arange(1, MAX_ORDER + 1))
    ratio = (length + TINY) / (closest + SMALL)
    return mean * np.exp(np.minimum(0, 1 - 1 / ratio))[..., None]
