"""Beam search over the rows of one prompt: bookkeeping only, the model runs elsewhere.

A finished beam's score is log-probability / length ^ length_penalty, its end token counted. As in `transformers`, only
a candidate among the `num_beams` best of its step can finish, and the search for a prompt ends when its worst finished
beam is at least as good as what the best open one scores now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Beam:
    """A continuation.

    Args:
        tokens: Its tokens, an end token included.
        logprob: Sum of their log-probabilities.
        score: What beams are compared by.
        ended: Whether it ends with an end token or a stop string, and not for its length.
    """

    tokens: tuple[int, ...]
    logprob: float
    score: float
    ended: bool


@dataclass
class BeamSearch:
    """The search for one prompt.

    Args:
        num_beams: Open beams.
        max_new_tokens: Longest continuation.
        length_penalty: See above.
        end_tokens: Tokens that finish a beam.
    """

    num_beams: int
    max_new_tokens: int
    length_penalty: float
    end_tokens: tuple[int, ...]
    open: list[tuple[tuple[int, ...], float]] = field(default_factory=lambda: [((), 0.0)])
    finished: list[Beam] = field(default_factory=list)

    @property
    def candidates(self) -> int:
        """Continuations to look at in a step, so that `num_beams` stay open whichever of them end."""
        return max(2, 1 + len(self.end_tokens)) * self.num_beams

    def advance(
        self, logprobs: Tensor, is_stopped: Callable[[Sequence[int]], bool] | None = None
    ) -> tuple[list[int], list[int]]:
        """Takes the log-probabilities of what follows each open beam.

        Args:
            logprobs: fp32 [open beams, V].
            is_stopped: Function that tells of a tuple of tokens whether a stop string ends it; None for never.

        Returns:
            For each beam that stays open the number of the one that it continues, and its new token; both empty where
            the search is over.
        """
        sums = logprobs + torch.tensor([logprob for _, logprob in self.open], device=logprobs.device)[:, None]
        best, places = sums.flatten().topk(min(self.candidates, sums.numel()))
        parents, tokens = (places // sums.shape[1]).tolist(), (places % sums.shape[1]).tolist()
        opened: list[tuple[int, int, tuple[int, ...], float]] = []
        new: list[Beam] = []
        for rank, (logprob, parent, token) in enumerate(zip(best.tolist(), parents, tokens, strict=True)):
            sequence = (*self.open[parent][0], token)
            ended = token in self.end_tokens or (is_stopped is not None and is_stopped(sequence))
            if not ended and len(sequence) < self.max_new_tokens:
                opened.append((parent, token, sequence, logprob))
            elif rank < self.num_beams:
                new.append(Beam(sequence, logprob, logprob / len(sequence) ** self.length_penalty, ended))
        self.finished = sorted(self.finished + new, key=lambda beam: -beam.score)[: self.num_beams]
        opened = opened[: self.num_beams]
        if self._is_over(opened):
            self.open = []
            return [], []
        self.open = [(sequence, logprob) for _, _, sequence, logprob in opened]
        return [parent for parent, *_ in opened], [token for _, token, *_ in opened]

    def _is_over(self, opened: list[tuple[int, int, tuple[int, ...], float]]) -> bool:
        if not opened:
            return True
        if len(self.finished) < self.num_beams:
            return False
        _, _, sequence, logprob = opened[0]
        return self.finished[-1].score >= logprob / len(sequence) ** self.length_penalty
