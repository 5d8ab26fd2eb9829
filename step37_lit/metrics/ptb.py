"""Penn Treebank tokens of a caption, in lower case and without punctuation, as the COCO evaluation counts them.

A scanner of maximal munch: at every place the longest of the rules below wins, the earlier one in a tie, and what a
rule looks ahead at counts. Written from the treebank's conventions and checked against tokenized captions, not
translated from another tokenizer. Known limits:

* A token never contains white space, so phone numbers, `1 1/2` and tags with attributes fall apart; only `No. 5` is
  told apart from `no.` by what follows.
* Case is folded first. The treebank's abbreviations that are words in lower case (`Mass.`, `Wash.`, `Miss.`, `Art.`)
  are therefore words: `wash .`, of which the full stop is dropped.
* Characters above U+FFFF, controls and marks without width are dropped, and separate what stands around them.
"""

from __future__ import annotations

import re
from functools import lru_cache

# Tokens that do not count. Brackets are spelled out (-lrb-) before this and stay, as do `?!`, `!!` and the like.
_PUNCTUATION = frozenset(
    ["''", "'", "``", "`", '"', ".", "..", "...", "....", ".....", "?", "!", ",", ":", ";", "-", "--", "---", "----"]
)
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})
_SPLIT_WORDS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "lemme": ("lem", "me"),
    "gimme": ("gim", "me"),
}

