"""Text members of a sample: captions or a conversation, read strictly.

    KEY.json   {"messages": [...]} as `Step37Processor` takes them, {"captions": ["...", ...]} or {"caption": "..."}
    KEY.txt    one caption

The first of the three fields counts; other fields are left alone, foreign shards have many. Each caption is one variant
of the sample, a conversation is the only one. Functions raise `ValueError` whose text is the reason, in one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from step37_lit.processor import ESCAPE, ROLES

TEXT_SUFFIXES = ("json", "txt")
FIELDS = ("messages", "captions", "caption")
MAX_TEXT_BYTES = 1 << 20
MAX_JSON_DEPTH = 64
MAX_CAPTIONS = 1000

# A string, closed or not (so that no quote is looked at twice), or a bracket.
_JSON_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|([\[{])|([\]}])', re.DOTALL)

Message = dict[str, Any]


class NoTextError(ValueError):
    """The member holds none of the fields that this project reads."""


@dataclass(frozen=True)
class Texts:
    """What a text member says: captions, or one conversation.

    Args:
        captions: Captions without white space around them; empty for a conversation.
        messages: Turns with `role` and `content` alone, or None for captions.
    """

    captions: tuple[str, ...] = ()
    messages: tuple[Message, ...] | None = None

    def variants(self, prompt: str, num_images: int) -> list[list[Message]]:
        """Messages of each variant.

        Args:
            prompt: What a caption is the answer to.
            num_images: Image members of the sample.

        Raises:
            ValueError: a caption without an image, or another number of image parts than images.
        """
        if self.messages is not None:
            parts = sum(part["type"] == "image" for turn in self.messages for part in _parts(turn["content"]))
            if parts != num_images:
                raise ValueError(f"{parts} image parts in messages, {num_images} image members")
            return [list(self.messages)]
        if num_images == 0:
            raise ValueError("a caption without an image")
        question = [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]
        return [
            [{"role": "user", "content": question}, {"role": "assistant", "content": caption}]
            for caption in self.captions
        ]

    def authored(self) -> list[str]:
        """Every text that an author wrote, in order."""
        if self.messages is None:
            return list(self.captions)
        contents = [turn["content"] for turn in self.messages]
        return [
            text
            for content in contents
            for text in ([content] if isinstance(content, str) else [p["text"] for p in content if "text" in p])
        ]


def parse_text(suffix: str, data: bytes) -> Texts:
    """Reads one text member.

    Args:
        suffix: `json` or `txt`.
        data: At most `MAX_TEXT_BYTES` bytes of UTF-8.

    Raises:
        NoTextError: JSON without any of the three fields.
        ValueError: anything else that is not as described above.
    """
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"text of {len(data)} bytes, at most {MAX_TEXT_BYTES}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    if suffix == "txt":
        return Texts(captions=(_caption(text, "caption"),))
    return _texts(_parse_json(data, text))


def choose_text(members: Mapping[str, bytes]) -> tuple[str, Texts]:
    """Suffix and content of the text member that counts: JSON where it holds one of the three fields, else text.

    Args:
        members: Text members by suffix.

    Raises:
        ValueError: there is none, or the one that counts is bad.
    """
    reasons = []
    for suffix in TEXT_SUFFIXES:
        if suffix not in members:
            continue
        try:
            return suffix, parse_text(suffix, members[suffix])
        except NoTextError as error:
            reasons.append(f"member {suffix}: {error}")
        except ValueError as error:
            raise ValueError(f"member {suffix}: {error}") from None
    raise ValueError(reasons[0] if reasons else f"no text member ({' or '.join(TEXT_SUFFIXES)})")


def _parse_json(data: bytes, text: str) -> Any:
    depth = deepest = 0
    if data.count(b"[") + data.count(b"{") > MAX_JSON_DEPTH:
        for match in _JSON_BRACKETS.finditer(data):
            depth += (match[1] is not None) - (match[2] is not None)
            deepest = max(deepest, depth)
    if deepest > MAX_JSON_DEPTH:  # the parser would run out of stack sooner or later, depending on its caller
        raise ValueError(f"JSON nested {deepest} deep, at most {MAX_JSON_DEPTH}")
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None


def _texts(parsed: Any) -> Texts:
    fields = [name for name in FIELDS if isinstance(parsed, dict) and name in parsed]
    if not fields:
        found = f"the fields {_shown(sorted(parsed))}" if isinstance(parsed, dict) else _kind(parsed)
        raise NoTextError(f"expected an object with {', '.join(FIELDS[:-1])} or {FIELDS[-1]}, found {found}")
    value = parsed[fields[0]]
    if fields[0] == "messages":
        return Texts(messages=_messages(value))
    if fields[0] == "caption":
        return Texts(captions=(_caption(value, "caption"),))
    if not isinstance(value, list) or not 0 < len(value) <= MAX_CAPTIONS:
        found = f"{len(value)}" if isinstance(value, list) else _kind(value)
        raise ValueError(f"captions: expected a list of 1 to {MAX_CAPTIONS}, found {found}")
    return Texts(captions=tuple(_caption(caption, f"captions[{i}]") for i, caption in enumerate(value)))


def _caption(value: Any, where: str) -> str:
    caption = _text(value, where).strip()
    if not caption:
        raise ValueError(f"{where}: empty")
    return caption


def _text(value: Any, where: str) -> str:
    """Text that can be tokenised: no NUL, no half of a surrogate pair, none of the processor's own marks."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected text, found {_kind(value)}")
    for character, name in (("\0", "NUL"), (ESCAPE, "the noncharacter U+FDD0")):
        if character in value:
            raise ValueError(f"{where}: {name} at character {value.index(character)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half of a surrogate pair at character {error.start}") from None
    return value


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages: expected a list of turns, found {_kind(value)}")
    messages = tuple(_message(turn, f"messages[{i}]") for i, turn in enumerate(value))
    answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    if not answers:
        raise ValueError("messages: expected an assistant turn, found none")
    if any(not "".join(part.get("text", "") for part in _parts(answer)).strip() for answer in answers):
        raise ValueError("messages: an assistant turn is empty")
    return messages


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
        found = f"the fields {_shown(sorted(turn))}" if isinstance(turn, dict) else _kind(turn)
        raise ValueError(f"{where}: expected role and content, found {found}")
    if turn["role"] not in ROLES:
        raise ValueError(f"{where}.role: expected {' or '.join(ROLES)}, found {_shown(turn['role'])}")
    content = turn["content"]
    if isinstance(content, list):
        return {
            "role": turn["role"],
            "content": [_part(p, f"{where}.content[{j}]", turn["role"]) for j, p in enumerate(content)],
        }
    return {"role": turn["role"], "content": _text(content, f"{where}.content")}


def _part(part: Any, where: str, role: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else part
    if kind == "image":
        if role == "assistant":
            raise ValueError(f"{where}: an image in an assistant turn")
        return {"type": "image"}
    if kind != "text":
        raise ValueError(f"{where}.type: expected text or image, found {_shown(kind)}")
    marked = {"attribute": _text(part["attribute"], f"{where}.attribute")} if "attribute" in part else {}
    return {"type": "text", "text": _text(part.get("text"), f"{where}.text"), **marked}


def _parts(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _kind(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _shown(value: Any) -> str:
    """A value of an untrusted file for a message: short and printable."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
