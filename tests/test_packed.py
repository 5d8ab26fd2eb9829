"""PackedDataModule: every sample once over ranks, workers and stops; equal packs; bad samples; refusals."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules.bad_samples import read_records
from datamodules.packed import SetConfig
from datamodules.packed_steps import PackedEpochs
from datamodules.steps import DataShare, StepLoader
from step37_lit.batch import PackedBatch
from step37_lit.errors import ConfigError
from tests import shard_sets
from tests.packed_loaders import MAX_LENGTH, MICROBATCHES, keys, loader, module, same

NUMBER = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets, of 48 and of 20 samples."""
    root = tmp_path_factory.mktemp("sets")
    shard_sets.write_shards(root / "first", range(NUMBER))
    shard_sets.write_shards(root / "second", range(1000, 1020))
    tokenizer = shard_sets.tokenizer_file(root)
    for name in ("first", "second"):
        shard_sets.index(root / name, tokenizer)
    return root


def epochs(loaders: list[StepLoader], count: int) -> Iterator[tuple[dict[str, Any], list[PackedBatch]]]:
    """Each step's packs of all ranks in the global order, and the state behind it, which the ranks share."""
    for _ in range(count):
        for packs in zip(*loaders, strict=True):
            states = [loader.state_dict() for loader in loaders]
            assert all(state == states[0] for state in states)
            yield states[0], [own[i] for i in range(len(packs[0])) for own in packs]


def test_an_epoch_is_each_sample_once_in_whole_packs(folder: Path) -> None:
    train = loader(folder)
    assert len(train) == train.steps.plan.num_packs // MICROBATCHES
    seen: Counter = Counter()
    for packs in train:
        assert len(packs) == MICROBATCHES
        for pack in packs:
            pack.validate(train.source.sets[0].reading.processor.config.tokens)
            assert pack.input_ids.shape == (1, MAX_LENGTH)
            seen.update(key.partition("#")[0] for key in pack.sample_keys)
    left = train.source.planner.carried(1)
    assert max(seen.values()) == 1
    assert set(seen) <= {f"first/sample{i:05d}" for i in range(NUMBER)}
    late = loader(folder).source.planner.plan(1).part(0, left).entries if left else []
    assert len(seen) + len(late) == NUMBER


STRAIGHT: dict[int, list] = {}


