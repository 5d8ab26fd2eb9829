"""Drafts of the MTP layers change no token: against decoding token by token, and their logits against full forwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from step37_lit.batch import PackedBatch, Sample
from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError
from step37_lit.generation import Completion, Generator
from step37_lit.hub.load import load_hub_model
from step37_lit.lit_module import with_overrides
from step37_lit.megatron.build import build_model
from step37_lit.megatron.inference import RowDecoder, inference_mode
from step37_lit.model.kv_cache import KVCache
from step37_lit.model.step37_model import Step37Model
from step37_lit.sampling import GenerationSettings
from step37_lit.tokenizer import Step37Tokenizer
from tests.parity.cases import Case
from tests.parity.mtp_compare import MTP, with_mtp
from tests.parity.mtp_oracle import build_mtp_oracle
from tests.parity.oracle import make_samples
from tests.training import MTP_TEXT, VISION, sample

pytestmark = pytest.mark.usefixtures("one_rank")
SEED = 17
# Uneven prompts with 0, 1 and 3 images, one shorter than a round of drafts, two longer than the window of 8.
SEGMENTS = ((5,), (3, "image", 20), (2, "image", 4, "crops", "image"), (1,))


@pytest.fixture(scope="module")
def tokenizer() -> Step37Tokenizer:
    return Step37Tokenizer.train(["a red dog runs over the green grass"] * 3, 300)


@pytest.fixture(scope="module", params=["experts", "dense"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_rank: None) -> Step37Model:
    print(f"seed {SEED}")
    folder: Path = tmp_path_factory.mktemp("model")
    experts = {} if request.param == "experts" else {"moe_layers_enum": ""}
    build_mtp_oracle(Case("prompts", MTP | experts, samples=SEGMENTS), folder, SEED)
    return load_hub_model(folder, config=with_mtp(Step37Config.from_hub(folder)))


@pytest.fixture
def prompts(model: Step37Model) -> list[Sample]:
    case = Case("prompts", MTP, samples=SEGMENTS)
    return [replace(p, loss_mask=torch.zeros(len(p))) for p in make_samples(case, model.step37.tokens, SEED)]


@pytest.fixture(scope="module")
def learnt(one_rank: None) -> tuple[Step37Model, list[Sample]]:
    """A model that was taught three texts, and the beginnings of these and of three others."""
    config = with_overrides(Step37Config.preset("tiny"), text=MTP_TEXT | {"mtp_loss_weight": 1.0}, vision=VISION)
    model = build_model(config, seed=SEED)
    samples = [replace(s, loss_mask=torch.ones(len(s))) for s in (sample(number, SEED) for number in range(6))]
    batch = PackedBatch.from_samples(samples[:3])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        model(**batch.model_inputs(), with_mtp=True).mean().backward()
        optimizer.step()
    return model, [Sample(s.key, s.input_ids[:5], torch.zeros(5), s.images) for s in samples]


def completions(
    model: Step37Model, tokenizer: Step37Tokenizer, prompts: list[Sample], **settings: Any
) -> tuple[list[list[Completion]], float]:
    generator = Generator(model, tokenizer)
    return generator.generate(prompts, GenerationSettings(**settings)), generator.tokens_per_step


def assert_same(found: list[list[Completion]], expected: list[list[Completion]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for own, other in zip(ours, theirs, strict=True):
            assert replace(own, logprob=0.0) == replace(other, logprob=0.0)
            assert own.logprob == pytest.approx(other.logprob, abs=2e-4)  # measured 2e-5


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "num_samples": 3, "seed": 4},
    {"repetition_penalty": 1.5, "no_repeat_ngram": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ", ".join(settings) or "greedy")
def test_the_tokens_are_those_of_decoding_one_by_one(
    model: Step37Model, prompts: list[Sample], tokenizer: Step37Tokenizer, settings: dict[str, Any]
) -> None:
    """Random weights accept next to nothing: every step takes drafts back. 30 tokens are almost four windows."""
    expected, steps = completions(model, tokenizer, prompts, max_new_tokens=30, **settings)
    assert steps == 1
    for depth in (1, 3):
        found, steps = completions(model, tokenizer, prompts, max_new_tokens=30, speculate=depth, **settings)
        print(f"{depth} drafts: {steps:.2f} tokens a step")
        assert_same(found, expected)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ", ".join(settings) or "greedy")
def test_what_was_learnt_takes_fewer_steps(
    learnt: tuple[Step37Model, list[Sample]], tokenizer: Step37Tokenizer, settings: dict[str, Any]
) -> None:
    """Rows take all drafts, some or none, and leave at different steps."""
    model, prompts = learnt
    expected, _ = completions(model, tokenizer, prompts, max_new_tokens=25, **settings)
    for depth in (1, 2):
        found, steps = completions(model, tokenizer, prompts, max_new_tokens=25, speculate=depth, **settings)
        print(f"{depth} drafts: {steps:.2f} tokens a step")
        assert 1.2 < steps < 1 + depth  # measured
        assert_same(found, expected)


def full_logits(model: Step37Model, prompt: Sample, tokens: list[int], place: int) -> torch.Tensor:
    """[heads, V] at a position of the prompt and the tokens behind it, by one forward without a cache."""
    ids = torch.cat([prompt.input_ids, torch.tensor(tokens)])
    batch = PackedBatch.from_samples([replace(prompt, input_ids=ids, loss_mask=torch.zeros(len(ids)))])
    return model(**batch.model_inputs(labels=False), with_mtp=True)[:, place]


def worst_of_rounds(model: Step37Model, prompts: list[Sample], depth: int, rounds: int = 12) -> float:
    """Largest difference of any head's logits from those of full forwards, by the largest logit.

    Each row keeps 0 to `depth` of its drafts in turn, right or wrong, and goes on with a random token.
    """
    random = torch.Generator().manual_seed(SEED)
    drafted: list[torch.Tensor] = []
    hooks = [
        layer.output_layer.register_forward_hook(lambda module, args, out: drafted.append(out[0][:, 0]))
        for layer in model.mtp.layers
    ]
    rows: list[list[int]] = [[] for _ in prompts]
    kept = [0] * len(prompts)
    worst = 0.0
    with inference_mode(model, rows=len(prompts) * (1 + depth)):
        decoder = RowDecoder(model, max(map(len, prompts)) + rounds * (1 + depth), depth)
        logits = decoder.prefill(PackedBatch.from_samples(prompts))[:, None]
        for turn in range(rounds):
            newest = torch.randint(10, 60, (len(rows),), generator=random)
            drafted.clear()
            drafts = decoder.draft(newest)
            ahead = list(drafted)
            for row, (prompt, tokens) in enumerate(zip(prompts, rows, strict=True)):
                found = torch.stack([logits[row, kept[row]], *(head[row] for head in ahead)])
                place = len(prompt) + len(tokens) - 1
                expected = full_logits(model, prompt, [*tokens, int(newest[row]), *drafts[row].tolist()], place)
                scale = expected.abs().amax(dim=1, keepdim=True)
                worst = max(worst, float(((found - expected[: 1 + depth]) / scale[: 1 + depth]).abs().max()))
            logits = decoder.step(torch.cat((newest[:, None], drafts), dim=1))
            kept = [(turn * (row + 1) + row) % (1 + depth) for row in range(len(rows))]
            decoder.take_back(torch.tensor([depth - count for count in kept]))
            for row, count in enumerate(kept):
                rows[row] += [int(newest[row]), *drafts[row, :count].tolist()]
    for hook in hooks:
        hook.remove()
    return worst


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_head_equals_a_full_forward(model: Step37Model, prompts: list[Sample], depth: int) -> None:
    """Measured: 2e-6."""
    worst = worst_of_rounds(model, prompts, depth)
    print(f"{depth} drafts: largest difference {worst:.1e} of the largest logit")
    assert worst <= 1e-5


MUTATIONS = {
    "wrong drafts stay in the cache": ("take_back", lambda self, counts: None),
    "sliding layers keep their window only": ("kept", lambda self, window: window or self.capacity),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mistakes_of_the_cache_are_noticed(
    learnt: tuple[Step37Model, list[Sample]], tokenizer: Step37Tokenizer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = learnt
    expected, _ = completions(model, tokenizer, prompts, max_new_tokens=25)
    monkeypatch.setattr(KVCache, *MUTATIONS[name])
    monkeypatch.setattr(KVCache, "capacity", property(lambda self: 200, lambda self, value: None), raising=False)
    assert worst_of_rounds(model, prompts, depth=2) > 1e-3
    found, _ = completions(model, tokenizer, prompts, max_new_tokens=25, speculate=2)
    assert [[c.tokens for c in each] for each in found] != [[c.tokens for c in each] for each in expected]


def test_more_than_is_remembered_is_not_taken_back(model: Step37Model, prompts: list[Sample]) -> None:
    with inference_mode(model):
        decoder = RowDecoder(model, 100, drafts=2)
        decoder.prefill(PackedBatch.from_samples(prompts[:2]))
        decoder.step(torch.ones(2, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"take_back: expected at most \[3, 3\] tokens, found \[1, 4\]"):
            decoder.take_back(torch.tensor([1, 4]))


def test_ends_stop_strings_and_streams(learnt: tuple[Step37Model, list[Sample]], tokenizer: Step37Tokenizer) -> None:
    """A row ends within its drafts as it ends without them."""
    model, prompts = learnt
    prompt, fast = prompts[0], GenerationSettings(max_new_tokens=12, speculate=2)
    generator = Generator(model, tokenizer)
    ((whole,),) = generator.generate([prompt], replace(fast, speculate=0))
    assert "".join(generator.stream(prompt, fast)) == whole.text
    assert generator.tokens_per_step > 1
    for length in range(1, 12):
        ((cut,),) = generator.generate([prompt], replace(fast, max_new_tokens=length))
        assert (cut.tokens, cut.finish) == (whole.tokens[:length], "length")
    for place in range(4, 9):
        stopping = replace(fast, stop_strings=(whole.text[place : place + 2],))
        ((plain,),) = generator.generate([prompt], replace(stopping, speculate=0))
        ((found,),) = generator.generate([prompt], stopping)
        assert (found.text, found.tokens, found.finish) == (plain.text, plain.tokens, "stop")
        assert "".join(generator.stream(prompt, stopping)) == plain.text


def test_refused(learnt: tuple[Step37Model, list[Sample]], tokenizer: Step37Tokenizer) -> None:
    model, prompts = learnt
    with pytest.raises(ConfigError, match="speculate: expected 0 \\(no drafts\\) or more, found -1"):
        GenerationSettings(speculate=-1)
    with pytest.raises(ConfigError, match="speculate: expected 0 with num_beams, found 2"):
        GenerationSettings(num_beams=3, speculate=2)
    with pytest.raises(ConfigError, match="speculate: expected at most 2 \\(MTP layers\\), found 3"):
        Generator(model, tokenizer).generate(prompts, GenerationSettings(speculate=3))
    plain = build_model(Step37Config.preset("tiny"))
    with pytest.raises(ConfigError, match="speculate: expected at most 0 \\(MTP layers\\), found 1"):
        Generator(plain, tokenizer).generate(prompts, GenerationSettings(speculate=1))
