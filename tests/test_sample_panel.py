"""`SamplePanel`: what TensorBoard gets to show, and when it gets nothing."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import trainer_arguments

from callbacks.caption_metrics import CaptionMetrics
from callbacks.sample_panel import SamplePanel, markdown, reference
from callbacks.sample_sheet import TEXT_HEIGHT, TILE
from datamodules.scenes import ScenesDataModule
from step37_lit import ConfigError, MegatronStrategy, Step37LitModule

TAG = "val/captions_seen"


def fit(folder: Path, *callbacks: pl.Callback, **changed: Any) -> ScenesDataModule:
    data = ScenesDataModule(num_steps=4, val_samples=12, samples_per_pack=4, microbatches=1)
    arguments = trainer_arguments(folder, max_steps=4, val_check_interval=2, **changed)
    trainer = pl.Trainer(strategy=MegatronStrategy(), callbacks=list(callbacks), **arguments)
    trainer.fit(Step37LitModule(preset="tiny", warmup_steps=1, seed=3), datamodule=data)
    return data


@pytest.mark.parametrize("panel_first", [True, False])
def test_tensorboard_has_pictures_and_captions(tmp_path: Path, panel_first: bool) -> None:
    captioning = CaptionMetrics(max_samples=8, loader=1, max_new_tokens=10)
    callbacks = [SamplePanel(5), captioning] if panel_first else [captioning, SamplePanel(5)]
    logger = TensorBoardLogger(tmp_path, name="board", version="")
    data = fit(tmp_path, *callbacks, logger=logger, num_sanity_val_steps=2)
    events = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0, "tensors": 0}).Reload()
    assert events.Tags()["images"] == [TAG]
    images, texts = events.Images(TAG), events.Tensors(f"{TAG}/text_summary")
    assert [entry.step for entry in images] == [entry.step for entry in texts] == [2, 4]  # and none of a sanity check
    samples = data.samples("seen")
    pictures = [samples.picture(number).resize((TILE - 4, TILE - 4), Image.Resampling.NEAREST) for number in range(5)]
    for image, text in zip(images, texts, strict=True):
        sheet = np.array(Image.open(io.BytesIO(image.encoded_image_string)))
        assert sheet.shape == (2 * (TILE + TEXT_HEIGHT), 4 * TILE, 3)
        for number in range(5):
            side = TILE - 4
            x, y = number % 4 * TILE + 2, number // 4 * (TILE + TEXT_HEIGHT) + 2
            shown = sheet[y : y + side, x : x + side].astype(float)
            distance = [np.abs(shown - np.array(pictures[other])).mean() for other in (number, number - 1)]
            assert distance[0] < 12 < distance[1]  # measured: at most 7 (JPEG), another picture at least 31
            assert (sheet[y + side + 4 : y + side + 100, x : x + side] < 128).any()  # words below it
        rows = read_captions(tmp_path, image.step)
        assert text.tensor_proto.string_val[0].decode() == markdown([rows[f"seen-0-{n}"] for n in range(5)])


def read_captions(folder: Path, step: int) -> dict[str, dict[str, Any]]:
    lines = (folder / "captions" / f"step_{step:06d}_seen.jsonl").read_text().splitlines()
    return {row["key"]: row for row in map(json.loads, lines)}


def test_a_caption_is_text_and_no_markup() -> None:
    row = {"key": "a", "references": ["one", "x & y"], "cider_d": 0.5}
    shown = markdown([row | {"caption": "<script>alert(1)</script> | *b*\n# c"}]).splitlines()
    assert len(shown) == 3
    script = "&#60;script&#62;alert(1)&#60;/script&#62; &#124; &#42;b&#42; &#35; c"
    assert shown[2] == f"| a | {script} | one | 0.50 |"
    assert reference(row | {"caption": "x & y"}) == "x & y"


def test_without_tensorboard_it_says_so_once(tmp_path: Path) -> None:
    panel = SamplePanel(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, CaptionMetrics(max_samples=4, max_new_tokens=4), panel)
    said = [str(warning.message) for warning in caught if "SamplePanel" in str(warning.message)]
    assert said == ["SamplePanel: the Trainer has no TensorBoardLogger, so no pictures are shown"]
    assert len(list((tmp_path / "captions").glob("*.jsonl"))) == 2


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected callbacks.caption_metrics.CaptionMetrics beside SamplePanel"):
        fit(tmp_path, SamplePanel())
    with pytest.raises(ConfigError, match=r"sample_panel.count: expected at most 6 .*, found 8"):
        fit(tmp_path, SamplePanel(), CaptionMetrics(max_samples=6))
    with pytest.raises(ConfigError, match=r"sample_panel.count: expected a positive number, found 0"):
        SamplePanel(0)
    assert {path.name for path in tmp_path.iterdir()} <= {
        "tokenizer.json"
    }  # the data module's, before a callback is asked
