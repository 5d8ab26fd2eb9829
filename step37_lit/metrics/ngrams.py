"""N-grams of a corpus as arrays of numbers, for BLEU and CIDEr-D.

A word is a number by its first place in the corpus. An n-gram is a pair, its first n - 1 words as an n-gram and its
last word, and its number is the place of that pair among the corpus's sorted pairs. A stable sort of the pairs, one
for each order, brings equal n-grams together and leaves their sentences in order; everything else is runs of that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count

import numpy as np

MAX_ORDER = 4


@dataclass(frozen=True)
class Counts:
    """How often the n-grams of one order stand in sentences; an entry is an n-gram of a sentence, [entries] int64.

    Entries are sorted by n-gram, then by sentence.
    """

    ngram: np.ndarray
    sentence: np.ndarray
    count: np.ndarray

    def __getitem__(self, entries: np.ndarray) -> Counts:
        return Counts(self.ngram[entries], self.sentence[entries], self.count[entries])

    def items_with(self, item: np.ndarray, num_ngrams: int) -> np.ndarray:
        """Number of items with each n-gram, [num_ngrams]; `item` is that of each sentence, ascending."""
        first = run_starts(self.ngram, item[self.sentence])
        return np.bincount(self.ngram[first], minlength=num_ngrams)


class Sentences:
    """Sentences as word numbers.

    Args:
        sentences: Sentences with white space between tokens.

    Attributes:
        vocabulary: Number of each word.
        lengths: Words of each sentence, int64.
    """

    def __init__(self, sentences: Sequence[str]):
        words = [sentence.split() for sentence in sentences]
        numbers: defaultdict[str, int] = defaultdict(count().__next__)
        self.lengths = np.fromiter(map(len, words), np.int64, len(words))
        self._words = np.fromiter(map(numbers.__getitem__, chain.from_iterable(words)), np.int64, self.lengths.sum())
        self.vocabulary: dict[str, int] = dict(numbers)

    def orders(self) -> Iterator[tuple[np.ndarray, Counts]]:
        """For n = 1..MAX_ORDER: the sorted pairs, `previous * len(vocabulary) + word`, and their counts."""
        sentence = np.repeat(np.arange(len(self.lengths)), self.lengths)
        end = np.repeat(np.cumsum(self.lengths), self.lengths)
        start = np.arange(len(self._words))
        ngram = np.zeros_like(start)
        for n in range(1, MAX_ORDER + 1):
            fits = start + n <= end
            start, end, sentence, ngram = start[fits], end[fits], sentence[fits], ngram[fits]
            pair = ngram * len(self.vocabulary) + self._words[start + n - 1]
            by_pair = np.argsort(pair, kind="stable")
            sorted_pair, sorted_sentence = pair[by_pair], sentence[by_pair]
            first = run_starts(sorted_pair)
            sorted_ngram = np.repeat(np.arange(len(first)), np.diff(first, append=len(pair)))
            ngram = np.empty_like(pair)
            ngram[by_pair] = sorted_ngram
            entries = run_starts(sorted_ngram, sorted_sentence)
            counts = np.diff(entries, append=len(pair))
            yield sorted_pair[first], Counts(sorted_ngram[entries], sorted_sentence[entries], counts)


@dataclass(frozen=True)
class Order:
    """N-grams of one order in a corpus.

    Args:
        pairs: The sorted pairs of `Sentences.orders`, [ngrams].
        candidates: Counts in the captions; a sentence is an item.
        references: Counts in the references, numbered over all items.
        match: For each entry of `references` the entry of `candidates` with the same n-gram in its item's caption,
            or -1.
    """

    pairs: np.ndarray
    candidates: Counts
    references: Counts
    match: np.ndarray


class CorpusNgrams:
    """N-grams of captions and of their references.

    Attributes:
        vocabulary: Number of each word.
        lengths: Words of each caption, [items] int64.
        reference_lengths: Words of each reference, [references] int64.
        first_reference: Number of each item's first reference, [items] int64.
        item: Item of each reference, [references] int64.
        orders: One `Order` for n = 1..MAX_ORDER.
    """

    def __init__(self, candidates: Sequence[str], references: Sequence[Sequence[str]]):
        num_items = len(candidates)
        sentences = Sentences([*candidates, *chain.from_iterable(references)])
        num_references = np.fromiter(map(len, references), np.int64, num_items)
        self.vocabulary = sentences.vocabulary
        self.lengths, self.reference_lengths = np.split(sentences.lengths, [num_items])
        self.first_reference = np.cumsum(num_references) - num_references
        self.item = np.repeat(np.arange(num_items), num_references)
        self.orders = [self._order(pairs, counts) for pairs, counts in sentences.orders()]

    def _order(self, pairs: np.ndarray, counts: Counts) -> Order:
        num_items = len(self.lengths)
        of_caption = counts.sentence < num_items
        candidates, references = counts[of_caption], counts[~of_caption]
        references.sentence[:] -= num_items
        known = candidates.ngram * num_items + candidates.sentence
        wanted = references.ngram * num_items + self.item[references.sentence]
        return Order(pairs, candidates, references, find(known, wanted))


def run_starts(*columns: np.ndarray) -> np.ndarray:
    """Places where a run of equal rows starts; `columns` have one entry for each row."""
    if len(columns[0]) == 0:
        return np.zeros(0, dtype=np.int64)
    changes = [column[1:] != column[:-1] for column in columns]
    return np.flatnonzero(np.concatenate([[True], np.logical_or.reduce(changes)]))


def find(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Places of `wanted` in the sorted `known`, -1 where absent."""
    if len(known) == 0:
        return np.full(len(wanted), -1)
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[place] == wanted, place, -1)
