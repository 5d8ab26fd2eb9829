"""The caption metrics in plain Python, from their definitions, for the tests: no array, no cleverness, per item."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple


class Item(NamedTuple):
    caption: str
    references: list[str]


def ngrams(sentence: str, n: int) -> Counter:
    tokens = sentence.split()
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def bleu_counts(item: Item) -> tuple[list[int], list[int], int, int]:
    """Correct and guessed n-grams for n = 1..4, the length, the closest reference's length."""
    correct, guess = [], []
    for n in range(1, 5):
        of_references = [ngrams(reference, n) for reference in item.references]
        counts = ngrams(item.caption, n)
        correct.append(sum(min(c, max(other[gram] for other in of_references)) for gram, c in counts.items()))
        guess.append(sum(counts.values()))
    length = len(item.caption.split())
    closest = min((len(reference.split()) for reference in item.references), key=lambda r: (abs(r - length), r))
    return correct, guess, length, closest


def bleu_of(correct: list[int], guess: list[int], length: int, closest: int) -> list[float]:
    scores, product = [], 1.0
    ratio = (length + 1e-15) / (closest + 1e-9)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    for n in range(4):
        product *= (correct[n] + 1e-15) / (guess[n] + 1e-9)
        scores.append(product ** (1 / (n + 1)) * penalty)
    return scores


def bleu(items: list[Item]) -> tuple[list[float], list[list[float]]]:
    counts = [bleu_counts(item) for item in items]
    pooled = [[sum(row[k][n] for row in counts) for n in range(4)] for k in (0, 1)]
    corpus = bleu_of(*pooled, sum(row[2] for row in counts), sum(row[3] for row in counts))
    return corpus, [bleu_of(*row) for row in counts]


def lcs(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def rouge_l(items: list[Item]) -> tuple[float, list[float]]:
    scores = []
    for item in items:
        tokens = item.caption.split(" ")
        others = [reference.split(" ") for reference in item.references]
        precision = max(lcs(tokens, other) / len(tokens) for other in others)
        recall = max(lcs(tokens, other) / len(other) for other in others)
        scores.append(2.44 * precision * recall / (recall + 1.44 * precision) if precision else 0.0)
    return sum(scores) / len(scores), scores


def cider_d(items: list[Item]) -> tuple[float, list[float]]:
    frequency: Counter = Counter()
    for item in items:
        frequency.update({gram for reference in item.references for n in range(1, 5) for gram in ngrams(reference, n)})

    def weights(sentence: str, n: int) -> dict:
        idf = {gram: math.log(len(items)) - math.log(max(1, frequency[gram])) for gram in ngrams(sentence, n)}
        return {gram: count * idf[gram] for gram, count in ngrams(sentence, n).items()}

    def similarity(caption: str, reference: str, n: int) -> float:
        c, r = weights(caption, n), weights(reference, n)
        value = sum(min(c[gram], r[gram]) * r[gram] for gram in c if gram in r)
        norm = math.sqrt(sum(w * w for w in c.values())) * math.sqrt(sum(w * w for w in r.values()))
        delta = sum(ngrams(caption, 2).values()) - sum(ngrams(reference, 2).values())
        return (value / norm if norm else value) * math.exp(-(delta**2) / 72)

    scores = []
    for item in items:
        values = [similarity(item.caption, reference, n) for reference in item.references for n in range(1, 5)]
        scores.append(10 * sum(values) / len(values))
    return sum(scores) / len(scores), scores
