"""Continuing prompts: batches of rows with a KV cache on the model that is trained.

    prompts -> prefill (one pack, each picture encoded once) -> a step for all open rows, again and again -> completions

A step gives each row one token. Where MTP layers draft further ones, the model sees those in the same step, and a row
takes them as far as they are what it would have chosen: the same tokens in fewer steps.

Under tensor, pipeline and expert parallelism every rank of the model calls the same methods, and every rank of a
model-parallel group gets the same completions. Data-parallel ranks each have prompts of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from step37_lit.batch import PackedBatch, Sample
from step37_lit.beam_search import BeamSearch
from step37_lit.errors import require
from step37_lit.megatron.chunks import ModelChunks, chunks_of
from step37_lit.megatron.inference import RowDecoder, any_expert_rank, idle, inference_mode
from step37_lit.model.step37_model import Step37Model
from step37_lit.sampling import GenerationSettings, choose, draws, restricted
from step37_lit.tokenizer import Step37Tokenizer


@dataclass(frozen=True)
class Completion:
    """What follows a prompt.

    Args:
        key: The prompt's.
        text: Without end token and stop string.
        tokens: Every new token, the end token included.
        logprob: Sum of the tokens' log-probabilities under the model.
        finish: `stop` for an end token or a stop string, `length` where `max_new_tokens` was reached.
    """

    key: str
    text: str
    tokens: tuple[int, ...]
    logprob: float
    finish: Literal["stop", "length"]


@dataclass
class _Row:
    """An open row."""

    prompt: int
    number: int  # among the samples of its prompt
    draws: Tensor
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0


class Generator:
    """Continues prompts.

    Args:
        model: This rank's part, on its device.
        tokenizer: Spells the tokens.
        batch_size: Rows that are decoded together (prompts x samples or beams).

    Attributes:
        tokens_per_step: That a row of this rank took on average so far, its first token left out; 1 without drafts, nan
            where there was no step (beams do not count).
    """

    def __init__(self, model: Step37Model | ModelChunks, tokenizer: Step37Tokenizer, batch_size: int = 16):
        require(batch_size > 0, "batch_size", "a positive number", batch_size)
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.config = chunks_of(model)[0].step37
        self.end_tokens = self.config.tokens.eos
        self._device = next(model.parameters()).device
        self._tokens = self._steps = 0  # of all rows, behind the first token

    @property
    def tokens_per_step(self) -> float:
        return self._tokens / self._steps if self._steps else math.nan

    def generate(
        self,
        prompts: Sequence[Sample],
        settings: GenerationSettings | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Continues each prompt.

        Args:
            prompts: From `Step37Processor.prompt`; ranks that share experts may have different numbers of them.
            settings: Default: the most likely tokens, at most 64.
            on_done: Called with the number of prompts that are done, for a progress bar.

        Returns:
            For each prompt its `num_samples` completions, the best first where beams were searched.
        """
        settings = settings or GenerationSettings()
        self._check(prompts, settings)
        rows_each = max(settings.num_samples, settings.num_beams)
        size = max(1, self.batch_size // rows_each)
        batches = [prompts[first : first + size] for first in range(0, len(prompts), size)]
        done: list[list[Completion]] = []
        with inference_mode(self.model, rows=min(size, len(prompts)) * rows_each * (1 + settings.speculate)):
            while any_expert_rank(len(batches) > 0):
                batch = batches.pop(0) if batches else []
                done += self._finish(batch, settings)
                if on_done is not None:
                    on_done(len(done))
        return done

    def stream(self, prompt: Sample, settings: GenerationSettings | None = None) -> Iterator[str]:
        """Continues one prompt and yields its text piece by piece; without beams and with one sample."""
        settings = settings or GenerationSettings()
        require(
            settings.num_beams == 1 and settings.num_samples == 1, "num_beams, num_samples", "1 to stream", settings
        )
        self._check([prompt], settings)
        shown = ""
        with inference_mode(self.model, rows=1 + settings.speculate):
            for row, ended in self._rows([prompt], settings):
                text, stopped = self._text(row.tokens, settings.stop_strings)
                # An unfinished character, or the beginning of a stop string, is not shown yet.
                stable = text if ended or stopped else text[: _stable_length(text, settings.stop_strings)]
                if len(stable) > len(shown):
                    yield stable[len(shown) :]
                    shown = stable

    def _check(self, prompts: Sequence[Sample], settings: GenerationSettings) -> None:
        layers = self.config.text.num_built_mtp_layers
        require(settings.speculate <= layers, "speculate", f"at most {layers} (MTP layers)", settings.speculate)
        limit = self.config.text.max_position
        for prompt in prompts:
            total = len(prompt) + settings.max_new_tokens
            require(total <= limit, f"prompt {prompt.key} + max_new_tokens", f"at most {limit} tokens", total)

    def _finish(self, batch: Sequence[Sample], settings: GenerationSettings) -> list[list[Completion]]:
        if settings.num_beams > 1:
            return self._beams(batch, settings)
        found: list[list[Completion | None]] = [[None] * settings.num_samples for _ in batch]
        for row, ended in self._rows(batch, settings):
            if ended:
                found[row.prompt][row.number] = self._completion(batch[row.prompt], row, settings)
        assert all(completion is not None for each in found for completion in each), "a row without an end"
        return found  # type: ignore[return-value]

    def _rows(self, batch: Sequence[Sample], settings: GenerationSettings) -> Iterator[tuple[_Row, bool]]:
        """Each row behind each of its steps, and whether that was its last one."""
        rows: list[_Row] = []
        decoder, logits = self._begin(batch, settings)
        logits = logits[:, None]
        drafts: list[list[int]] = []
        if decoder is not None:
            repeats = torch.arange(len(batch), device=self._device).repeat_interleave(settings.num_samples)
            if settings.num_samples > 1:
                decoder.select(repeats)
                logits = logits[repeats]
            numbers = [divmod(i, settings.num_samples) for i in range(len(repeats))]
            rows = [_Row(prompt, number, draws(settings, batch[prompt].key, number)) for prompt, number in numbers]
            drafts = [[]] * len(rows)
        while True:
            open_rows: list[int] = []
            wrong: list[int] = []  # drafts of these
            if rows:
                for place, (count, ended) in enumerate(self._add_tokens(rows, drafts, logits, batch, settings)):
                    yield rows[place], ended
                    if not ended:
                        open_rows.append(place)
                        wrong.append(1 + len(drafts[place]) - count)
            if not any_expert_rank(bool(open_rows)):
                return
            if not open_rows:
                rows = []
                idle(self.model)
                continue
            assert decoder is not None
            if len(open_rows) < len(rows):  # finished rows leave the batch
                decoder.select(torch.tensor(open_rows, device=self._device))
                rows = [rows[place] for place in open_rows]
            logits, drafts = self._step(decoder, [row.tokens[-1] for row in rows], wrong)

    def _step(self, decoder: RowDecoder, tokens: list[int], wrong: list[int]) -> tuple[Tensor, list[list[int]]]:
        """Logits [R, 1 + drafts, V] behind each row's last token and behind its drafts, and the drafts.

        Args:
            decoder: Of the open rows.
            tokens: Last token of each row.
            wrong: Drafts of the step before that each row did not take.
        """
        newest = torch.tensor(tokens, device=self._device)
        if not decoder.num_drafts:
            return decoder.step(newest[:, None]), [[]] * len(tokens)
        decoder.take_back(torch.tensor(wrong))
        drafts = decoder.draft(newest)
        return decoder.step(torch.cat((newest[:, None], drafts), dim=1)), drafts.tolist()

    def _begin(self, batch: Sequence[Sample], settings: GenerationSettings) -> tuple[RowDecoder | None, Tensor]:
        """Runs the prompts; a rank without any takes part in the others' experts."""
        if not batch:
            idle(self.model)
            return None, torch.empty(0, 0)
        capacity = max(len(prompt) for prompt in batch) + settings.max_new_tokens + settings.speculate
        decoder = RowDecoder(self.model, capacity, settings.speculate)
        return decoder, decoder.prefill(PackedBatch.from_samples(batch).to(self._device))

    def _add_tokens(
        self,
        rows: Sequence[_Row],
        drafts: Sequence[list[int]],
        logits: Tensor,
        batch: Sequence[Sample],
        settings: GenerationSettings,
    ) -> list[tuple[int, bool]]:
        """Chooses each row's tokens as far as its drafts are right; says how many, and whether that ends the row."""
        histories: list[list[int]] = []
        if settings.repetition_penalty != 1.0 or settings.no_repeat_ngram:
            for row, draft in zip(rows, drafts, strict=True):
                history = batch[row.prompt].input_ids.tolist() + row.tokens
                histories += [history + draft[:count] for count in range(1 + len(draft))]
        steps = torch.arange(logits.shape[1])
        # Behind the last token that a row may have there is nothing to draw; what is chosen there is not taken.
        uniform = torch.cat([row.draws[(len(row.tokens) + steps).clamp(max=len(row.draws) - 1)] for row in rows])
        flat = logits.flatten(0, 1)
        tokens = choose(self._allowed(flat, settings, histories), settings, uniform)
        logprobs = flat.gather(1, tokens[:, None]).squeeze(1) - flat.logsumexp(dim=-1)
        chosen, sums = tokens.view(logits.shape[:2]).tolist(), logprobs.view(logits.shape[:2]).tolist()
        return [self._add(*each, settings) for each in zip(rows, drafts, chosen, sums, strict=True)]

    def _add(
        self, row: _Row, draft: list[int], tokens: list[int], logprobs: list[float], settings: GenerationSettings
    ) -> tuple[int, bool]:
        """`_add_tokens` of one row: the token behind a draft counts if the draft is what was chosen there."""
        first = not row.tokens
        for count, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True), start=1):
            row.tokens.append(token)
            row.logprob += logprob
            stopped = token in self.end_tokens or self._is_stopped(row.tokens, settings.stop_strings)
            ended = stopped or len(row.tokens) == settings.max_new_tokens
            if ended or count > len(draft) or draft[count - 1] != token:
                break
        if not first:
            self._tokens, self._steps = self._tokens + count, self._steps + 1
        return count, ended

    def _allowed(self, logits: Tensor, settings: GenerationSettings, histories: Sequence[Sequence[int]]) -> Tensor:
        places = torch.tensor(self.config.tokens.of_pictures, device=logits.device)
        return restricted(logits, settings, histories).index_fill(1, places, -torch.inf)

    def _beams(self, batch: Sequence[Sample], settings: GenerationSettings) -> list[list[Completion]]:
        searches = [
            BeamSearch(settings.num_beams, settings.max_new_tokens, settings.length_penalty, self.end_tokens)
            for _ in batch
        ]
        is_stopped = (lambda tokens: self._is_stopped(tokens, settings.stop_strings)) if settings.stop_strings else None
        decoder, logits = self._begin(batch, settings)
        while True:
            chosen, tokens, first = [], [], 0
            for prompt, search in enumerate(searches):
                if not search.open:
                    continue
                own = logits[first : first + len(search.open)]
                histories = [batch[prompt].input_ids.tolist() + list(tokens) for tokens, _ in search.open]
                own = self._allowed(own.log_softmax(dim=-1), settings, histories)
                count = len(search.open)
                parents, new = search.advance(own, is_stopped)
                chosen += [first + parent for parent in parents]
                tokens += new
                first += count
            if not any_expert_rank(bool(tokens)):
                break
            if not tokens:
                idle(self.model)
                continue
            assert decoder is not None
            decoder.select(torch.tensor(chosen, device=self._device))
            logits = decoder.step(torch.tensor(tokens, device=self._device)[:, None])[:, 0]
        return [self._best(prompt, search, settings) for prompt, search in zip(batch, searches, strict=True)]

    def _best(self, prompt: Sample, search: BeamSearch, settings: GenerationSettings) -> list[Completion]:
        return [
            Completion(
                prompt.key,
                self._text(beam.tokens, settings.stop_strings)[0],
                beam.tokens,
                beam.logprob,
                "stop" if beam.ended else "length",
            )
            for beam in search.finished[: settings.num_samples]
        ]

    def _completion(self, prompt: Sample, row: _Row, settings: GenerationSettings) -> Completion:
        text, stopped = self._text(row.tokens, settings.stop_strings)
        finish: Literal["stop", "length"] = "stop" if stopped or row.tokens[-1] in self.end_tokens else "length"
        return Completion(prompt.key, text, tuple(row.tokens), row.logprob, finish)

    def _text(self, tokens: Sequence[int], stop_strings: Sequence[str]) -> tuple[str, bool]:
        """Text in front of the first stop string, and whether there is one."""
        text = self.tokenizer.decode([token for token in tokens if token not in self.end_tokens])
        found = [place for place in (text.find(stop) for stop in stop_strings) if place >= 0]
        return (text[: min(found)], True) if found else (text, False)

    def _is_stopped(self, tokens: Sequence[int], stop_strings: Sequence[str]) -> bool:
        return bool(stop_strings) and self._text(tokens, stop_strings)[1]


def _stable_length(text: str, stop_strings: Sequence[str]) -> int:
    """Characters that no further token can change or turn into the beginning of a stop string."""
    length = len(text.rstrip("\ufffd"))
    for stop in stop_strings:
        for size in range(min(len(stop) - 1, length), 0, -1):
            if text[:length].endswith(stop[:size]):
                length -= size
                break
    return length
