"""BLEU, ROUGE-L and CIDEr-D against the oracle, against plain Python, their properties, state and refusals."""

from __future__ import annotations

import json
import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from step37_lit.errors import ConfigError
from step37_lit.metrics import CIDErD, CocoBLEU, CocoROUGEL, DocumentFrequencies
from step37_lit.metrics.corpus import read_corpus
from tests import caption_reference
from tests.caption_reference import Item

ORACLE = Path(__file__).parents[2] / "shared" / "oracle" / "captions"
ORACLE_TOLERANCE = 1e-9  # measured 9e-16
TOLERANCE = 1e-12  # measured 5e-16 against plain Python
METRICS = {
    CocoBLEU: ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4"),
    CocoROUGEL: ("ROUGE_L",),
    CIDErD: ("CIDEr_D",),
}
PLAIN = {
    CocoBLEU: caption_reference.bleu,
    CocoROUGEL: caption_reference.rouge_l,
    CIDErD: caption_reference.cider_d,
}
pytestmark = pytest.mark.filterwarnings("ignore:CIDEr-D of 1 item is 0")


def oracle(name: str) -> dict[str, Any]:
    path = ORACLE / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    return json.loads(path.read_text(encoding="utf-8"))


def scores_of(metric: Any, items: list[Item]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the corpus [values] and of each item [items, values]."""
    metric.update([item.caption for item in items], [item.references for item in items])
    corpus, each = metric.compute(), metric.per_item()[1]
    assert corpus.dtype == each.dtype == torch.float64
    assert corpus.shape == ((4,) if isinstance(metric, CocoBLEU) else ()) and each.shape == (len(items), *corpus.shape)
    return corpus.reshape(-1), each.reshape(len(items), -1)


def difference(found: torch.Tensor, expected: Any) -> float:
    return (found - torch.tensor(expected, dtype=torch.float64).reshape(found.shape)).abs().max().item()


@pytest.mark.parametrize("metric_class", METRICS)
@pytest.mark.parametrize(
    ("variant", "suffix", "tokenizer"),
    [("ptb", "_ptb", None), ("pretok", "_pretok", None), ("raw", "", None), ("ptb", "", "ptb")],
)
def test_public_oracle(metric_class: type, variant: str, suffix: str, tokenizer: str | None) -> None:
    file = oracle("public.json")
    items = [Item(item[f"candidate{suffix}"], item[f"references{suffix}"]) for item in file["items"]]
    corpus, each = scores_of(metric_class(tokenizer=tokenizer), items)
    names = METRICS[metric_class]
    whole = difference(corpus, [file["corpus"][variant][name] for name in names])
    single = difference(each, [[item["scores"][variant][name] for name in names] for item in file["items"]])
    print(f"{variant}, tokenizer {tokenizer}: corpus {whole:.1e}, per item {single:.1e} (at most {ORACLE_TOLERANCE})")
    assert max(whole, single) <= ORACLE_TOLERANCE


@pytest.mark.parametrize("metric_class", METRICS)
def test_edge_oracle(metric_class: type) -> None:
    cases, names, worst = oracle("edge.json")["cases"], METRICS[metric_class], 0.0
    assert len(cases) == 21
    for case_name, case in cases.items():
        items = [Item(item["candidate"], item["references"]) for item in case["items"]]
        corpus, each = scores_of(metric_class(tokenizer=None), items)
        per_item = torch.tensor([case["per_item"][name] for name in names], dtype=torch.float64).T
        found = max(difference(corpus, [case["corpus"][name] for name in names]), difference(each, per_item.tolist()))
        assert found <= ORACLE_TOLERANCE, case_name
        worst = max(worst, found)
    print(f"{len(cases)} cases: largest difference {worst:.1e} (at most {ORACLE_TOLERANCE})")


SENTENCE = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "fg"]), max_size=9).map(" ".join)
ITEM = st.builds(Item, SENTENCE, st.lists(SENTENCE, min_size=1, max_size=4))
CORPUS = st.lists(ITEM, min_size=1, max_size=6)


@pytest.mark.parametrize("metric_class", METRICS)
@settings(max_examples=150, deadline=None)
@given(items=CORPUS)
def test_equals_plain_python(metric_class: type, items: list[Item]) -> None:
    corpus, each = scores_of(metric_class(tokenizer=None), items)
    expected_corpus, expected_each = PLAIN[metric_class](items)
    assert difference(corpus, expected_corpus) <= TOLERANCE
    assert difference(each, expected_each) <= TOLERANCE


def made_up_items(number: int, seed: int = 0) -> list[Item]:
    """Captions of 0 to 70 words, now and then longer than 64: a machine word of the LCS."""
    generator = random.Random(seed)

    def sentence() -> str:
        return " ".join(f"w{int(40 * generator.random() ** 2)}" for _ in range(generator.choice((0, 3, 9, 12, 70))))

    return [Item(sentence(), [sentence() for _ in range(generator.randint(1, 5))]) for _ in range(number)]


@pytest.mark.parametrize("metric_class", METRICS)
def test_equals_plain_python_on_many_items(metric_class: type) -> None:
    items = made_up_items(300)
    corpus, each = scores_of(metric_class(tokenizer=None), items)
    expected_corpus, expected_each = PLAIN[metric_class](items)
    found = max(difference(corpus, expected_corpus), difference(each, expected_each))
    print(f"{metric_class.__name__}: largest difference {found:.1e} (at most {TOLERANCE})")
    assert found <= TOLERANCE


@pytest.mark.parametrize("metric_class", METRICS)
@settings(max_examples=60, deadline=None)
@given(items=CORPUS, data=st.data())
def test_order_does_not_matter(metric_class: type, items: list[Item], data: st.DataObject) -> None:
    corpus, each = scores_of(metric_class(tokenizer=None), items)
    order = data.draw(st.permutations(range(len(items))))
    moved = [Item(items[i].caption, data.draw(st.permutations(items[i].references))) for i in order]
    moved_corpus, moved_each = scores_of(metric_class(tokenizer=None), moved)
    assert difference(moved_corpus, corpus.tolist()) <= TOLERANCE
    assert difference(moved_each, each[list(order)].tolist()) <= TOLERANCE


@pytest.mark.parametrize("metric_class", METRICS)
@settings(max_examples=60, deadline=None)
@given(items=CORPUS)
def test_scores_are_bounded(metric_class: type, items: list[Item]) -> None:
    for scores in scores_of(metric_class(tokenizer=None), items):
        assert (scores >= 0).all() and (scores <= metric_class.plot_upper_bound + 1e-12).all()


@pytest.mark.parametrize(("metric_class", "most"), [(CocoBLEU, 1.0), (CocoROUGEL, 1.0), (CIDErD, 10.0)])
def test_a_caption_that_is_its_reference_has_the_highest_score(metric_class: type, most: float) -> None:
    items = [Item(text, [text]) for text in ("a b c d e", "f g h i", "j k l m n o")]
    corpus, each = scores_of(metric_class(tokenizer=None), items)
    found = max(difference(corpus, [most] * len(corpus)), difference(each, [[most] * len(corpus)] * 3))
    print(f"{metric_class.__name__}: short of {most} by {found:.1e} (BLEU's smoothing costs 1e-9)")
    assert found <= (2e-9 if metric_class is CocoBLEU else 1e-14)


def test_frequencies_of_a_whole_split_make_cider_additive() -> None:
    items = made_up_items(60)
    frequencies = DocumentFrequencies.from_references([item.references for item in items], tokenizer=None)
    corpus, each = scores_of(CIDErD(tokenizer=None), items)
    given_corpus, given_each = scores_of(CIDErD(tokenizer=None, document_frequencies=frequencies), items)
    half, half_each = scores_of(CIDErD(tokenizer=None, document_frequencies=frequencies), items[:30])
    found = [difference(given_corpus, corpus.tolist()), difference(given_each, each.tolist())]
    found += [difference(half_each, each[:30].tolist()), difference(half, [each[:30].mean().item()])]
    print(f"largest difference {max(found):.1e} (at most {TOLERANCE})")
    assert max(found) <= TOLERANCE
    alone, _ = scores_of(CIDErD(tokenizer=None), items[:30])
    assert difference(alone, half.tolist()) > 1e-3  # without them the half is another split


def test_frequencies_know_words_of_captions_only() -> None:
    """N-grams that no reference has, made of known and of new words, weigh ln N, whatever their numbers are near to."""
    for items in (
        [Item("new a b", ["a b"]), Item("b a new new", ["b c"]), Item("q", ["c d e f"])],
        [Item("a b new", ["a b", "a c"]), Item("a c", ["a c"]), Item("b", ["b"])],
    ):
        frequencies = DocumentFrequencies.from_references([item.references for item in items], tokenizer=None)
        corpus, _ = scores_of(CIDErD(tokenizer=None, document_frequencies=frequencies), items)
        assert difference(corpus, caption_reference.cider_d(items)[0]) <= TOLERANCE


def test_one_item_has_no_cider() -> None:
    metric = CIDErD(tokenizer=None)
    metric.update(["a b c d"], [["a b c d"]])
    with pytest.warns(UserWarning, match="CIDEr-D of 1 item is 0") as caught:
        assert metric.compute() == 0
    assert len(caught) == 1
    metric.update(["e f"], [["e f"]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metric.compute() > 0


PREDS, TARGET = ["A dog runs!", "Two cats."], [["a dog is running", "The dog runs."], ["two cats sleep"]]


def collection() -> MetricCollection:
    return MetricCollection([CocoBLEU(), CocoROUGEL(), CIDErD()], compute_groups=False)


def values_of(metrics: MetricCollection) -> dict[str, list[float]]:
    return {name: value.tolist() for name, value in metrics.compute().items()}


@pytest.fixture
def expected() -> dict[str, list[float]]:
    metrics = collection()
    metrics.update(PREDS, TARGET)
    values = values_of(metrics)
    assert values["CIDErD"] > 1 and values["CocoROUGEL"] > 0.5
    return values


def test_batches_add_up_and_reset_forgets(expected: dict) -> None:
    metrics = collection()
    metrics.update(["Of a sanity check."], [["It has its own captions."]], keys=[0])
    metrics.compute()
    metrics.reset()
    assert read_corpus.cache_info().currsize == 0
    for i in range(2):
        metrics.update(PREDS[i : i + 1], TARGET[i : i + 1], keys=[i])
    assert values_of(metrics) == expected
    assert [name for name, metric in metrics.items() if metric.per_item()[0] != [0, 1]] == []


def test_forward_gives_the_batch_and_keeps_the_corpus(expected: dict) -> None:
    metrics = collection()
    first = metrics(PREDS[:1], TARGET[:1])
    second = metrics(PREDS[1:], TARGET[1:])
    assert (first["CocoROUGEL"] + second["CocoROUGEL"]).item() / 2 == pytest.approx(expected["CocoROUGEL"])
    assert first["CIDErD"] == second["CIDErD"] == 0  # of one item
    assert values_of(metrics) == expected


def test_state_survives(expected: dict, tmp_path: Path) -> None:
    metrics = collection()
    metrics.update(PREDS[:1], TARGET[:1])
    torch.save(metrics.state_dict(), tmp_path / "state.pt")
    loaded = collection()
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for copy in (loaded, pickle.loads(pickle.dumps(metrics)), metrics.clone()):
        copy.update(PREDS[1:], TARGET[1:])
        assert values_of(copy) == expected
    for name, metric in metrics.items():
        other = type(metric)()
        other.update(PREDS[1:], TARGET[1:])
        metric.merge_state(other)
        assert metric.compute().tolist() == expected[name]


def test_a_key_counts_once() -> None:
    metric = CIDErD()
    metric.update(PREDS, TARGET, keys=["a", "b"])
    once = metric.compute().item()
    metric.update(PREDS[:1], TARGET[:1], keys=["a"])
    assert metric.compute().item() == once and metric.per_item()[0] == ["a", "b"]
    metric.update(PREDS[:1], TARGET[:1])  # without a key it is another item
    assert metric.compute().item() != once and metric.per_item()[0] == ["a", "b", None]
    metric.update(["A cat."], TARGET[:1], keys=["a"])
    with pytest.raises(ConfigError, match=r"item 'a': expected the same caption.*a dog runs.*found.*a cat"):
        metric.compute()


def test_keys_of_two_kinds_are_two_keys() -> None:
    metric = CocoROUGEL()
    metric.update(PREDS, TARGET, keys=["1", 1])
    assert metric.per_item()[0] == ["1", 1]


GOOD = {"preds": ["a"], "target": [["a"]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preds": ["a", "b"]}, "target: expected 2 entries, as preds, found 1"),
        ({"preds": "a"}, "preds: expected a list, one entry an item, found 'a'"),
        ({"target": [[]]}, r"target\[0\]: expected one or more references, found \[\]"),
        ({"target": ["a dog"]}, r"target\[0\]: expected a list of reference strings, found 'a dog'"),
        ({"target": [["a", 3]]}, r"target\[0\]\[1\]: expected a string, found 3"),
        ({"preds": [None]}, r"preds\[0\]: expected a string, found None"),
        ({"keys": []}, "keys: expected 1 entries, as preds, found 0"),
        ({"keys": [1.5]}, r"keys\[0\]: expected a string or an integer, found 1.5"),
    ],
)
def test_refusals_add_nothing(change: dict, message: str) -> None:
    metric = CocoROUGEL()
    metric.update(["b"], [["a"]])
    with pytest.raises(ConfigError, match=message):
        metric.update(**{**GOOD, **change})
    assert metric.compute() == 0 and len(metric.per_item()[0]) == 1


def test_other_refusals() -> None:
    with pytest.raises(ConfigError, match="tokenizer: expected 'ptb' or None"):
        CocoBLEU(tokenizer="13a")
    with pytest.raises(
        ConfigError, match=r"document_frequencies.tokenizer: expected 'ptb', as the metric's, found None"
    ):
        CIDErD(document_frequencies=DocumentFrequencies.from_references([["a"]], tokenizer=None))
    with pytest.raises(ConfigError, match=r"references\[1\]: expected one or more references"):
        DocumentFrequencies.from_references([["a"], []])
    metric = CocoBLEU()
    metric.update([], [])
    with pytest.raises(
        ConfigError, match="CocoBLEU: expected one or more items before its score is asked for, found 0"
    ):
        metric.compute()
