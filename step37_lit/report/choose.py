"""Samples for the gallery: the best, the worst and the most changed ones by CIDEr-D."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from step37_lit.report.read import Caption, Validation

PER_GROUP = 4
SHOWN = 5  # validations of a card that are open; the first and the last are among them
# Words, and the characters of scripts that have no spaces between words.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


@dataclass(frozen=True)
class Attempt:
    """A caption of one validation.

    Args:
        step: Of the validation.
        caption: The caption and its scores.
        pieces: Its text, each piece with whether it is a word that no reference has.
    """

    step: int
    caption: Caption
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Card:
    """A sample.

    Args:
        key: The sample's key.
        references: Of the last validation.
        shown: Captions of the first, of the last, and of evenly spread validations between them.
        hidden: The other ones.
        change: CIDEr-D of the last one less that of the first.
    """

    key: str
    references: tuple[str, ...]
    shown: tuple[Attempt, ...]
    hidden: tuple[Attempt, ...]
    change: float


@dataclass(frozen=True)
class Group:
    """Samples that are shown for one reason; none is in two groups."""

    title: str
    cards: tuple[Card, ...]


def choose(validations: Sequence[Validation], per_group: int = PER_GROUP) -> list[Group]:
    """Groups of samples of the last validation; of equals the ones that come first in it. Empty groups are left out.

    Args:
        validations: Of one split, in the order of their steps; at least one.
        per_group: Samples of each group.
    """
    last = [caption.key for caption in validations[-1].captions]
    histories = {key: [] for key in last}  # type: dict[str, list[tuple[int, Caption]]]
    for validation in validations:
        for caption in validation.captions:
            if caption.key in histories:
                histories[caption.key].append((validation.step, caption))
    changes = {key: abs(_change(history)) for key, history in histories.items()}
    score = {key: history[-1][1].cider_d for key, history in histories.items()}
    orders = {
        "Best": sorted(last, key=lambda key: -score[key]),
        "Worst": sorted(last, key=lambda key: score[key]),
        "Most changed": sorted((key for key in last if changes[key] > 0), key=lambda key: -changes[key]),
    }
    taken: set[str] = set()
    groups = []
    for title, order in orders.items():
        keys = [key for key in dict.fromkeys(order) if key not in taken][:per_group]
        taken.update(keys)
        if keys:
            groups.append(Group(title, tuple(_card(key, histories[key]) for key in keys)))
    return groups


def unknown_words(caption: str, references: Sequence[str]) -> tuple[tuple[str, bool], ...]:
    """The caption in pieces, each with whether it is a word that no reference has."""
    known = {word.casefold() for reference in references for word in WORD.findall(reference)}
    pieces: list[tuple[str, bool]] = []
    end = 0
    for match in WORD.finditer(caption):
        if match[0].casefold() not in known:
            pieces += [(caption[end : match.start()], False), (match[0], True)]
            end = match.end()
    return tuple(piece for piece in (*pieces, (caption[end:], False)) if piece[0])


def _card(key: str, history: list[tuple[int, Caption]]) -> Card:
    references = history[-1][1].references
    attempts = [Attempt(step, caption, unknown_words(caption.caption, references)) for step, caption in history]
    count = min(SHOWN, len(attempts))
    shown = {round(i * (len(attempts) - 1) / max(1, count - 1)) for i in range(count)}
    return Card(
        key=key,
        references=references,
        shown=tuple(attempt for i, attempt in enumerate(attempts) if i in shown),
        hidden=tuple(attempt for i, attempt in enumerate(attempts) if i not in shown),
        change=_change(history),
    )


def _change(history: list[tuple[int, Caption]]) -> float:
    return history[-1][1].cider_d - history[0][1].cider_d
