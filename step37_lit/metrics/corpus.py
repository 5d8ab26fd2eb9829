"""What the caption metrics share: captions with their references as state that gathers well, and the torchmetrics side.

A metric keeps text, not counts: CIDEr-D's document frequencies and the rule that a key counts once need the whole
split. The text is a list of uint8 buffers of JSON, one line an update, so that putting corpora together (batches,
ranks, `merge_state`) is concatenation, and buffers of different lengths gather as torchmetrics pads them.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from step37_lit.errors import ConfigError, require
from step37_lit.metrics.ngrams import CorpusNgrams
from step37_lit.metrics.ptb import ptb_tokenize

Tokenizer = Literal["ptb"] | None
Key = str | int


@dataclass(frozen=True)
class Corpus:
    """Captions and references, tokenized: tokens are what white space separates.

    Nothing of it changes once it is read.

    Args:
        keys: Id of each item, None where it was given without.
        candidates: One caption for each item.
        references: One or more references for each item.
    """

    keys: list[Key | None]
    candidates: list[str]
    references: list[list[str]]

    def __len__(self) -> int:
        return len(self.candidates)

    def to_bytes(self) -> bytes:
        """One line of JSON: [[key, candidate, references], ...]."""
        return json.dumps(list(zip(self.keys, self.candidates, self.references, strict=True))).encode() + b"\n"

    @cached_property
    def ngrams(self) -> CorpusNgrams:
        return CorpusNgrams(self.candidates, self.references)


@lru_cache(maxsize=1)
def read_corpus(data: bytes) -> Corpus:
    """Reads lines of `Corpus.to_bytes`, in order; of items with the same key the first.

    The last one is kept, until a metric is reset: metrics of one split hold the same text and share its n-grams.

    Raises:
        ConfigError: two items with the same key differ.
    """
    corpus = Corpus([], [], [])
    seen: dict[Key, tuple[str, list[str]]] = {}
    for key, candidate, references in chain.from_iterable(map(json.loads, data.splitlines())):
        item = (candidate, references)
        if key is not None and seen.setdefault(key, item) is not item:
            expected = f"the same caption and references wherever the key is given, {seen[key]}"
            require(seen[key] == item, f"item {key!r}", expected, item)
            continue
        corpus.keys.append(key)
        corpus.candidates.append(candidate)
        corpus.references.append(references)
    return corpus


def tokenized(sentences: Iterable[str], tokenizer: Tokenizer) -> list[str]:
    """Sentences with spaces between their tokens."""
    return list(sentences) if tokenizer is None else [" ".join(ptb_tokenize(sentence)) for sentence in sentences]


def check_tokenizer(tokenizer: Tokenizer) -> None:
    require(tokenizer in ("ptb", None), "tokenizer", "'ptb' or None (strings are tokenized already)", tokenizer)


def check_references(name: str, references: object) -> None:
    """Raises `ConfigError` unless `references` is a list of one or more strings."""
    if not isinstance(references, Sequence) or isinstance(references, (str, bytes)):
        raise ConfigError(name, "a list of reference strings", references)
    require(len(references) > 0, name, "one or more references", references)
    for i, reference in enumerate(references):
        require(isinstance(reference, str), f"{name}[{i}]", "a string", reference)


def _gather_bytes(buffer: Tensor, group: Any = None) -> list[Tensor]:
    """Buffers of all ranks. A rank that saw nothing comes with an empty float tensor, which must not set the type."""
    return gather_all_tensors(buffer.to(torch.uint8), group)


class CaptionMetric(Metric):
    """Base of the caption metrics.

    In a `MetricCollection` say `compute_groups=False`: metrics of one tokenizer hold the same text, metrics of
    different ones do too where a first batch has no capitals and no punctuation, and then torchmetrics would share
    one state between them, on some ranks and not on others.

    Args:
        tokenizer: "ptb" for `ptb_tokenize`, None for strings that are tokenized already.
        **kwargs: Arguments of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    records: list[Tensor]

    def __init__(self, tokenizer: Tokenizer = "ptb", **kwargs: Any):
        super().__init__(**{"dist_sync_fn": _gather_bytes, **kwargs})
        check_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.add_state("records", default=[], dist_reduce_fx="cat", persistent=True)

    def update(self, preds: Sequence[str], target: Sequence[Sequence[str]], keys: Sequence[Key] | None = None) -> None:
        """Adds items.

        Args:
            preds: One generated caption for each item.
            target: The references of each item, one or more.
            keys: Id of each item in the split. An item whose key was given before, by any rank, counts once.

        Raises:
            ConfigError: lengths differ, an item has no reference, or a value is no string; nothing was added then.
        """
        _check_items(preds, target, keys)
        candidates = tokenized(preds, self.tokenizer)
        references = [tokenized(item, self.tokenizer) for item in target]
        corpus = Corpus([None] * len(preds) if keys is None else list(keys), candidates, references)
        self.records.append(torch.frombuffer(bytearray(corpus.to_bytes()), dtype=torch.uint8).to(self.device))

    def reset(self) -> None:
        super().reset()
        read_corpus.cache_clear()

    def compute(self) -> Tensor:
        """Score of the corpus over all ranks, float64."""
        return torch.as_tensor(self._scores(self._corpus())[0], dtype=torch.float64, device=self.device)

    def per_item(self) -> tuple[list[Key | None], Tensor]:
        """Keys and scores of the items of all ranks, in the order of ranks and updates; every rank must call it.

        The scores have the shape of `compute` behind a first dimension of items, float64.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            corpus = self._corpus()
        return list(corpus.keys), torch.as_tensor(self._scores(corpus)[1], dtype=torch.float64, device=self.device)

    def _corpus(self) -> Corpus:
        data = dim_zero_cat(self.records).cpu().numpy().tobytes() if len(self.records) else b""
        try:
            corpus = read_corpus(data)
            require(len(corpus) > 0, type(self).__name__, "one or more items before its score is asked for", 0)
        except ConfigError:
            self.unsync(should_unsync=self._is_synced)  # torchmetrics would keep what was gathered, and fail at reset
            raise
        return corpus

    @abstractmethod
    def _scores(self, corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the corpus and of each item."""


def _check_items(preds: Sequence[str], target: Sequence[Sequence[str]], keys: Sequence[Key] | None) -> None:
    for name, value in (("preds", preds), ("target", target)):
        require(isinstance(value, Sequence) and not isinstance(value, str), name, "a list, one entry an item", value)
    require(len(target) == len(preds), "target", f"{len(preds)} entries, as preds", len(target))
    for i, (caption, references) in enumerate(zip(preds, target, strict=True)):
        require(isinstance(caption, str), f"preds[{i}]", "a string", caption)
        check_references(f"target[{i}]", references)
    if keys is None:
        return
    require(len(keys) == len(preds), "keys", f"{len(preds)} entries, as preds", len(keys))
    for i, key in enumerate(keys):
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            raise ConfigError(f"keys[{i}]", "a string or an integer", key)
