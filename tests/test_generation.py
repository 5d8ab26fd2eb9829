"""Decoding with the cache: full forwards, generate of `transformers`, batches, samples, beams, streams."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from step37_lit.batch import PackedBatch, Sample
from step37_lit.beam_search import BeamSearch
from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError
from step37_lit.generation import Generator
from step37_lit.hub.load import load_hub_model
from step37_lit.megatron import matmul
from step37_lit.megatron.build import build_model
from step37_lit.megatron.inference import RowDecoder, inference_mode
from step37_lit.megatron.matmul import PACKED_ROWS
from step37_lit.model.step37_model import Step37Model
from step37_lit.sampling import GenerationSettings, choose, draws, restricted
from step37_lit.tokenizer import Step37Tokenizer
from tests.parity.cases import Case
from tests.parity.oracle import CLIP_MEAN, CLIP_STD, build_oracle, make_samples

pytestmark = pytest.mark.usefixtures("one_rank")
SEED = 31
# Uneven prompts with 0, 1 and 3 images, two of them longer than the window of 8.
PROMPTS = Case("prompts", samples=((5,), (3, "image", 20), (2, "image", 4, "crops", "image", 7), (1,)))


@pytest.fixture(scope="module")
def tokenizer() -> Step37Tokenizer:
    return Step37Tokenizer.train(["a red dog runs over the green grass"] * 3, 300)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    print(f"seed {SEED}")
    folder = tmp_path_factory.mktemp("oracle")
    return build_oracle(PROMPTS, folder, SEED), folder


@pytest.fixture
def model(oracle: tuple[Any, Path]) -> Step37Model:
    return load_hub_model(str(oracle[1]))


@pytest.fixture
def prompts(model: Step37Model) -> list[Sample]:
    return [replace(p, loss_mask=torch.zeros(len(p))) for p in make_samples(PROMPTS, model.step37.tokens, SEED)]


def extended(prompt: Sample, tokens: list[int]) -> PackedBatch:
    ids = torch.cat([prompt.input_ids, torch.tensor(tokens, dtype=torch.int64)])
    return PackedBatch.from_samples([replace(prompt, input_ids=ids, loss_mask=torch.zeros(len(ids)))])


def full_logits(model: Step37Model, prompt: Sample, tokens: list[int]) -> torch.Tensor:
    """[1 + tokens, V]: what follows the prompt and each token, by one forward without a cache."""
    with torch.no_grad():
        logits = model(**extended(prompt, tokens).model_inputs(labels=False))[0]
    return logits[len(prompt) - 1 :]


@pytest.mark.parametrize("rows", [PACKED_ROWS - 1, PACKED_ROWS])
def test_the_cache_equals_a_full_forward_at_every_step(
    model: Step37Model, prompts: list[Sample], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 steps, five windows, weights as they are and packed. Measured: 2e-6 of the largest logit."""
    monkeypatch.setattr(matmul, "PACKED_SIZE", 0)
    steps, tolerance = 40, 1e-5
    worst = 0.0
    with inference_mode(model, rows):
        decoder = RowDecoder(model, max(map(len, prompts)) + steps)
        logits = [decoder.prefill(PackedBatch.from_samples(prompts))]
        tokens: list[torch.Tensor] = []
        for _ in range(steps):
            tokens.append(logits[-1].argmax(-1))
            logits.append(decoder.step(tokens[-1][:, None])[:, 0])
    by_row = torch.stack(tokens, 1).tolist()
    for row, prompt in enumerate(prompts):
        expected = full_logits(model, prompt, by_row[row])
        found = torch.stack([step[row] for step in logits])
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
    print(f"largest difference {worst:.1e} of the largest logit (tolerance {tolerance:.0e})")
    assert worst <= tolerance


def test_nothing_of_inference_stays(model: Step37Model) -> None:
    before = {name: set(vars(part)) for name, part in model.named_modules()}
    with inference_mode(model, PACKED_ROWS):
        assert not torch.is_grad_enabled() and not model.training
        assert {name: set(vars(part)) for name, part in model.named_modules()} != before
    assert {name: set(vars(part)) for name, part in model.named_modules()} == before
    assert torch.is_grad_enabled() and model.training


def test_a_sliding_layer_keeps_its_window_only(model: Step37Model, prompts: list[Sample]) -> None:
    with inference_mode(model):
        decoder = RowDecoder(model, 100)
        decoder.prefill(PackedBatch.from_samples(prompts))
    kept = [keys.shape[1] for keys, _ in decoder.chunks[0][1]._layers.values()]
    assert kept == [100, 8, 8, 100]


