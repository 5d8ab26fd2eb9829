"""From logits to next tokens: greedy or drawn, with the usual restrictions. R = rows, V = vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from step37_lit.errors import require


@dataclass(frozen=True)
class GenerationSettings:
    """How continuations are made.

    Args:
        max_new_tokens: Tokens of a continuation at most, its end token included.
        temperature: 0 takes the most likely token; above 0 tokens are drawn from softmax(logits / temperature).
        top_k: Draw among this many most likely tokens; None for all.
        top_p: Draw among the most likely tokens that have this probability together.
        num_beams: More than 1 searches for the continuation of the highest score.
        length_penalty: A beam's score is its log-probability / tokens ^ length_penalty.
        num_samples: Continuations of each prompt (with beams: the best ones).
        stop_strings: A continuation ends in front of the first of these.
        repetition_penalty: Logits of tokens that are there already, divided (positive ones) or multiplied by this
            (arXiv:1909.05858); 1 is off.
        no_repeat_ngram: No n-gram of this length comes twice; 0 is off.
        seed: Of drawing. A row's draws depend on it, the prompt's key and the number of the sample only.
        speculate: Tokens that MTP layers draft ahead, at most as many as the model has of them; the model keeps those
            that it would have chosen itself. It changes no token, only the time: it pays where layers were trained.

    Raises:
        ConfigError: names the field.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    num_samples: int = 1
    stop_strings: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    seed: int = 0
    speculate: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "num_samples"):
            require(getattr(self, name) > 0, name, "a positive number", getattr(self, name))
        require(self.temperature >= 0, "temperature", "0 (most likely token) or more", self.temperature)
        require(self.top_k is None or self.top_k > 0, "top_k", "null or a positive number", self.top_k)
        require(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        require(self.repetition_penalty > 0, "repetition_penalty", "a positive number", self.repetition_penalty)
        require(self.no_repeat_ngram >= 0, "no_repeat_ngram", "0 or more", self.no_repeat_ngram)
        require(self.speculate >= 0, "speculate", "0 (no drafts) or more", self.speculate)
        require(all(self.stop_strings), "stop_strings", "no empty string", self.stop_strings)
        if self.num_beams > 1:
            require(self.temperature == 0, "temperature", "0 with num_beams", self.temperature)
            require(self.speculate == 0, "speculate", "0 with num_beams", self.speculate)
            require(self.num_samples <= self.num_beams, "num_samples", "at most num_beams", self.num_samples)
        elif self.temperature == 0:
            require(self.num_samples == 1, "num_samples", "1 with temperature 0", self.num_samples)


def draws(settings: GenerationSettings, key: str, number: int) -> Tensor:
    """float64 [max_new_tokens] in [0, 1) for one row: whatever rows it shares a batch with."""
    digest = hashlib.sha256(f"{settings.seed} {number} {key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(settings.max_new_tokens, generator=generator, dtype=torch.float64)


def restricted(logits: Tensor, settings: GenerationSettings, histories: Sequence[Sequence[int]]) -> Tensor:
    """Logits [R, V] behind the limits on repetition; `histories` are all tokens of each row."""
    if settings.repetition_penalty == 1.0 and settings.no_repeat_ngram == 0:
        return logits
    logits = logits.clone()
    for row, history in enumerate(histories):
        if settings.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(history)), device=logits.device)
            values = logits[row, seen]
            penalty = settings.repetition_penalty
            logits[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
        banned = _completing(history, settings.no_repeat_ngram) if settings.no_repeat_ngram else []
        logits[row, banned] = -torch.inf
    return logits


def _completing(history: Sequence[int], n: int) -> list[int]:
    """Tokens that would make an n-gram which is there already."""
    start = list(history[len(history) - n + 1 :])
    return [history[i + n - 1] for i in range(len(history) - n + 1) if list(history[i : i + n - 1]) == start]


def choose(logits: Tensor, settings: GenerationSettings, uniform: Tensor) -> Tensor:
    """The next token of each row, int64 [R].

    Args:
        logits: fp32 [R, V].
        settings: Temperature, top_k, top_p.
        uniform: float64 [R] in [0, 1), this step's draw of each row.
    """
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    kept = logits.shape[-1] if settings.top_k is None else min(settings.top_k, logits.shape[-1])
    values, tokens = (logits / settings.temperature).double().topk(kept, dim=-1)
    probabilities = values.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # The most likely token always stays: nothing comes before it.
    probabilities = probabilities.masked_fill(before >= settings.top_p, 0.0)
    ends = probabilities.cumsum(dim=-1)
    target = uniform.to(ends.device)[:, None] * ends[:, -1:]
    places = torch.searchsorted(ends, target, right=True).clamp(max=kept - 1)
    return tokens.gather(1, places).squeeze(1)
