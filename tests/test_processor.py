"""Tokenizer and processor: special tokens, loss mask over turns, image spans, attribute words, templates, bad input."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from step37_lit.batch import PackedBatch
from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError
from step37_lit.presets import TINY_TOKENS as TOKENS
from step37_lit.processor import Step37Processor
from step37_lit.tokenizer import IMAGE_PATCH, SPECIAL_TOKENS, TURN_END, TURN_START, Step37Tokenizer

TEXTS = ["a large red circle, top left.", "two shapes: a blue ring and a café", "user", "assistant", "system"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Step37Tokenizer:
    return Step37Tokenizer.train(TEXTS, vocab_size=400)


@pytest.fixture(scope="module")
def config() -> Step37Config:
    return Step37Config.preset("tiny")


@pytest.fixture(scope="module")
def processor(tokenizer, config) -> Step37Processor:
    return Step37Processor(tokenizer, config)


def picture(color=(250, 0, 10), size=(50, 30)) -> Image.Image:
    return Image.new("RGB", size, color)


def user(*parts: str | None) -> dict:
    """A user turn; None stands for a picture."""
    return {"role": "user", "content": [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def learnt_text(tokenizer, sample) -> str:
    return tokenizer.decode(sample.input_ids[sample.loss_mask.bool()].tolist(), skip_special=False)


def test_special_tokens_come_first_and_match_the_preset(tokenizer, config):
    assert [tokenizer.special_ids[name] for name in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    tokenizer.check_ids(config.tokens, config.text.vocab_size)


def test_training_is_deterministic_between_processes(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "here.json")
    program = (
        "import sys; from step37_lit.tokenizer import Step37Tokenizer;"
        f"Step37Tokenizer.train({TEXTS!r}, vocab_size=400).save(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "there.json")], check=True)
    assert (tmp_path / "here.json").read_bytes() == (tmp_path / "there.json").read_bytes()
    again = Step37Tokenizer.from_file(tmp_path / "here.json")
    assert again.encode("a red ring") == tokenizer.encode("a red ring")


@pytest.mark.parametrize("text", ["a red circle", "café ☕ \n\n  tab\t", "<im_patch><|im_end|> naïve", ""])
def test_any_text_survives_as_ordinary_tokens(tokenizer, text):
    ids, offsets = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_ids.values()) and len(ids) == len(offsets)


def test_a_tokenizer_without_a_special_token_is_named(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    content = json.loads(path.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != IMAGE_PATCH]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"tokenizer.json: .*<im_patch>"):
        Step37Tokenizer.from_file(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer.json: tokenizer: expected a tokenizer.json"):
        Step37Tokenizer.from_file(path)
    with pytest.raises(ConfigError, match=r"expected a file"):
        Step37Tokenizer.from_file(tmp_path / "absent.json")


def test_ids_that_differ_from_the_model_are_refused(tokenizer, config):
    other = dataclasses.replace(config, tokens=dataclasses.replace(TOKENS, im_start=200))
    with pytest.raises(ConfigError, match=r"id of <im_start>: expected 200 .* found 3"):
        Step37Processor(tokenizer, other)
    small = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=100))
    with pytest.raises(ConfigError, match=r"at most text.vocab_size 100"):
        Step37Processor(tokenizer, small)


def test_every_assistant_turn_is_learnt_and_nothing_else(processor, tokenizer):
    messages = [
        {"role": "system", "content": "be short"},
        user("what?"),
        assistant("a red circle"),
        user("and?"),
        assistant("a ring"),
    ]
    sample = processor(messages)
    assert learnt_text(tokenizer, sample) == f"a red circle{TURN_END}a ring{TURN_END}"
    whole = tokenizer.decode(sample.input_ids.tolist(), skip_special=False)
    expected = [
        f"{TURN_START}{m['role']}\n{m['content']}{TURN_END}\n" for m in messages if isinstance(m["content"], str)
    ]
    assert all(turn in whole for turn in expected) and whole.startswith(SPECIAL_TOKENS[0])


def test_pictures_take_their_tokens_in_order(processor, config):
    one, two = picture((200, 0, 0)), picture((0, 0, 90), size=(112, 112))
    sample = processor([user(None, "and", None), assistant("a ring")], [one, two], key="k")
    per_image = config.vision.num_tokens(config.vision.image_size)
    ids = sample.input_ids
    assert (ids == TOKENS.im_patch).sum() == 2 * per_image
    for start in (ids == TOKENS.im_start).nonzero()[:, 0].tolist():
        assert (ids[start + 1 : start + 1 + per_image] == TOKENS.im_patch).all() and ids[
            start + 1 + per_image
        ] == TOKENS.im_end
    side = config.vision.image_size
    assert [tuple(image.images.shape) for image in sample.images] == [(1, 3, side, side)] * 2
    assert sample.images[0].images.dtype == torch.uint8 and int(sample.images[0].images[0, 0, 5, 5]) == 200
    PackedBatch.from_samples([sample, sample]).validate(config.tokens)


def test_resize_is_pillows_bilinear(processor, config):
    random = np.random.default_rng(3)
    image = Image.fromarray(random.integers(0, 256, (70, 41, 3), dtype=np.uint8))
    side = config.vision.image_size
    expected = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
    assert np.array_equal(processor.pixels(image)[0].permute(1, 2, 0).numpy(), expected)


def test_fast_resize_stays_near_and_pictures_of_the_right_size_are_left_alone(processor, tokenizer, config):
    fast = Step37Processor(tokenizer, config, resize="fast")
    random, side = np.random.default_rng(3), config.vision.image_size
    image = Image.fromarray(random.integers(0, 256, (70, 41, 3), dtype=np.uint8))
    assert (fast.pixels(image).int() - processor.pixels(image).int()).abs().max() <= 2  # measured: 1
    rendered = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
    for either in (fast, processor):
        pixels = either.pixels(Image.fromarray(rendered))
        assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), rendered) and pixels.is_contiguous()
    with pytest.raises(ConfigError, match=r"resize: expected fast or exact, found 'nearest'"):
        Step37Processor(tokenizer, config, resize="nearest")


def test_length_needs_sizes_only(processor):
    turns = [user(None, "and", None), assistant("a ring"), user("café?"), assistant("<im_patch> no")]
    sample = processor(turns, [picture(), picture(size=(9, 200))])
    assert processor.length(turns, [(50, 30), (9, 200)]) == len(sample)
    for wrong, sizes in ((turns, [(50, 30)]), (turns[:1], [(50, 30)] * 2), ([], [])):
        with pytest.raises(ConfigError):
            processor.length(wrong, sizes)


def test_fingerprint_follows_what_decides_lengths(tokenizer, config, tmp_path):
    def changed(**vision):
        return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **vision))

    other = Step37Tokenizer.train([*TEXTS, "entirely different words"] * 2, vocab_size=400)
    eos = dataclasses.replace(config, tokens=dataclasses.replace(TOKENS, eos=(1, 9)))
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    processors = {
        "as it is": Step37Processor(tokenizer, config),
        "multicrop": Step37Processor(tokenizer, config, multicrop=True),
        "crops": Step37Processor(tokenizer, changed(crop_size=98), multicrop=True),
        "view": Step37Processor(tokenizer, changed(image_size=168)),
        "template": Step37Processor(tokenizer, config, template),
        "tokenizer": Step37Processor(other, config),
        "token ids": Step37Processor(tokenizer, eos),
    }
    prints = {name: processor.fingerprint() for name, processor in processors.items()}
    assert len(set(prints.values())) == len(prints), prints
    assert all(len(digits) == 16 and int(digits, 16) >= 0 for digits in prints.values())
    # the same in another process, from a file, and whatever changes pixels only
    tokenizer.save(tmp_path / "tokenizer.json")
    program = (
        "import sys; from step37_lit.config import Step37Config; from step37_lit.tokenizer import Step37Tokenizer;"
        "from step37_lit.processor import Step37Processor; tokenizer = Step37Tokenizer.from_file(sys.argv[1]);"
        "print(Step37Processor(tokenizer, Step37Config.preset('tiny'), resize='fast').fingerprint())"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "tokenizer.json")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == prints["as it is"]
    assert Step37Processor(tokenizer, changed(crop_size=98)).fingerprint() == prints["as it is"]


def test_special_tokens_of_an_author_stay_text(processor, tokenizer):
    words = "<im_patch> <im_start><|im_end|><|im_start|>system"
    split = [{"type": "text", "text": "<im_"}, {"type": "text", "text": "patch>"}, {"type": "image"}]
    sample = processor([{"role": "user", "content": split}, assistant(words)], [picture()])
    assert int((sample.input_ids == TOKENS.im_start).sum()) == 1
    assert int((sample.input_ids == tokenizer.special_ids[TURN_END]).sum()) == 2
    learnt = sample.input_ids[sample.loss_mask.bool()].tolist()
    assert tokenizer.decode(learnt[:-1], skip_special=False) == words
    assert learnt[-1] == tokenizer.special_ids[TURN_END]
    assert not set(learnt[:-1]) & set(tokenizer.special_ids.values())


def test_prompt_is_the_beginning_of_the_training_sample(processor):
    turns = [user(None, "what?"), assistant("a red circle")]
    prompt, sample = processor.prompt(turns[:1], [picture()]), processor(turns, [picture()])
    length = len(prompt)
    assert torch.equal(sample.input_ids[:length], prompt.input_ids)
    assert sample.loss_mask[:length].sum() == 0 and sample.loss_mask[length] == 1 and prompt.loss_mask.sum() == 0


def test_attribute_words_are_found_as_tokens(processor, tokenizer):
    parts = [
        ("a ", None),
        ("red", "color"),
        (" ", None),
        ("zyxw", "shape"),
        (", <", None),
        ("blue", "color"),
        (".", None),
    ]
    content = [{"type": "text", "text": text} | ({"attribute": kind} if kind else {}) for text, kind in parts]
    sample = processor([user("what?"), {"role": "assistant", "content": content}])
    words = {
        kind: [tokenizer.decode(sample.input_ids[a:b].tolist()).strip() for a, b in spans.tolist()]
        for kind, spans in sample.attribute_spans.items()
    }
    assert words == {"color": ["red", "blue"], "shape": ["zyxw"]}
    plain = processor([user("what?"), assistant("".join(text for text, _ in parts))])
    assert torch.equal(plain.input_ids, sample.input_ids)


def test_an_own_chat_template_and_its_sandbox(tokenizer, config):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    sample = Step37Processor(tokenizer, config, template)([{"role": "user", "content": "what?"}, assistant("a ring")])
    assert tokenizer.decode(sample.input_ids.tolist(), skip_special=False) == f"[user]what?[assistant]a ring{TURN_END}"
    assert learnt_text(tokenizer, sample) == f"a ring{TURN_END}"
    for hostile in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception('no') }}"):
        with pytest.raises(ConfigError, match=r"chat_template"):
            Step37Processor(tokenizer, config, hostile)([{"role": "user", "content": "x"}, assistant("y")])
    with pytest.raises(ConfigError, match=r"chat_template: expected a Jinja template"):
        Step37Processor(tokenizer, config, "{% for %}")
    forgetful = "{% for m in messages[-1:] %}{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(ConfigError, match=r"earlier text kept"):
        Step37Processor(tokenizer, config, forgetful)([{"role": "user", "content": "x"}, assistant("y")])


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        ([user(None), assistant("x")], [], "image parts in messages: expected 0 .* found 1"),
        ([user("x"), assistant("x")], [picture()], "image parts in messages: expected 1 .* found 0"),
        (
            [{"role": "robot", "content": "x"}],
            [],
            r"messages\[0\].role: expected system or user or assistant, found 'robot'",
        ),
        ([{"role": "user"}], [], r"messages\[0\]: expected a field content"),
        ([{"role": "user", "content": 3}], [], r"messages\[0\].content"),
        ([{"role": "user", "content": [{"type": "video"}]}], [], r"messages\[0\].content\[0\].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], [], r"messages\[0\].content\[0\].text"),
        ([user("x")], [], "an assistant turn"),
        ([], [], "messages: expected at least one"),
        ([user(None), assistant("x")], [Image.new("RGBA", (9, 9))], "image mode: expected RGB or L, found 'RGBA'"),
    ],
)
def test_bad_messages_are_named(processor, messages, images, message):
    with pytest.raises(ConfigError, match=message):
        processor(messages, images)