def oracle_inputs(prompt: Sample, model: Step37Model) -> dict[str, torch.Tensor]:
    tokens = model.step37.tokens
    inputs: dict[str, Any] = {"input_ids": prompt.input_ids[None], "attention_mask": torch.ones(1, len(prompt))}
    views, crops, counts, waiting = [], [], [], 0
    for image in prompt.images:
        assert image.images is not None
        pixels = ((image.images.double() / 255 - CLIP_MEAN) / CLIP_STD).float()
        if image.insert_start_token == tokens.patch_start:
            crops.append(pixels)
            waiting = len(pixels)
        else:
            views.append(pixels)
            counts.append(waiting)
            waiting = 0
    if views:
        inputs["pixel_values"] = torch.cat(views)
    if crops:
        inputs |= {"pixel_values_local": torch.cat(crops), "num_local_patches": counts}
    return inputs


def oracle_generate(oracle: Any, prompt: Sample, model: Step37Model, **settings: Any) -> Any:
    tokens = model.step37.tokens
    with torch.no_grad():
        return oracle.generate(
            **oracle_inputs(prompt, model),
            do_sample=False,
            suppress_tokens=list(tokens.of_pictures),
            eos_token_id=list(tokens.eos) or None,
            pad_token_id=299,
            **settings,
        )


@pytest.mark.parametrize("ends", [False, True])
def test_greedy_tokens_are_those_of_transformers(
    oracle: tuple[Any, Path], model: Step37Model, prompts: list[Sample], tokenizer: Step37Tokenizer, ends: bool
) -> None:
    model = ending_early(model, prompts, tokenizer) if ends else model
    found = Generator(model, tokenizer).generate(prompts, GenerationSettings(max_new_tokens=24))
    for prompt, (completion,) in zip(prompts, found, strict=True):
        expected = oracle_generate(oracle[0], prompt, model, max_new_tokens=24)[0, len(prompt) :].tolist()
        assert list(completion.tokens) == expected
        assert completion.finish == ("stop" if expected[-1] in model.step37.tokens.eos else "length")
    assert ends == any(completion.finish == "stop" for (completion,) in found)


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("ends", [False, True])
def test_beams_score_as_those_of_transformers(
    oracle: tuple[Any, Path],
    model: Step37Model,
    prompts: list[Sample],
    tokenizer: Step37Tokenizer,
    length_penalty: float,
    ends: bool,
) -> None:
    model = ending_early(model, prompts, tokenizer) if ends else model
    settings = GenerationSettings(max_new_tokens=10, num_beams=3, length_penalty=length_penalty)
    found = Generator(model, tokenizer).generate(prompts, settings)
    for prompt, (completion,) in zip(prompts, found, strict=True):
        expected = oracle_generate(
            oracle[0],
            prompt,
            model,
            max_new_tokens=10,
            num_beams=3,
            length_penalty=length_penalty,
            return_dict_in_generate=True,
            output_scores=True,
        )
        score = completion.logprob / len(completion.tokens) ** length_penalty
        assert score == pytest.approx(float(expected.sequences_scores[0]), rel=1e-5)
        tokens = [token for token in expected.sequences[0, len(prompt) :].tolist() if token != 299]
        assert list(completion.tokens) == tokens


def ending(model: Step37Model, tokens: tuple[int, ...]) -> Step37Model:
    """The same model, for which other tokens end a turn: random weights seldom choose the real ones."""
    changed = copy.copy(model)
    changed.step37 = replace(model.step37, tokens=replace(model.step37.tokens, eos=tokens))
    return changed


def ending_early(model: Step37Model, prompts: list[Sample], tokenizer: Step37Tokenizer) -> Step37Model:
    found = Generator(model, tokenizer).generate(prompts, GenerationSettings(max_new_tokens=9))
    return ending(model, (found[0][0].tokens[5], found[1][0].tokens[8]))


def test_rows_that_end_leave_the_batch_and_change_nothing(
    model: Step37Model, prompts: list[Sample], tokenizer: Step37Tokenizer
) -> None:
    settings = GenerationSettings(max_new_tokens=30)
    (longest,) = Generator(model, tokenizer).generate(prompts[:1], settings)[0]
    model = ending(model, (longest.tokens[4], longest.tokens[9], 7))
    alone = [Generator(model, tokenizer).generate([prompt], settings)[0] for prompt in prompts]
    together = Generator(model, tokenizer).generate(prompts, settings)
    in_pairs = Generator(model, tokenizer, batch_size=2).generate(prompts, settings)
    lengths = {len(completion.tokens) for (completion,) in together}
    assert len(lengths) > 1
    for first, second, third in zip(alone, together, in_pairs, strict=True):
        assert first[0].tokens == second[0].tokens == third[0].tokens
        assert first[0].logprob == pytest.approx(second[0].logprob, abs=1e-4)


