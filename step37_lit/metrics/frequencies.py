"""In how many items of a split each n-gram stands: what CIDEr-D weighs n-grams by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from step37_lit.errors import require
from step37_lit.metrics.corpus import Tokenizer, check_references, check_tokenizer, tokenized
from step37_lit.metrics.ngrams import CorpusNgrams, Sentences, find


@dataclass(frozen=True, eq=False)
class DocumentFrequencies:
    """Document frequencies of a split's references, computed once.

    Args:
        tokenizer: What the references were tokenized with.
        num_items: Items of the split.
        vocabulary: Number of each word.
        pairs: For n = 1..4 the sorted n-grams of `Sentences.orders`.
        counts: For n = 1..4 the number of items whose references have the n-gram, [ngrams] int64.
    """

    tokenizer: Tokenizer
    num_items: int
    vocabulary: dict[str, int]
    pairs: tuple[np.ndarray, ...]
    counts: tuple[np.ndarray, ...]

    @classmethod
    def from_references(cls, references: Sequence[Sequence[str]], tokenizer: Tokenizer = "ptb") -> DocumentFrequencies:
        """Counts the n-grams of a whole split's references, a list of strings for each item."""
        check_tokenizer(tokenizer)
        require(len(references) > 0, "references", "one or more items", references)
        for i, item in enumerate(references):
            check_references(f"references[{i}]", item)
        sentences = Sentences(tokenized(chain.from_iterable(references), tokenizer))
        item_of = np.repeat(np.arange(len(references)), [len(item) for item in references])
        pairs, counts = [], []
        for order_pairs, order_counts in sentences.orders():
            pairs.append(order_pairs)
            counts.append(order_counts.items_with(item_of, len(order_pairs)))
        return cls(tokenizer, len(references), sentences.vocabulary, tuple(pairs), tuple(counts))

    def of(self, ngrams: CorpusNgrams) -> list[np.ndarray]:
        """Frequencies of a corpus's n-grams, one array [ngrams] int64 for each order; 0 for those not in the split."""
        words = np.fromiter((self.vocabulary.get(word, -1) for word in ngrams.vocabulary), np.int64)
        known = np.zeros(1, dtype=np.int64)  # number here of each n-gram of the corpus; the empty one is 0
        frequencies = []
        for order, pairs, counts in zip(ngrams.orders, self.pairs, self.counts, strict=True):
            previous, word = np.divmod(order.pairs, max(1, len(words)))
            wanted = known[previous] * len(self.vocabulary) + words[word]  # below 0 where the previous one is unknown
            wanted[words[word] < 0] = -1
            known = find(pairs, wanted)
            frequencies.append(np.append(counts, 0)[known])  # -1, not found, is the 0 at the end
        return frequencies
