"""What the inspector collects, the geometry of its plots, and its command. The page: test_inspector_page.py."""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SEED
from hypothesis import given, settings
from hypothesis import strategies as st
from inspected_sets import MAX_LENGTH, PAIR, MadeSet, hostile_set, plain_set
from PIL import Image

from datamodules.inspector import inspect as inspector
from datamodules.inspector.collect import collect
from datamodules.inspector.packs import KINDS, TEXT_LIMIT
from datamodules.inspector.page import page
from datamodules.inspector.plots import histogram, size_plot
from datamodules.packed import PackedDataModule
from datamodules.packed_steps import PackedEpochs
from datamodules.packing import lower_bound
from datamodules.steps import EVERYTHING
from step37_lit.errors import ConfigError
from step37_lit.pages.render import visible


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> MadeSet:
    return plain_set(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> MadeSet:
    return hostile_set(tmp_path_factory.mktemp("sets"))


# ---- what is collected ----


def test_spans_are_the_positions_of_the_packs(plain: MadeSet) -> None:
    found = collect(plain.module, 6, 1000)
    steps = PackedEpochs(plain.module.planner, plain.module.sets("train"), EVERYTHING).epoch(0)
    packs = [pack for step in range(3) for pack in steps[step].packs]
    assert [pack.number for pack in found.packs] == list(range(6))
    assert max(pack.num_images for pack in packs) > 1 and any(pack.num_tokens < MAX_LENGTH for pack in packs)
    tokens = plain.module.config.tokens
    for own, pack in zip(found.packs, packs, strict=True):
        assert tuple(sample.key for sample in own.samples) == pack.sample_keys
        assert [sample.start for sample in own.samples] == pack.cu_seqlens[: len(own.samples)].tolist()
        kinds = [kind for sample in own.samples for span in sample.spans for kind in [span.kind] * span.length]
        starts = [span.start for sample in own.samples for span in sample.spans]
        assert starts == np.cumsum([0, *(s.length for sample in own.samples for s in sample.spans)])[:-1].tolist()
        kinds += ["padding"] * own.count("padding")
        assert len(kinds) == MAX_LENGTH == sum(own.count(kind) for kind in KINDS)
        of_images = (pack.input_ids[0] >= tokens.im_start) & (pack.input_ids[0] <= tokens.patch_end)
        assert [kind == "loss" for kind in kinds] == (pack.loss_mask[0] > 0).tolist()
        assert [kind == "image" for kind in kinds] == of_images.tolist()


def test_figures_are_those_of_the_index_and_of_the_plan(plain: MadeSet) -> None:
    found, index, plan = collect(plain.module, 2, 3), plain.index, plain.module.planner.plan(0)
    assert (found.num_samples, found.num_shards) == (len(index), 2) == (42, 2)
    assert found.num_bytes == sum(path.stat().st_size for path in plain.folder.glob("*.tar"))
    assert found.lengths.tolist() == index.lengths(found.fingerprint).values.tolist() and len(found.lengths) == 122
    assert found.image_sizes.tolist() == [list(size) for i in range(len(index)) for size in index.image_sizes(i)]
    rows = [[int(length) for length in _lengths_of(plain, plan.pack(number))] for number in range(plan.num_packs)]
    flat = list(itertools.chain(*rows))
    assert (found.epoch.packs, found.epoch.texts, found.epoch.tokens) == (len(rows), len(flat), sum(flat))
    assert found.epoch.lower_bound == lower_bound(flat, MAX_LENGTH) <= found.epoch.packs
    assert found.epoch.padding == pytest.approx(1 - sum(flat) / (len(rows) * MAX_LENGTH))
    assert found.epoch.steps * 2 == found.epoch.packs and not found.bad


def _lengths_of(made: MadeSet, entries: Sequence[tuple[int, int, int]]) -> Iterator[int]:
    lengths = made.module.sets("train")[0].lengths
    return (lengths.values[lengths.offsets[sample] + variant] for _, sample, variant in entries)


def test_cards_show_what_the_model_sees(plain: MadeSet) -> None:
    found, shards = collect(plain.module, 1000, 1000), plain.module.sets("train")[0]
    cards = {card.key.removeprefix("plain/").partition("#")[0]: card for card in found.cards}
    assert list(cards) == [s.key.removeprefix("plain/").partition("#")[0] for p in found.packs for s in p.samples]
    numbers = {shards.index.key(i): i for i in range(len(shards.index))}
    assert any(len(card.pictures) == 2 for card in found.cards) and any(not card.pictures for card in found.cards)
    for key, card in cards.items():
        sample = shards.sample(numbers[key], int(card.key.partition("#")[2] or 0))
        views = [v for held in sample.images if held.insert_start_token == 3 for v in held.images]  # type: ignore[union-attr]
        for uri, view in zip(card.pictures, views, strict=True):
            with Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,")))) as shown:
                levels = np.abs(np.asarray(shown).astype(int) - view.permute(1, 2, 0).numpy().astype(int))
            assert levels.mean() < 1.4  # measured: 1.19 at most; the nearest other picture is 1.6 away
        learnt = "".join(piece.text for piece in card.pieces if piece.learnt)
        ids = sample.input_ids[sample.loss_mask > 0].tolist()
        assert learnt == plain.module.processor.tokenizer.decode(ids, skip_special=False)
        assert card.patches == sum(len(h.images) for h in sample.images if h.insert_start_token == 6)  # type: ignore[arg-type]


def test_limits_are_kept_and_say_what_is_left_out(plain: MadeSet) -> None:
    everything, packs = collect(plain.module, 10**6, 1000), plain.module.planner.plan(0).num_packs
    assert len(everything.packs) == packs > 3 == len(collect(plain.module, 3, 1).packs)
    keys = [card.key for card in everything.cards]
    before = sum(max(1, len(card.pictures)) for card in everything.cards[: keys.index(f"plain/{PAIR}")])
    cut = collect(plain.module, 10**6, before + 1).cards
    assert [card.key for card in cut] == keys[: len(cut)] and cut[-1].key == f"plain/{PAIR}"
    assert (len(cut[-1].pictures), cut[-1].hidden_pictures) == (1, 1)


def test_bad_samples_of_the_index_and_of_reading(hostile: MadeSet) -> None:
    found = collect(hostile.module, 1000, 1000)
    known = [record for shards in hostile.module.sets("train") for record in shards.known_bad()]
    assert len(known) == 1 and found.bad[:1] == tuple(known)
    (met,) = found.bad[1:]
    assert (met.key, met.member) == ("broken<i id=taken>", "png") and "PNG" in met.reason
    assert "broken" not in str([card.key for card in found.cards])
    # The pack is there without it, padded.
    assert sum(len(pack.samples) for pack in found.packs) == found.epoch.texts - 1


# ---- what is drawn ----


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(1, 6000))
def test_histogram_holds_every_length(values: list[int], max_length: int) -> None:
    drawn = histogram(np.array(values, dtype=np.int32), max_length)
    counted = [sum(bar.first <= value <= bar.last for value in values) for bar in drawn.bars]
    assert counted == [bar.count for bar in drawn.bars] and sum(counted) == len(values)
    assert 1 <= len(drawn.bars) <= 49 and len(drawn.x_ticks) <= 9 and 2 <= len(drawn.y_ticks) <= 6
    for bar in drawn.bars:
        assert bar.x >= -1e-9 and bar.x + bar.width <= 100 + 1e-9 and 0 < bar.height <= 100
    slopes = {(b.value - a.value) / (b.at - a.at) for a, b in itertools.pairwise(drawn.x_ticks)}
    assert max(slopes, default=1) == pytest.approx(min(slopes, default=1))
    first, tick = drawn.bars[0], drawn.x_ticks[0]
    scale = first.width / (first.last + 1 - first.first)  # per cent of a token, for ticks, bars and the limit
    assert [tick.at + (bar.first - tick.value) * scale for bar in drawn.bars] == pytest.approx(
        [b.x for b in drawn.bars]
    )
    assert (drawn.limit_at is None) == (not 0 < tick.at + (max_length - tick.value) * scale < 100 + 1e-9)
    if drawn.limit_at is not None:
        assert drawn.limit_at == pytest.approx(tick.at + (max_length - tick.value) * scale)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 9000)), min_size=1, max_size=60))