def test_samples_are_drawn_by_seed_whatever_the_batch(
    model: Step37Model, prompts: list[Sample], tokenizer: Step37Tokenizer
) -> None:
    settings = GenerationSettings(max_new_tokens=12, temperature=1.0, num_samples=3, seed=4)
    together = Generator(model, tokenizer).generate(prompts, settings)
    alone = [Generator(model, tokenizer).generate([prompt], settings)[0] for prompt in reversed(prompts)][::-1]
    assert [[c.tokens for c in each] for each in together] == [[c.tokens for c in each] for each in alone]
    assert all(len({c.tokens for c in each}) == 3 for each in together)
    other = Generator(model, tokenizer).generate(prompts, replace(settings, seed=5))
    assert [[c.tokens for c in each] for each in together] != [[c.tokens for c in each] for each in other]


def test_each_picture_is_encoded_once_for_several_samples(
    model: Step37Model, prompts: list[Sample], tokenizer: Step37Tokenizer
) -> None:
    assert model.vision_model is not None
    encoded: list[int] = []
    handle = model.vision_model.register_forward_hook(lambda module, args, out: encoded.append(len(args[0])))
    settings = GenerationSettings(max_new_tokens=5, temperature=0.7, num_samples=4)
    Generator(model, tokenizer, batch_size=64).generate(prompts, settings)
    handle.remove()
    assert sum(encoded) == sum(image.num_images for prompt in prompts for image in prompt.images)


def test_pictures_are_not_written(model: Step37Model, prompts: list[Sample], tokenizer: Step37Tokenizer) -> None:
    settings = GenerationSettings(max_new_tokens=60, temperature=5.0, num_samples=4)
    found = {t for each in Generator(model, tokenizer).generate(prompts, settings) for c in each for t in c.tokens}
    assert len(found) > 150
    assert not found & set(model.step37.tokens.of_pictures)


def test_draws_follow_the_restricted_distribution() -> None:
    """4,000 draws; the largest measured deviation is 0.012."""
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
    uniform = draws(GenerationSettings(max_new_tokens=4000, temperature=1.0), "key", 0)
    for settings, kept in (
        (GenerationSettings(temperature=1.0), [0, 1, 2, 3, 4]),
        (GenerationSettings(temperature=0.5), [0, 1, 2, 3, 4]),
        (GenerationSettings(temperature=1.0, top_k=2), [0, 1]),
        (GenerationSettings(temperature=1.0, top_p=0.7), [0, 1]),
        (GenerationSettings(temperature=1.0, top_p=0.01), [0]),
    ):
        tokens = choose(logits.expand(4000, -1), settings, uniform)
        shares = torch.bincount(tokens, minlength=5) / 4000
        allowed = torch.full((5,), -torch.inf)
        allowed[kept] = logits[0, kept] / settings.temperature
        assert (shares - allowed.softmax(-1)).abs().max() < 0.025, settings


def test_limits_on_repetition() -> None:
    logits = torch.tensor([[1.0, -1.0, 2.0, 0.5]])
    settings = GenerationSettings(repetition_penalty=2.0)
    assert restricted(logits, settings, [[0, 1, 0]]).tolist() == [[0.5, -2.0, 2.0, 0.5]]
    settings = GenerationSettings(no_repeat_ngram=2)
    assert restricted(logits, settings, [[2, 3, 1, 2]]).tolist() == [[1.0, -1.0, 2.0, -torch.inf]]
    assert restricted(logits, settings, [[2, 3, 1, 0]]).tolist() == logits.tolist()
    settings = GenerationSettings(no_repeat_ngram=1)
    assert restricted(logits, settings, [[2, 3]]).tolist() == [[1.0, -1.0, -torch.inf, -torch.inf]]


def test_no_ngram_comes_twice(model: Step37Model, prompts: list[Sample], tokenizer: Step37Tokenizer) -> None:
    for beams in (1, 3):
        settings = GenerationSettings(max_new_tokens=40, no_repeat_ngram=1, num_beams=beams)
        for (completion,) in Generator(model, tokenizer).generate(prompts[:2], settings):
            assert len(set(completion.tokens)) == len(completion.tokens) > 20


