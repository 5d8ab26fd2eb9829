"""CIDEr-D with the definition of the COCO caption evaluation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torchmetrics.utilities import rank_zero_warn

from step37_lit.errors import require
from step37_lit.metrics.corpus import CaptionMetric, Corpus, Tokenizer
from step37_lit.metrics.frequencies import DocumentFrequencies
from step37_lit.metrics.ngrams import MAX_ORDER, CorpusNgrams, Counts, Order

SIGMA = 6.0
SCALE = 10.0


class CIDErD(CaptionMetric):
    """CIDEr-D (Vedantam et al. 2015) as COCO has it: `compute()` gives the mean over items, 0-dim float64 in [0, 10].

    An n-gram weighs `tf (ln N - ln max(1, df))`, df of N items have it in their references. For each n = 1..4 and
    reference: `sum min(w_c, w_r) w_r / (|w_c| |w_r|) exp(-delta^2 / (2 sigma^2))`, sigma = 6, delta the difference of
    the numbers of bigrams; the mean over n and references, times 10. A zero norm is not divided by.

    Without given frequencies N and df come from all items seen until `compute`, so the scores of two batches do not
    average to that of both, and N = 1 scores 0 with a warning.

    Args:
        tokenizer: "ptb" for `ptb_tokenize`, None for strings that are tokenized already.
        document_frequencies: Those of the whole split. They make the score additive, and comparable where only a part
            of the split is scored.
        **kwargs: Arguments of `torchmetrics.Metric`.
    """

    plot_lower_bound = 0.0
    plot_upper_bound = SCALE

    def __init__(
        self, tokenizer: Tokenizer = "ptb", document_frequencies: DocumentFrequencies | None = None, **kwargs: Any
    ):
        super().__init__(tokenizer, **kwargs)
        if document_frequencies is not None:
            found = document_frequencies.tokenizer
            require(found == tokenizer, "document_frequencies.tokenizer", f"{tokenizer!r}, as the metric's", found)
        self.document_frequencies = document_frequencies

    def _scores(self, corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
        ngrams = corpus.ngrams
        if self.document_frequencies is None:
            num_items = len(corpus)
            frequencies = [order.references.items_with(ngrams.item, len(order.pairs)) for order in ngrams.orders]
        else:
            num_items = self.document_frequencies.num_items
            frequencies = self.document_frequencies.of(ngrams)
        if num_items < 2:
            rank_zero_warn("CIDEr-D of 1 item is 0: document frequencies tell nothing apart before there are 2 items")
        similarity = np.zeros(len(ngrams.item))
        for order, frequency in zip(ngrams.orders, frequencies, strict=True):
            idf = math.log(num_items) - np.log(np.maximum(1, frequency))
            similarity += _cosine(order, idf, ngrams)
        similarity *= SCALE / MAX_ORDER * _length_penalty(ngrams)
        scores = np.add.reduceat(similarity, ngrams.first_reference) / np.bincount(ngrams.item)
        return np.array(math.fsum(scores) / len(scores)), scores


def _cosine(order: Order, idf: np.ndarray, ngrams: CorpusNgrams) -> np.ndarray:
    """Clipped cosine of each reference and its caption, [references]."""
    caption, reference = _weights(order.candidates, idf), _weights(order.references, idf)
    matched = order.match >= 0
    weight = reference[matched]
    product = np.minimum(caption[order.match[matched]], weight) * weight
    num_references = len(ngrams.item)
    dot = np.bincount(order.references.sentence[matched], product, num_references)
    caption_norm = np.sqrt(np.bincount(order.candidates.sentence, caption**2, len(ngrams.lengths)))[ngrams.item]
    norm = caption_norm * np.sqrt(np.bincount(order.references.sentence, reference**2, num_references))
    return dot / np.where(norm > 0, norm, 1)


def _weights(counts: Counts, idf: np.ndarray) -> np.ndarray:
    return counts.count * idf[counts.ngram]


def _length_penalty(ngrams: CorpusNgrams) -> np.ndarray:
    """Gaussian of the difference of the numbers of bigrams, [references]."""
    delta = ngrams.lengths[ngrams.item] - ngrams.reference_lengths  # an empty sentence scores 0 in any case
    return np.exp(-(delta**2) / (2 * SIGMA**2))