def test_size_plot_holds_every_picture(values: list[tuple[int, int]]) -> None:
    drawn = size_plot(np.array(values, dtype=np.int32), most_common=3)
    assert sum(dot.count for dot in drawn.dots) == len(values)
    assert all(0 < at < 100 for dot in drawn.dots for at in (dot.x, dot.y))
    assert [dot.count for dot in drawn.dots] == sorted((dot.count for dot in drawn.dots), reverse=True)
    assert drawn.distinct == len(set(values)) and len(drawn.common) == min(3, drawn.distinct)
    for ticks in (drawn.x_ticks, drawn.y_ticks):
        assert 1 <= len(ticks) <= 9 and all(a.value < b.value and a.at < b.at for a, b in itertools.pairwise(ticks))
    for width, height, count in drawn.common:
        assert count == values.count((width, height))
    assert {count for *_, count in drawn.common} >= {max(values.count(size) for size in values)}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain <b> ü 漢 🐕 עברית", "plain <b> ü 漢 🐕 עברית"),
        ("a\u202eb\u202c", "a⟨U+202E⟩b⟨U+202C⟩"),
        ("\x00\t\n\x1b\x7f\x85", "⟨U+0000⟩⟨U+0009⟩⟨U+000A⟩⟨U+001B⟩⟨U+007F⟩⟨U+0085⟩"),
        ("\u200b\ufeff\u2066\u2028\ud800\ue000\U000e0041", "⟨U+200B⟩⟨U+FEFF⟩⟨U+2066⟩⟨U+2028⟩⟨U+D800⟩⟨U+E000⟩⟨U+E0041⟩"),
        ("👩\u200d🚀 می\u200cخواهم", "👩\u200d🚀 می\u200cخواهم"),
    ],
)
def test_invisible_characters_are_spelt(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_page_is_the_same_each_time(plain: MadeSet) -> None:
    again = PackedDataModule(str(plain.folder), preset="tiny", max_length=MAX_LENGTH, multicrop=True, val_share=0.1,
                             microbatches=2, bad="skip")  # fmt: skip
    torch.manual_seed(SEED + 1)
    assert page(collect(again, 3, 5)) == page(collect(plain.module, 3, 5))


# ---- the command ----


def test_command(plain: MadeSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.html"
    asked = ["--inspect", str(plain.folder), "--config", str(plain.recipe), "--packs", "3", "--thumbnails", "5"]
    assert inspector.main([*asked, "--output", str(output)]) == 0
    assert output.read_text() == page(collect(plain.module, 3, 5))
    assert capsys.readouterr().out.startswith("page ") and list(tmp_path.iterdir()) == [output]
    with pytest.raises(ConfigError, match="--output"):
        inspector.main([*asked, "--output", str(tmp_path / "absent" / "page.html")])


def test_command_beside_the_index(plain: MadeSet) -> None:
    assert inspector.main(["--inspect", str(plain.folder), "--config", str(plain.recipe), "--packs", "1"]) == 0
    output = plain.folder / inspector.PAGE_FILE
    assert output.is_file()
    output.unlink()


def test_command_takes_the_tokenizer_that_training_takes(plain: MadeSet, tmp_path: Path) -> None:
    """In a recipe of two sets it is the first one's, also for the second set; a set outside has its own."""
    recipe = json.loads(plain.recipe.read_text())
    first = tmp_path / "first"
    first.mkdir()
    recipe["data"]["init_args"]["sets"] = [{"path": str(first)}, {"path": str(plain.folder)}]
    file = tmp_path / "two.yaml"
    file.write_text(json.dumps(recipe))
    with pytest.raises(ConfigError, match=f"tokenizer.*{first}"):
        inspector.main(["--inspect", str(plain.folder), "--config", str(file)])
    recipe["data"]["init_args"]["sets"] = str(first)
    file.write_text(json.dumps(recipe))
    assert inspector.main(["--inspect", str(plain.folder), "--config", str(file), "--packs", "1"]) == 0
    (plain.folder / inspector.PAGE_FILE).unlink()


def test_command_refuses_lengths_of_another_recipe(plain: MadeSet, tmp_path: Path) -> None:
    recipe = json.loads(plain.recipe.read_text())
    recipe["data"]["init_args"]["prompt"] = "What is it?"
    file, output = tmp_path / "other.yaml", tmp_path / "page.html"
    file.write_text(json.dumps(recipe))
    with pytest.raises(ConfigError, match=r"token lengths.*python -m step37_lit index"):
        inspector.main(["--inspect", str(plain.folder), "--config", str(file), "--output", str(output)])
    assert not output.exists()


def test_long_text_is_cut_and_counted(plain: MadeSet) -> None:
    cut = [card for card in _long_cards(plain) if card.hidden_characters]
    assert cut and all(sum(len(piece.text) for piece in card.pieces) == TEXT_LIMIT for card in cut)


def _long_cards(made: MadeSet) -> list[Any]:
    from datamodules.inspector.packs import cards_of
    from step37_lit.batch import PackedBatch

    turns = [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "Yes."}]
    pack = PackedBatch.from_samples([made.module.processor(turns, key="long")])
    return list(cards_of(pack, 0, made.module.processor, 1))