def straight(folder: Path) -> list:
    """Three epochs on one rank without workers."""
    if not STRAIGHT:
        STRAIGHT[0] = [(state, keys(packs)) for state, packs in epochs([loader(folder)], 3)]
    return STRAIGHT[0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_packs_are_equal_whatever_the_ranks_and_workers(folder: Path, ranks: int, workers: int) -> None:
    whole = list(epochs([loader(folder)], 1))
    shared = list(epochs([loader(folder, rank, ranks, workers) for rank in range(ranks)], 1))
    assert len(whole) == len(shared) > 0
    for (state, packs), (other_state, others) in zip(whole, shared, strict=True):
        assert state == other_state
        assert all(same(a, b) for a, b in zip(packs, others, strict=True))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_run_that_stops_anywhere_goes_on_with_other_ranks(folder: Path, data: st.DataObject) -> None:
    whole = straight(folder)
    ledger: list = []
    state = None
    while len(ledger) < len(whole):
        ranks = data.draw(st.sampled_from([1, 2, 4]), label="ranks")
        stop = data.draw(st.integers(1, len(whole) - len(ledger)), label="steps until the stop")
        loaders = [loader(folder, rank, ranks) for rank in range(ranks)]
        if state is not None:
            for each in loaders:
                each.load_state_dict(json.loads(json.dumps(state)))
        for state, packs in epochs(loaders, 9):
            ledger.append((state, keys(packs)))
            stop -= 1
            if stop == 0:
                break
    assert ledger == whole


@pytest.mark.parametrize("workers", [1, 3])
def test_a_run_that_stops_goes_on_with_other_workers(folder: Path, workers: int) -> None:
    whole = straight(folder)
    first = epochs([loader(folder, rank, 2, workers) for rank in range(2)], 3)
    ledger = [(state, keys(packs)) for (state, packs), _ in zip(first, range(4), strict=False)]
    first.close()
    second = loader(folder)
    second.load_state_dict(ledger[-1][0])
    ledger += [(state, keys(packs)) for state, packs in epochs([second], 3)]
    assert ledger[: len(whole)] == whole


def test_a_position_of_other_data_is_refused(folder: Path) -> None:
    state = loader(folder).state_dict()
    for changes, message in (
        ({"seed": 1}, r"data.seed: expected 0 \(in the checkpoint\), found 1"),
        ({"max_length": 200}, "data.max_length"),
        ({"sets": str(folder / "second")}, "data.sets"),
        ({"val_share": 0.25}, "data.sets"),
    ):
        with pytest.raises(ConfigError, match=message):
            loader(folder, **changes).load_state_dict(state)


def test_a_pack_is_what_the_processor_makes_of_the_shards(folder: Path) -> None:
    data = module(folder)
    pack = next(iter(loader(folder)))[0]
    (shards,) = data.sets("train")
    by_key = {shards.index.key(i): i for i in range(len(shards.index))}
    samples = []
    for name in pack.sample_keys:
        key, _, variant = name.removeprefix("first/").partition("#")
        samples.append(shards.sample(by_key[key], int(variant or 0)))
    assert same(pack, PackedBatch.from_samples(samples, pad_to=MAX_LENGTH, pad_token=1))


def test_validation_sees_every_text_once_and_training_none_of_them(folder: Path) -> None:
    data = module(folder, val_share=0.3)
    seen: Counter = Counter()
    shares = []
    for rank in range(2):
        (validation,) = data.val_dataloader()
        validation.steps.share = DataShare(rank, 2)
        shares.append(list(validation))
    assert len(shares[0]) == len(shares[1])
    for packs in shares[0] + shares[1]:
        assert len(packs) == MICROBATCHES // 2
        for pack in packs:
            seen.update(pack.sample_keys)
            if not pack.sample_keys:
                assert pack.loss_mask.sum() == 0 and pack.images == []
    (shards,) = data.sets("val")
    planned = shards.planned("val", 0.3)
    expected = [
        shards.key(int(i), int(v))
        for i, v in zip(np.repeat(planned.samples, np.diff(planned.borders)), planned.variants, strict=True)
    ]
    assert seen == Counter(expected)
    assert any(not pack.sample_keys for packs in shares[0] + shares[1] for pack in packs)  # the last step is filled up
    trained = {key.partition("#")[0] for packs in loader(folder, val_share=0.3) for p in packs for key in p.sample_keys}
    assert not trained & {key.partition("#")[0] for key in seen}


def test_two_sets_with_weights(folder: Path) -> None:
    sets = [SetConfig(str(folder / "first"), 1.0), SetConfig(str(folder / "second"), 1.0)]
    train = loader(folder, sets=sets, microbatches=1)
    names = Counter(key.split("/")[0] for packs in train for pack in packs for key in pack.sample_keys)
    assert names == {"first": 20, "second": 20}


def test_multicrop_needs_lengths_of_its_own(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"token lengths: expected those for fingerprint .*step37_lit index .*first"):
        module(folder, multicrop=True).check(ranks=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"microbatches": 3}, "data.microbatches: expected a multiple of 2 data-parallel ranks, found 3"),
        ({"microbatches": 4000}, "data.microbatches: expected at most the .* packs of epoch 0, found 4000"),
        ({"max_length": 30}, r"data.sets: first: expected texts of at most 30 tokens .*the first: key sample000"),
        ({"preset": None}, "data.preset, data.hub: expected exactly one of them"),
        ({"val_share": 1.0}, r"data.val_share: expected in \[0, 1\)"),
        ({"sets": "nowhere"}, "nowhere"),
        ({"sets": []}, "data.sets: expected at least one set"),
        ({"tokenizer": "nowhere.json"}, "tokenizer: expected a file, found 'nowhere.json'"),
        ({"chat_template": "nowhere.jinja"}, "data.chat_template: expected a file"),
        ({"prompt": "What is this?"}, "token lengths: expected those for fingerprint"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_a_run(folder: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        module(folder, **changes).check(ranks=2)


def test_long_texts_are_dropped_or_lose_their_end(folder: Path) -> None:
    limit = 45
    (shards,) = module(folder, max_length=limit, too_long="drop").sets("train")
    lengths = shards.lengths
    counts = np.diff(lengths.offsets)
    short = int((lengths.values <= limit).sum())
    assert 0 < short < len(lengths.values)
    dropped = shards.planned("train", 0.0)
    assert len(dropped.lengths) == short and dropped.lengths.max() <= limit
    (shards,) = module(folder, max_length=limit, too_long="truncate").sets("train")
    cut = shards.planned("train", 0.0)
    assert len(cut.samples) == (counts > 0).sum() and cut.lengths.max() == limit
    row = int(np.flatnonzero(lengths.values > limit)[0])
    i = int(np.searchsorted(lengths.offsets, row, side="right")) - 1
    sample = shards.sample(i, row - int(lengths.offsets[i]))
    assert len(sample) == limit
    PackedBatch.from_samples([sample]).validate(shards.reading.processor.config.tokens)


def damaged(folder: Path, tmp_path: Path, numbers: tuple[int, ...]) -> tuple[Path, list[str]]:
    copy = tmp_path / "sets"
    shutil.copytree(folder, copy)
    return copy, [shard_sets.damage(copy / "first", number) for number in numbers]


def test_a_bad_sample_is_skipped_and_named_and_later_packs_stay(folder: Path, tmp_path: Path) -> None:
    copy, bad = damaged(folder, tmp_path, (3, 17))
    whole = [keys(packs) for packs in loader(folder)]
    train = loader(copy, bad="skip", max_bad_share=0.1)
    train.ledger.folder = tmp_path / "run"
    found = [keys(packs) for packs in train]
    without = [[tuple(k for k in pack if k.split("/")[1].split("#")[0] not in bad) for pack in step] for step in whole]
    assert found == without and found != whole
    records = read_records(tmp_path / "run")
    assert sorted(record["key"] for record in records) == bad
    assert all("CRC-32" in record["reason"] and record["shard"].endswith(".tar") for record in records)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_stops_the_run_where_asked(folder: Path, tmp_path: Path, workers: int) -> None:
    copy, (key,) = damaged(folder, tmp_path, (5,))
    with pytest.raises(ConfigError, match=rf"data.bad: .*part-0000.tar, key {key}, member (0\.)?jpg: CRC-32") as error:
        list(loader(copy, workers=workers))
    assert "\n" not in str(error.value)


def test_too_many_bad_samples_stop_the_run(folder: Path, tmp_path: Path) -> None:
    copy, _ = damaged(folder, tmp_path, (1, 2, 9))
    with pytest.raises(ConfigError, match=r"data.max_bad_share: expected at most 0.04 of the 4\d samples of epoch 0"):
        list(loader(copy, bad="skip", max_bad_share=0.04))


def test_a_rank_that_does_not_read_makes_nothing(folder: Path) -> None:
    data = module(folder)
    source = PackedEpochs(data.planner, data.sets("train"), DataShare(0, 1, reads=False))
    reader, other = loader(folder), StepLoader(source)
    packs = list(other)
    assert packs == [[]] * len(reader)
    assert other.state_dict() == {**other.state_dict(), "epoch": 1, "position": 0}
