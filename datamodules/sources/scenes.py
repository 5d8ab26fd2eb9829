"""Rendered scenes as a source: the samples that `ScenesDataModule` trains on, as PNG and JSON."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import PIL

from datamodules.scene_world import Split
from datamodules.scenes import SceneSamples, ScenesDataModule
from datamodules.sources.base import BadItem, Item, Ref, Source, to_json


@functools.cache
def scene_samples(preset: str, seed: int, split: Split) -> SceneSamples:
    return ScenesDataModule(preset=preset, seed=seed).samples(split)


@dataclass(frozen=True)
class SceneImage:
    """A picture that is rendered when it is read."""

    samples: SceneSamples
    index: int
    suffix: str = "png"
    size: int = 0

    @property
    def stamp(self) -> tuple[int, ...]:
        return (self.index,)

    def read(self) -> bytes:
        buffer = io.BytesIO()
        self.samples.picture(self.index).save(buffer, "PNG")
        return buffer.getvalue()


class SceneSource(Source):
    """A ref is (index,). `attribute` marks of the answers are kept.

    Args:
        num_samples: Scenes.
        seed: Seed of the scenes.
        split: `train`, `seen` or `unseen`.
        preset: The model whose image size is used.
    """

    format = "scenes"
    sized = False

    def __init__(self, num_samples: int, seed: int = 0, split: Split = "train", preset: str = "tiny"):
        self.num_samples, self.seed, self.split, self.preset = num_samples, seed, split, preset
        self.name = f"scenes-{split}"

    def settings(self) -> dict[str, Any]:
        # Another Pillow may draw or compress in another way, and nothing else of a scene is stamped.
        names = ("num_samples", "seed", "split", "preset")
        return {name: getattr(self, name) for name in names} | {"pillow": PIL.__version__}

    def refs(self) -> Iterator[Ref | BadItem]:
        for index in range(self.num_samples):
            yield (index,)

    def item(self, ref: Ref) -> Item:
        (index,) = ref
        samples = scene_samples(self.preset, self.seed, self.split)
        texts = {"json": to_json({"messages": samples.messages(index)})}
        return Item(f"{self.split}-{self.seed}-{index:08d}", f"scene {index}", texts, [SceneImage(samples, index)])
