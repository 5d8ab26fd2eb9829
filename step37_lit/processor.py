"""`Step37Processor`: chat messages and pictures -> token ids, loss mask and uint8 pixels.

A message is `{"role": "system" | "user" | "assistant", "content": C}`. C is a string or a list of parts:

    {"type": "text", "text": "a red "}                    words
    {"type": "text", "text": "circle", "attribute": "shape"}   words whose accuracy is measured, by kind
    {"type": "image"}                                     the next picture

A chat template (Jinja, sandboxed) turns messages into text, with one `<im_patch>` where a picture belongs; the
processor puts `<im_start>`, the picture's `<im_patch>` tokens and `<im_end>` there. With multicrop the local patches
come first, each as `<patch_start>`, its `<im_patch>` tokens and `<patch_end>`, with a `<patch_newline>` behind every
row but the last. Special tokens that an author wrote stay text.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from step37_lit.batch import ImageForInsert, Sample
from step37_lit.chat_template import ChatTemplate
from step37_lit.config import Step37Config
from step37_lit.errors import require
from step37_lit.multicrop import RESIZE_MODES, ResizeMode, crop_image, pixels_of, plan_crops, resize_pixels
from step37_lit.tokenizer import BOS, IMAGE_PATCH, TURN_END, Step37Tokenizer

__all__ = ["DEFAULT_CHAT_TEMPLATE", "DEFAULT_PROMPT", "Message", "Step37Processor", "crop_image", "plan_crops"]

DEFAULT_PROMPT = "Describe the picture."  # the question that a caption answers
ROLES = ("system", "user", "assistant")

DEFAULT_CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}{%- for part in content -%}{{ part.text if part.type == "text" else "<im_patch>" }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
{{- "<|im_start|>" + message.role + "\\n" + render(message.content) + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""

# A Unicode noncharacter, never used in text: stands behind each "<" of an author's, so that no special token is found.
ESCAPE = "\ufdd0"

Message = Mapping[str, Any]


@dataclass
class _Text:
    """A rendered conversation: author's text still escaped, positions in characters."""

    text: str
    learnt: list[tuple[int, int]] = field(default_factory=list)  # assistant turns with their end-of-turn token
    attributes: list[tuple[str, int, int]] = field(default_factory=list)  # kind, start, end


@dataclass
class _Tokens:
    """Token ids and the characters that each comes from, ascending; a picture's tokens all come from its marker."""

    ids: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], start: int, end: int) -> None:
        self.ids += ids
        self.starts += [start] * len(ids)
        self.ends += [end] * len(ids)


