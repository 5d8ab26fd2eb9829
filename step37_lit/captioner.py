"""`Step37Captioner`: pictures in, captions out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from step37_lit.batch import Sample
from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError, require
from step37_lit.generation import Completion, Generator
from step37_lit.hub.load import load_hub_model
from step37_lit.hub.text_files import TEMPLATE_FILE, TOKENIZER_FILE
from step37_lit.images import WHITE, open_image
from step37_lit.model.step37_model import Step37Model
from step37_lit.processor import DEFAULT_PROMPT, Step37Processor
from step37_lit.sampling import GenerationSettings
from step37_lit.saved_model import read_checkpoint
from step37_lit.text_file import read_text
from step37_lit.tokenizer import Step37Tokenizer

Picture = str | Path | Image.Image | Tensor


class Step37Captioner:
    """Captions pictures with one process.

        captioner = Step37Captioner.from_checkpoint("runs/scenes_tiny")
        captioner("photo.jpg")                             "A dog runs ..."
        captioner(["a.jpg", "b.jpg"], num_beams=3)         ["...", "..."]
        captioner([["before.jpg", "after.jpg"]], prompt="What has changed?")      one answer about two pictures

    Args:
        model: The whole model.
        processor: Its processor.
        prompt: What is asked where a call does not say.
        batch_size: Rows that are decoded together.
    """

    def __init__(
        self,
        model: Step37Model,
        processor: Step37Processor,
        prompt: str = DEFAULT_PROMPT,
        batch_size: int = 16,
    ):
        self.model, self.processor, self.prompt = model, processor, prompt
        self.generator = Generator(model, processor.tokenizer, batch_size)

    @classmethod
    def from_checkpoint(cls, path: str | Path, dtype: torch.dtype = torch.float32, **options: Any) -> Step37Captioner:
        """Of a run's folder or one of its checkpoints; `options` are the constructor's, the prompt is training's."""
        saved = read_checkpoint(path, dtype)
        if saved.prompt is not None:
            options.setdefault("prompt", saved.prompt)
        return cls(saved.model, saved.processor, **options)

    @classmethod
    def from_hub(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        multicrop: bool = True,
        mtp: bool = False,
        **options: Any,
    ) -> Step37Captioner:
        """Of a hub folder with config.json, safetensors, tokenizer.json and, where it has one, chat_template.jinja.

        Its MTP layers are only there with `mtp`: the setting `speculate` needs them.
        """
        folder = Path(path)
        config = Step37Config.from_hub(folder)
        config = replace(config, text=replace(config.text, mtp=mtp))
        template = folder / TEMPLATE_FILE
        tokenizer = Step37Tokenizer.from_file(folder / TOKENIZER_FILE)
        model = load_hub_model(str(folder), dtype, config)
        text = read_text(template) if template.is_file() else None
        return cls(model, Step37Processor(tokenizer, model.step37, text, multicrop), **options)

    def __call__(
        self, images: Picture | Sequence[Picture | Sequence[Picture]], prompt: str | None = None, **settings: Any
    ) -> Any:
        """Captions one picture, or each entry of a list; an entry that is a list is one prompt about several.

        Args:
            images: A path, a PIL picture, uint8 [3, H, W], or a list.
            prompt: The question; None is the captioner's.
            settings: Fields of `GenerationSettings`.

        Returns:
            A string for one picture, a list for a list; lists in their place where `num_samples` is more than 1.

        Raises:
            ConfigError: a file that is not there, a tensor of another form, a setting that cannot be.
            ImageError: a file that is not a picture.
        """
        chosen = GenerationSettings(**settings)
        entries = list(images) if isinstance(images, list | tuple) else [images]
        prompts = [self.prompt_for(entry, prompt, key=str(number)) for number, entry in enumerate(entries)]
        texts: list[Any] = [[c.text for c in each] for each in self.complete(prompts, chosen)]
        if chosen.num_samples == 1:
            texts = [text for (text,) in texts]
        return texts if isinstance(images, list | tuple) else texts[0]

    def prompt_for(self, entry: Any, prompt: str | None = None, key: str = "") -> Sample:
        """The question about a picture, or about a list of them, as tokens and pixels."""
        pictures = [to_rgb(picture) for picture in (entry if isinstance(entry, list | tuple) else [entry])]
        parts = [{"type": "image"}] * len(pictures)
        question = [*parts, {"type": "text", "text": self.prompt if prompt is None else prompt}]
        return self.processor.prompt([{"role": "user", "content": question}], pictures, key=key)

    def complete(
        self,
        prompts: Sequence[Sample],
        settings: GenerationSettings | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """See `Generator.generate`."""
        return self.generator.generate(prompts, settings, on_done)


def to_rgb(picture: Picture) -> Image.Image:
    """A picture in any of the accepted forms, as RGB.

    Raises:
        ConfigError: no such file, or a tensor that is not uint8 [3, H, W].
        ImageError: a file that is not a picture.
    """
    if isinstance(picture, str | Path):
        require(Path(picture).is_file(), "picture", "a file", str(picture))
        return open_image(Path(picture).read_bytes())
    if isinstance(picture, Tensor):
        found = f"{picture.dtype} {list(picture.shape)}"
        fits = picture.dtype == torch.uint8 and picture.dim() == 3 and picture.shape[0] == 3
        require(fits, "picture", "uint8 [3, H, W]", found)
        return Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).cpu().numpy()))
    if not isinstance(picture, Image.Image):
        raise ConfigError("picture", "a path, a PIL picture or uint8 [3, H, W]", type(picture).__name__)
    upright = ImageOps.exif_transpose(picture)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    rgba = upright.convert("RGBA")
    page = Image.new("RGB", upright.size, WHITE)
    page.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
    return page
