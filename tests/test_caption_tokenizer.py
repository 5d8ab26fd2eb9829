"""`ptb_tokenize` against tokenized captions and tricky strings, and what holds for any string."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step37_lit.metrics import ptb_tokenize
from step37_lit.metrics.ptb import _PLAIN_WORD, _PUNCTUATION, _longest_match

ORACLE = Path(__file__).parents[2] / "shared" / "oracle" / "captions"


def oracle(name: str) -> dict:
    path = ORACLE / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    return json.loads(path.read_text(encoding="utf-8"))


def check_share(pairs: list[tuple[str, str]], least: float) -> None:
    differing = [
        (raw, expected, found) for raw, expected in pairs if (found := " ".join(ptb_tokenize(raw))) != expected
    ]
    share = 1 - len(differing) / len(pairs)
    print(f"{len(pairs)} strings, exact {share:.2%} (at least {least:.0%}); differing (raw, expected, found):")
    print(*map(ascii, differing), sep="\n")
    assert share >= least


def test_public_captions() -> None:
    pairs = []
    for item in oracle("public.json")["items"]:
        pairs.append((item["candidate"], item["candidate_ptb"]))
        pairs += zip(item["references"], item["references_ptb"], strict=True)
    check_share(pairs, 0.99)


def test_tricky_strings() -> None:
    check_share(oracle("ptb_tokens.json")["pairs"], 0.90)


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("", ""),
        (" ?\n", ""),
        ("Two dogs' toys: the 'big' one, isn't it?", "two dogs toys the big one is n't it"),
        ("I cannot say (the cat's U.S.-made)...", "i can not say -lrb- the cat 's u.s.-made -rrb-"),
        ("No. 5 of no.", "no. 5 of no"),
        ("a\rb\x0bc\x0cd\x85e\u2028f\u2029g\nh\ti\u00a0j", "a b c d e f g h i j"),
        ("a dog\U0001f600\u200d runs\x00fast", "a dog runs fast"),
        ("so\u00adfa cafe\u0301 \u2018x\u2019 it\u2019s", "sofa cafe\u0301 x it 's"),
        ("AT&amp;T &lt;here&gt;", "at&t < here >"),
        ("x\u00b2 costs \u00a35 or \u20ac6 and \u00bd", "x \u00b2 costs # 5 or $ 6 and 1/2"),
        ("rock'n'roll 3.5-inch www.a.com/b, me@b.co.uk.", "rock 'n' roll 3.5-inch www.a.com/b me@b.co.uk"),
        ("a----b -----", "a b -----"),
        ("\ud800 a lone surrogate", "a lone surrogate"),
    ],
)  # fmt: skip
def test_tokens(caption: str, tokens: str) -> None:
    assert ptb_tokenize(caption) == tokens.split()


def test_what_follows_is_not_remembered() -> None:
    """The cache of chunks knows the one thing that a token depends on outside of them."""
    assert [ptb_tokenize(text) for text in ("no. 1", "no. one", "no. 1")] == [["no.", "1"], ["no", "one"], ["no.", "1"]]


TRICKY_TEXT = st.text(
    alphabet=st.sampled_from("abnst019'.,;:!?\"()-/&@#$*_+<> \u2019\u00e9\u00b2\U0001f600"), max_size=12
)


@given(st.one_of(st.text(max_size=40), TRICKY_TEXT))
def test_any_string_gives_words(text: str) -> None:
    tokens = ptb_tokenize(text)
    assert " ".join(tokens).split() == tokens  # no token is empty or holds white space
    assert not _PUNCTUATION.intersection(tokens)
    assert ptb_tokenize(f"  {text}\n") == tokens


@given(TRICKY_TEXT)
def test_plain_words_are_what_the_rules_give(chunk: str) -> None:
    """The short cut for words at the end of a chunk takes nothing away from a longer match."""
    for position in range(len(chunk)):
        if plain := _PLAIN_WORD.match(chunk, position):
            assert _longest_match(chunk, position)[1] == plain[1]