class Step37Processor:
    """From messages and pictures to a `Sample`; the same in the loader, in generation and in notebooks.

    Args:
        tokenizer: Its special tokens must have the ids of `config.tokens`.
        config: The model whose image size, image tokens and vocabulary are used.
        chat_template: Jinja text; None is the model's own format.
        multicrop: Local patches beside the global view (`step37_lit.multicrop`).
        resize: `exact` (Pillow's) or `fast` (torch's, for loaders), see `step37_lit.multicrop.resize_pixels`.

    Raises:
        ConfigError: tokenizer and model disagree, the template does not parse, `resize` is unknown, or the model's
            `crop_size` cannot be used.
    """

    def __init__(
        self,
        tokenizer: Step37Tokenizer,
        config: Step37Config,
        chat_template: str | None = None,
        multicrop: bool = False,
        resize: ResizeMode = "exact",
    ):
        tokenizer.check_ids(config.tokens, config.text.vocab_size)
        require(resize in RESIZE_MODES, "resize", " or ".join(RESIZE_MODES), resize)
        crop, patch = config.vision.crop_size, config.vision.patch_size
        require(not multicrop or crop % patch == 0, "vision.crop_size", f"a multiple of patch_size {patch}", crop)
        self.tokenizer, self.config = tokenizer, config
        self.chat_template = DEFAULT_CHAT_TEMPLATE if chat_template is None else chat_template
        self.multicrop, self.resize = multicrop, resize
        self._first_characters = re.compile("[" + re.escape("".join({name[0] for name in tokenizer.special_ids})) + "]")
        self._template = ChatTemplate(self.chat_template)

    def __call__(self, messages: Sequence[Message], images: Sequence[Image.Image] = (), key: str = "") -> Sample:
        """A sample to learn from: every assistant turn, with its end-of-turn token, is in the loss mask.

        Args:
            messages: At least one assistant turn.
            images: Pictures in the order of the image parts.
            key: Name of the sample.

        Raises:
            ConfigError: a message is malformed, pictures and image parts differ in number, a picture is neither RGB nor
                gray, or the template does not keep earlier turns as they are.
            ImageError: with multicrop, a picture so thin that the square it is padded to has too many pixels.
        """
        return self._sample(self._conversation(messages, len(images)), images, key)

    def length(self, messages: Sequence[Message], image_sizes: Sequence[tuple[int, int]] = ()) -> int:
        """Tokens of the sample that `__call__` makes, from the sizes of its pictures alone.

        Args:
            messages: As for `__call__`.
            image_sizes: (width, height) of each picture as it is shown (`step37_lit.images.read_header`).

        Raises:
            ConfigError: as `__call__`.
        """
        return len(self._tokenize(self._conversation(messages, len(image_sizes)), image_sizes).ids)

    def fingerprint(self) -> str:
        """16 hex digits over all that decides how many tokens given messages and picture sizes become."""
        vision = self.config.vision
        sides = [vision.image_size, vision.crop_size] if self.multicrop else [vision.image_size]
        parts = {
            "tokenizer": self.tokenizer.content,
            "chat_template": self.chat_template,
            "multicrop": self.multicrop,
            "image_tokens": [[side, vision.num_tokens(side)] for side in sides],
            "token_ids": dataclasses.asdict(self.config.tokens),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def prompt(self, messages: Sequence[Message], images: Sequence[Image.Image] = (), key: str = "") -> Sample:
        """A sample to continue: ends where the assistant's answer starts, nothing is in the loss mask."""
        _check(messages, len(images))
        return self._sample(_Text(self._render(self._escaped(messages), add_generation_prompt=True)), images, key)

    def pixels(self, image: Image.Image) -> Tensor:
        """The global view without multicrop: uint8 [1, 3, image_size, image_size], whatever the aspect ratio."""
        side = self.config.vision.image_size
        return resize_pixels(pixels_of(image), side, side, self.resize).contiguous()

    def _images(self, image: Image.Image) -> list[ImageForInsert]:
        """What goes in behind the picture's start tokens, in their order."""
        ids, vision = self.config.tokens, self.config.vision
        if not self.multicrop:
            return [ImageForInsert(ids.im_start, self.pixels(image))]
        view, patches = crop_image(image, vision.image_size, vision.crop_size, self.resize)
        local = [ImageForInsert(ids.patch_start, patches)] if len(patches) else []
        return [*local, ImageForInsert(ids.im_start, view[None])]

    def _image_tokens(self, width: int, height: int) -> list[int]:
        """The tokens that stand for a picture of this size."""
        ids, vision = self.config.tokens, self.config.vision
        view = [ids.im_start, *[ids.im_patch] * vision.num_tokens(vision.image_size), ids.im_end]
        if not self.multicrop:
            return view
        plan = plan_crops(width, height, vision.image_size, vision.crop_size, vision.patch_size)
        patch = [ids.patch_start, *[ids.im_patch] * vision.num_tokens(vision.crop_size), ids.patch_end]
        local: list[int] = []
        for number in range(plan.patches):
            local += patch + [ids.patch_newline] * (number in plan.newline_after)
        return local + view

    def _sample(self, text: _Text, images: Sequence[Image.Image], key: str) -> Sample:
        tokens = self._tokenize(text, [image.size for image in images])
        mask = torch.zeros(len(tokens.ids), dtype=torch.float32)
        for first, last in text.learnt:
            mask[bisect.bisect_left(tokens.starts, first) : bisect.bisect_left(tokens.starts, last)] = 1.0
        spans: dict[str, list[list[int]]] = {}
        for kind, first, last in text.attributes:
            span = [bisect.bisect_right(tokens.ends, first), bisect.bisect_left(tokens.starts, last)]
            spans.setdefault(kind, []).append(span)
        return Sample(
            key=key,
            input_ids=torch.tensor(tokens.ids, dtype=torch.int64),
            loss_mask=mask,
            images=[entry for image in images for entry in self._images(image)],
            attribute_spans={kind: torch.tensor(words) for kind, words in spans.items()},
        )

    def _tokenize(self, text: _Text, image_sizes: Sequence[tuple[int, int]]) -> _Tokens:
        """Special tokens by name, everything else as plain text, cut where an answer starts as in generation."""
        pictures = [self._image_tokens(*size) for size in image_sizes]
        tokens, markers = _Tokens(), 0
        cuts = [0, *(first for first, _ in text.learnt), len(text.text)]
        for begin, stop in itertools.pairwise(cuts):
            for start, end, special in self.tokenizer.split_special(text.text[begin:stop]):
                start, end = begin + start, begin + end
                if special is None:
                    self._add_plain(tokens, text.text[start:end], start)
                elif special == self.config.tokens.im_patch:
                    tokens.add(pictures[markers] if markers < len(pictures) else [], start, end)
                    markers += 1
                else:
                    tokens.add([special], start, end)
        expected = f"{len(pictures)} (images given)"
        require(markers == len(pictures), f"{IMAGE_PATCH} in the chat template's text", expected, markers)
        return tokens

    def _add_plain(self, tokens: _Tokens, escaped: str, start: int) -> None:
        # Index of each character in the escaped text, and of its end.
        kept = [i for i, character in enumerate(escaped) if character != ESCAPE]
        ids, offsets = self.tokenizer.encode(escaped.replace(ESCAPE, ""))
        for token, (first, last) in zip(ids, offsets, strict=True):
            tokens.add([token], start + kept[first], start + kept[last - 1] + 1)

    def _conversation(self, messages: Sequence[Message], num_images: int) -> _Text:
        """Renders turn by turn, so that each answer's place in the whole text is known whatever the template does."""
        _check(messages, num_images)
        roles = [message["role"] for message in messages]
        require("assistant" in roles, "messages", "an assistant turn", roles)
        escaped = self._escaped(messages)
        whole = _Text(self._render(escaped))
        for i, message in enumerate(escaped):
            if message["role"] != "assistant":
                continue
            before = self._render(escaped[:i], add_generation_prompt=True)
            through = self._render(escaped[: i + 1])
            kept = through.startswith(before) and whole.text.startswith(through)
            require(kept, "chat_template", "earlier text kept when a turn is added", f"other text at turn {i}")
            turn = through[len(before) :]
            require(TURN_END in turn, "chat_template", f"{TURN_END} at the end of assistant turn {i}", turn)
            whole.learnt.append((len(before), len(before) + turn.rindex(TURN_END) + len(TURN_END)))
            self._find_attributes(whole, message["content"], turn, len(before))
        return whole

    def _find_attributes(self, whole: _Text, content: str | list[dict[str, Any]], turn: str, start: int) -> None:
        if isinstance(content, str):
            return
        texts = [part for part in content if part["type"] == "text"]
        if not any("attribute" in part for part in texts):
            return
        joined = "".join(part["text"] for part in texts)
        require(joined in turn, "chat_template", "an assistant turn's words kept as they are", turn)
        at = start + turn.index(joined)
        for part in texts:
            if "attribute" in part:
                whole.attributes.append((part["attribute"], at, at + len(part["text"])))
            at += len(part["text"])

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        return self._template.render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=BOS,
            eos_token=TURN_END,
            tools=None,
        )

    def _escaped(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        def content_of(content: Any) -> Any:
            if isinstance(content, str):
                return self._escape(content)
            return [
                {**part, "text": self._escape(part["text"])} if part["type"] == "text" else part for part in content
            ]

        return [{**message, "content": content_of(message["content"])} for message in messages]

    def _escape(self, text: str) -> str:
        require(ESCAPE not in text, "text", "no noncharacter U+FDD0", text)
        return self._first_characters.sub(lambda match: match.group() + ESCAPE, text)


def _check(messages: Sequence[Message], num_images: int) -> None:
    """Raises `ConfigError` for malformed messages or another number of pictures than image parts."""
    require(len(messages) > 0, "messages", "at least one", 0)
    parts = 0
    for i, message in enumerate(messages):
        for name in ("role", "content"):
            require(name in message, f"messages[{i}]", f"a field {name}", sorted(message))
        require(message["role"] in ROLES, f"messages[{i}].role", " or ".join(ROLES), message["role"])
        content = message["content"]
        require(
            isinstance(content, str | list), f"messages[{i}].content", "text or a list of parts", type(content).__name__
        )
        for j, part in enumerate([] if isinstance(content, str) else content):
            where = f"messages[{i}].content[{j}]"
            kind = part["type"] if isinstance(part, Mapping) and "type" in part else part
            require(kind in ("text", "image"), f"{where}.type", "text or image", kind)
            is_text = kind == "image" or ("text" in part and isinstance(part["text"], str))
            require(is_text, f"{where}.text", "text", part)
            parts += kind == "image"
    require(parts == num_images, "image parts in messages", f"{num_images} (images given)", parts)