# Typographic characters with a plain spelling. Dashes and the ellipsis would be dropped as tokens: they only separate.
_PLAIN_SPELLING = str.maketrans(
    {
        **dict.fromkeys("\u2013\u2014\u2015\u2026", " "),
        **dict.fromkeys("\u2019\u0092", "'"),
        **dict.fromkeys("\u2018\u201a\u201b\u0091\u2039\u203a", "`"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u0093\u0094\u00ab\u00bb", '"'),
        **dict.fromkeys("\u20ac\u20a0\u00a4\u0080", "$"),  # the treebank has dollars, pounds (#) and cents
        "\u00a3": "#",
        "\u00a2": " cents ",
        "\u00bc": " 1/4 ",
        "\u00bd": " 1/2 ",
        "\u00be": " 3/4 ",
        "\u2153": " 1/3 ",
        "\u2154": " 2/3 ",
        "\u00ad": "",  # soft hyphen: a place to break the line, not a character of the word
    }
)
_DROPPED = re.compile(
    r"[\x00-\x08\x0e-\x1b\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u206f]"
    r"|[\ud800-\uf8ff\ufe00-\ufe0f\ufeff\U00010000-\U0010ffff]"
)
_ENTITIES = {"&amp;": "&", "&quot;": '"', "&apos;": "'", "&lt;": " < ", "&gt;": " > "}
_ENTITY = re.compile("|".join(_ENTITIES))

_NOT_LETTERS = r"\W\d_\u00b2\u00b3\u00b9\u2070-\u209c\u2460-\u24ff"  # superscript and circled numbers are \w
_MARKS = r"\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u064b-\u065e\u0900-\u0903\u093c-\u094d"  # and marks are not
_L = rf"(?:[^{_NOT_LETTERS}]|[{_MARKS}])"
_LD = rf"(?:[^{_NOT_LETTERS}]|[{_MARKS}]|\d)"
_CLITIC = r"'(?:[smd]|re|ve|ll)"
_ABBREVIATIONS = "|".join(
    (
        r"[a-z](?:\.[a-z])*",  # initials and acronyms: a.m., u.s.a.
        "jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri",
        "inc|cos?|corp|ltd|plc|bros|dept|assn|univ|etc|al|seq|bldg|esq|jr|sr|ed\\.d|ph\\.d|ph|vs|cf|alex|wm|jos",
        "drs?|mrs?|ms|mme|messrs|adm|brig|capts?|cmdr|col|comdr|cpl|gens?|gov|hon|lts?|maj|pvt|profs?|reps?|revs?",
        "sens?|sgts?|st|ste",
        "ala|ariz|calif|colo|conn|dak|fla|ga|ind|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt|wisc?|wyo",
    )
)
# The first group is the token; what stands behind it must follow, and counts for the length of the match. Repetitions
# that may run on without coming to a match are bounded, so that time is linear in the length of any string.
_RULES = tuple(
    re.compile(rule)
    for rule in (
        r"(</?[a-z!?][a-z0-9:.-]*/?>)",
        rf"({_L}{_LD}*)(?:{_CLITIC})(?!{_L})",  # dog|'s
        r"([a-z]+?)(?:n't)(?![a-z])",  # ca|n't
        rf"({_L}{_LD}*(?:[.!?]{_L}{_LD}*)*)",  # dog, file.txt
        r"('n'|(?:'n|[ldj]'|'em|ol'|'[2-9]0s|c'mon|ma'am|c'est|cap'n|n?e'er|s'mores)(?![a-z]))",
        r"(y')[a-z]",  # y'|all
        r"('t)(?:is|was)(?![a-z])",
        r"(https?://[^\s\"<>|()]*[^\s\"<>|.!?(){},-])",
        r"((?:www\.(?:[^\s\"<>|.!?(){},/]+\.)+[a-z]{2,4}|(?:[a-z0-9-]{1,63}\.){1,8}(?:com|net|org|edu))(?![a-z0-9])"
        r"(?:/[^\s\"<>|()]*[^\s\"<>|.!?(){},-])?)",
        r"([a-z0-9][^\s\"<>|(){}@]{0,63}@(?:[^\s\"<>|(){}.@]+\.)*[^\s\"<>|(){}\[\].,;:@]+)",
        rf"(@[a-z_][a-z_0-9]*|#{_L}(?:{_LD}|_)*{_LD})",
        rf"({_CLITIC}|n't)(?![a-z])",
        r"(\d{1,2}[-/]\d{1,2}[-/]\d{2,4})",  # a date
        r"([-+]?(?:\d*(?:[.,:]\d+)+|\d+))",
        r"(\d{1,4}/\d{1,4})",
        r"(-[lr][rsc]b-|pro-|anti-)",
        r"([a-z0-9]+(?:-[a-z]+){0,2}(?:/[a-z0-9]+(?:-[a-z]+){0,2}){1,2})",  # and/or
        r"([a-z]*\$)",
        rf"((?:{_ABBREVIATIONS})\.)",
        rf"({_L}{_LD}*\.)[,;:]",  # an abbreviation, since a sentence does not go on like this
        r"([<>]?[:;=][-o*']?[()dpo\\{@|\[\]])(?![a-z0-9])",
        r"([-^x=~<>'][_.][-^x=~<>'])(?![a-z0-9])",
        rf"((?:[dol]'{_L})?{_LD}+(?:[-_](?:[dol]'{_L})?{_LD}+)*)",  # t-shirt, o'clock, 5kg
        r"([a-z0-9][a-z0-9.,]{0,63}(?:-[a-z0-9]+)+)",  # 3.5-inch
        r"([a-z]+(?:[+&][a-z]+)+|c\+\+|[cf]#)",
        r"(')[a-z](?![a-z])",  # 'a' in quotation marks
        r"(''|``|\.{2,5}|[?!]+|-+|_+|\*+|@+|#+|<<|>>)",
        r"(.)",
    )
)
# A plain word at the end of a chunk, where no rule takes more than the word: it need not try them all.
_PLAIN_WORD = re.compile(r"([a-z]+)(?=[,;:!?)\"]?$)")
_NUMBERED = re.compile(r"(?:nos?|figs?|art|pp|prop|op)\.")


def ptb_tokenize(caption: str) -> list[str]:
    """Tokens of a caption: Penn Treebank rules, lower case, no punctuation.

    `"A dog can't (ever) run."` gives `["a", "dog", "ca", "n't", "-lrb-", "ever", "-rrb-", "run"]`. Line separators
    inside the caption are spaces; a caption of punctuation only has no tokens.
    """
    text = caption.lower()
    if not text.isascii():
        text = text.translate(_PLAIN_SPELLING)
    if not (text.isascii() and text.isprintable()):
        # Separators first: some of them are controls, which would be dropped.
        text = _DROPPED.sub(" ", " ".join(text.split()))
    if "&" in text:
        text = _ENTITY.sub(lambda match: _ENTITIES[match[0]], text)
    chunks = text.split()
    tokens: list[str] = []
    for i, chunk in enumerate(chunks, 1):
        tokens += _chunk_tokens(chunk, before_digit=i < len(chunks) and chunks[i][0].isdigit())
    return tokens


@lru_cache(maxsize=1 << 16)
def _chunk_tokens(chunk: str, before_digit: bool) -> tuple[str, ...]:
    """Tokens of what stands between two white spaces."""
    if before_digit and _NUMBERED.fullmatch(chunk):
        return (chunk,)
    tokens: list[str] = []
    position = 0
    while position < len(chunk):
        token = (_PLAIN_WORD.match(chunk, position) or _longest_match(chunk, position))[1]
        position += len(token)
        if token in _SPLIT_WORDS:
            tokens += _SPLIT_WORDS[token]
        elif token not in _PUNCTUATION:
            tokens.append(token.translate(_BRACKETS))
    return tuple(tokens)


def _longest_match(chunk: str, position: int) -> re.Match[str]:
    matches = [match for rule in _RULES if (match := rule.match(chunk, position))]
    return max(matches, key=re.Match.end)  # the first of the longest