def test_stop_strings_and_streams(model: Step37Model, prompts: list[Sample], tokenizer: Step37Tokenizer) -> None:
    settings = GenerationSettings(max_new_tokens=40)
    generator = Generator(model, tokenizer)
    (whole,) = generator.generate(prompts[1:2], settings)[0]
    assert "".join(generator.stream(prompts[1], settings)) == whole.text
    pieces = list(generator.stream(prompts[1], settings))
    assert len(pieces) > 5
    stop = whole.text[len(whole.text) // 2 :][:3]
    stopping = replace(settings, stop_strings=("never there", stop))
    (stopped,) = generator.generate(prompts[1:2], stopping)[0]
    assert stopped.text == whole.text[: whole.text.index(stop)] and stopped.finish == "stop"
    assert len(stopped.tokens) < len(whole.tokens)
    assert "".join(generator.stream(prompts[1], stopping)) == stopped.text


def test_a_beam_search_by_hand() -> None:
    """Two beams over three tokens, of which 2 ends."""
    search = BeamSearch(num_beams=2, max_new_tokens=3, length_penalty=1.0, end_tokens=(2,))
    assert search.advance(torch.log(torch.tensor([[0.5, 0.3, 0.2]]))) == ([0, 0], [0, 1])
    # 0,2 has 0.5 x 0.9: it ends among the two best and scores ln(0.45) / 2; 1,0 has 0.3 x 0.8.
    parents, tokens = search.advance(torch.log(torch.tensor([[0.06, 0.04, 0.9], [0.8, 0.1, 0.1]])))
    assert (parents, tokens) == ([1, 0], [0, 0])
    assert [beam.tokens for beam in search.finished] == [(0, 2)]
    assert search.finished[0].score == pytest.approx(torch.log(torch.tensor(0.45)).item() / 2)
    assert search.advance(torch.log(torch.tensor([[0.1, 0.1, 0.8], [0.4, 0.3, 0.3]]))) == ([], [])
    assert [beam.tokens for beam in search.finished] == [(0, 2), (1, 0, 2)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected a positive number, found 0"),
        ({"temperature": -1.0}, "temperature: expected 0"),
        ({"top_p": 0.0}, r"top_p: expected in \(0, 1\]"),
        ({"top_k": 0}, "top_k"),
        ({"num_samples": 2}, "num_samples: expected 1 with temperature 0"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature: expected 0 with num_beams"),
        ({"num_beams": 2, "num_samples": 3}, "num_samples: expected at most num_beams"),
        ({"stop_strings": ("",)}, "stop_strings"),
    ],
)
def test_settings_that_cannot_be_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GenerationSettings(**changes)


def test_a_prompt_that_leaves_no_room_is_named(
    model: Step37Model, prompts: list[Sample], tokenizer: Step37Tokenizer
) -> None:
    with pytest.raises(ConfigError, match=r"prompt sample 0 \+ max_new_tokens: expected at most \d+ tokens, found"):
        Generator(model, tokenizer).generate(prompts, GenerationSettings(max_new_tokens=10_000_000))


def test_a_row_too_many_is_refused(model: Step37Model, prompts: list[Sample]) -> None:
    with inference_mode(model):
        decoder = RowDecoder(model, 40)
        decoder.prefill(PackedBatch.from_samples(prompts[:2]))
        with pytest.raises(ValueError, match="1 to 1 tokens for each of the 2 rows, found 3 sub-sequences"):
            decoder.step(torch.tensor([[1], [2], [3]]))
        with pytest.raises(ValueError, match="capacity 40"):
            for _ in range(20):
                decoder.step(torch.tensor([[1], [2]]))


def test_the_published_window_of_512_is_passed(tokenizer: Step37Tokenizer) -> None:
    """Prompts of 500 and 530 tokens, 40 steps. Measured: 1e-6 of the largest logit."""
    tiny = Step37Config.preset("tiny")
    model = build_model(replace(tiny, text=replace(tiny.text, sliding_window=512)), seed=SEED)
    generator = torch.Generator().manual_seed(SEED)
    rows = [torch.randint(12, 500, (length,), generator=generator) for length in (500, 530)]
    prompts = [Sample(str(len(row)), row, torch.zeros(len(row))) for row in rows]
    (first, second) = Generator(model, tokenizer).generate(prompts, GenerationSettings(max_new_tokens=40))
    for prompt, (completion,) in zip(prompts, (first, second), strict=True):
        expected = full_logits(model, prompt, list(completion.tokens))
        assert expected[:-1].argmax(-1).tolist() == list(completion.tokens)
        sums = expected[:-1].log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None]).sum()
        assert completion.logprob == pytest.approx(float(sums), abs=1e-3)
