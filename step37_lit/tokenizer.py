"""`Step37Tokenizer`: text to token ids and back, from a `tokenizer.json`, with the special tokens kept apart.

Text that a person wrote never becomes a special token: `encode` spells `<im_patch>` in a caption with ordinary tokens.
Special tokens are put in by name (`special_ids`), which only the processor does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from step37_lit.config import TokenIds
from step37_lit.errors import ConfigError, require
from step37_lit.text_file import read_text, written_whole

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
IMAGE_START, IMAGE_PATCH, IMAGE_END = "<im_start>", "<im_patch>", "<im_end>"
PATCH_START, PATCH_NEWLINE, PATCH_END = "<patch_start>", "<patch_newline>", "<patch_end>"

# In this order from id 0 in a trained tokenizer; `step37_lit.presets.TINY_TOKENS` says the same.
SPECIAL_TOKENS = (
    BOS, EOS, PAD, IMAGE_START, IMAGE_PATCH, IMAGE_END, PATCH_START, PATCH_NEWLINE, PATCH_END, TURN_END, TURN_START,
)  # fmt: skip
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256  # and every byte

# Name of a special token for each field of TokenIds; any of the ids in `eos` ends a turn.
NAMES: dict[str, str] = {
    "bos": BOS,
    "im_start": IMAGE_START,
    "im_patch": IMAGE_PATCH,
    "im_end": IMAGE_END,
    "patch_start": PATCH_START,
    "patch_newline": PATCH_NEWLINE,
    "patch_end": PATCH_END,
}


def added_tokens(parsed: Any, file: str | Path | None = None) -> dict[str, int]:
    """Ids by name of the `added_tokens` of a parsed `tokenizer.json`. Raises `ConfigError` where they are none."""
    entries = parsed.get("added_tokens") if isinstance(parsed, dict) else None
    ids: dict[str, int] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        name, number = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or type(number) is not int or number < 0:
            raise ConfigError("tokenizer.added_tokens", "objects with content and id", entry, file=file)
        ids[name] = number
    return ids


class Step37Tokenizer:
    """A tokenizer whose special tokens have the model's names.

    Args:
        content: Text of a `tokenizer.json`; kept as an attribute of this name.
        file: Where it is from, for messages.

    Raises:
        ConfigError: it is not a tokenizer, or a special token of the model is missing.
    """

    def __init__(self, content: str, file: str | Path | None = None):
        self.file = file
        try:
            parsed = json.loads(content)
            self._whole = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ConfigError("tokenizer", "a tokenizer.json", str(error), file=file) from error
        self.content = content
        self.special_ids = added_tokens(parsed, file)
        for name in (*NAMES.values(), TURN_START, TURN_END):
            if name not in self.special_ids:
                raise ConfigError("tokenizer.added_tokens", f"the special token {name}", None, file=file)
        # Without the special tokens and what a post-processor adds: for text that a person wrote.
        plain = {**parsed, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        names = sorted(self.special_ids, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(re.escape(name) for name in names))

    @classmethod
    def from_file(cls, path: str | Path) -> Step37Tokenizer:
        """Reads a `tokenizer.json`. Raises `ConfigError` where there is none or a special token is missing."""
        path = Path(path)
        require(path.is_file(), "tokenizer", "a file", str(path))
        return cls(read_text(path), file=path)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Step37Tokenizer:
        """A byte-level BPE with the special tokens first; the same texts give the same tokenizer.

        Args:
            texts: What to learn the merges from.
            vocab_size: Largest number of tokens; fewer come out when the texts hold no more pairs.
        """
        require(vocab_size >= SMALLEST_VOCABULARY, "vocab_size", f"{SMALLEST_VOCABULARY} or more", vocab_size)
        trained = tokenizers.Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        trained.train_from_iterator(texts, trainer)
        return cls(trained.to_str(pretty=True))

    def save(self, path: str | Path) -> None:
        """Writes the `tokenizer.json`; the file is whole or absent."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as staged:
            staged.write_text(self.content, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Tokens, special ones included."""
        return self._whole.get_vocab_size(with_added_tokens=True)

    def check_ids(self, tokens: TokenIds, vocab_size: int) -> None:
        """Raises `ConfigError` unless the model has this tokenizer's ids and its embedding holds every token."""
        for field, name in NAMES.items():
            expected, found = getattr(tokens, field), self.special_ids[name]
            if found != expected:
                raise ConfigError(f"id of {name}", f"{expected} (tokens.{field} of the model)", found, file=self.file)
        if self.special_ids[TURN_END] not in tokens.eos:
            raise ConfigError(f"id of {TURN_END}", f"in tokens.eos {tokens.eos}", self.special_ids[TURN_END], self.file)
        if self.vocab_size > vocab_size:
            raise ConfigError(
                "tokens of the tokenizer", f"at most text.vocab_size {vocab_size}", self.vocab_size, self.file
            )

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of ordinary tokens, and for each the (start, end) characters of `text` that it spells."""
        encoding = self._plain.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def split_special(self, text: str) -> list[tuple[int, int, int | None]]:
        """Cuts `text` at special tokens: (start, end, id), with id None for the stretches in between."""
        pieces: list[tuple[int, int, int | None]] = []
        at = 0
        for match in self._special_pattern.finditer(text):
            if match.start() > at:
                pieces.append((at, match.start(), None))
            pieces.append((match.start(), match.end(), self.special_ids[match.group()]))
            at = match.end()
        return pieces + [(at, len(text), None)] * (at < len(text))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self._whole.decode(list(ids), skip_special_tokens=skip_special)
