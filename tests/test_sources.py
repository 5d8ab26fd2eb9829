"""What all sources share: no path leads out, keys, scenes, what is taken for what."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from webdataset.tariterators import base_plus_ext

from datamodules.scenes import ScenesDataModule
from datamodules.sources.base import MAX_KEY_BYTES, key_of
from datamodules.sources.detect import detect_format, open_source
from datamodules.sources.scenes import SceneSource
from step37_lit.errors import ConfigError
from tests.made_sources import (
    HEADER,
    PICTURE,
    WORDS,
    coco,
    draw,
    jsonl,
    opened,
    read,
    turns,
    write,
)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder whose neighbour must not be read."""
    draw(tmp_path / "outside" / "secret.jpg")
    inside = tmp_path / "inside"
    draw(inside / "a.jpg")
    (inside / "link.jpg").symlink_to(tmp_path / "outside" / "secret.jpg")
    (inside / "folder").symlink_to(tmp_path / "outside")
    (inside / "loop.jpg").symlink_to(inside / "loop.jpg")
    (inside / "within.jpg").symlink_to(inside / "a.jpg")
    os.mkfifo(inside / "pipe.jpg")
    (inside / "directory.jpg").mkdir()
    return inside


ESCAPES = {
    "../outside/secret.jpg": "expected a path inside the source's folder",
    "x/../../outside/secret.jpg": "expected a path inside the source's folder",
    "{absolute}/outside/secret.jpg": "expected a path inside the source's folder",
    "link.jpg": "'link.jpg' is a link that leads out of the source's folder",
    "folder/secret.jpg": "'folder/secret.jpg' is a link that leads out of the source's folder",
    "loop.jpg": "'loop.jpg': Too many levels of symbolic links",
    "pipe.jpg": "'pipe.jpg' is not a regular file",
    "directory.jpg": "'directory.jpg' is not a regular file",
    "x" * 300 + ".jpg": "File name too long",
    "pipe:echo secret.jpg": "No such file or directory",
    "http://localhost/secret.jpg": "No such file or directory",
}


@pytest.mark.parametrize("format", ["chat", "flickr8k", "coco"])
@pytest.mark.parametrize("name", ESCAPES)
def test_no_path_leads_out(trap: Path, format: str, name: str) -> None:
    expected, name = ESCAPES[name], name.format(absolute=trap.parent)
    names = ["a.jpg", name]
    if format == "chat":
        file = jsonl(trap / "x.jsonl", *({"messages": turns(PICTURE), "images": [image]} for image in names))
    elif format == "coco":
        images = [{"id": i, "file_name": image} for i, image in enumerate(names)]
        file = coco(trap, images, [{"image_id": i, "caption": "x"} for i in range(2)])
    else:
        file = write(trap / "captions.txt", HEADER + "".join(f"{image},x\n" for image in names))
    samples, bad = read(opened(file, format))
    assert len(samples) == 1 and len(bad) == 1 and expected in bad[0]


def test_a_folder_follows_no_link_out(trap: Path) -> None:
    for stem in ("a", "link", "loop", "pipe", "within"):
        write(trap / f"{stem}.txt", "words")
    samples, bad = read(opened(trap, "folder"))
    assert list(samples) == ["a", "within"]
    assert bad == [
        "folder: a link to a folder is not followed",
        "link.jpg, key link: 'link.jpg' is a link that leads out of the source's folder",
        "loop.jpg, key loop: 'loop.jpg': Too many levels of symbolic links",
        "pipe.jpg, key pipe: 'pipe.jpg' is not a regular file",
    ]


def test_pictures_elsewhere_only_when_the_user_names_the_folder(tmp_path: Path) -> None:
    draw(tmp_path / "pictures" / "a.jpg")
    file = jsonl(tmp_path / "texts" / "x.jsonl", {"messages": turns(PICTURE), "images": ["a.jpg"]})
    assert list(read(opened(file, "chat", tmp_path / "pictures"))[0]) == ["x-00000001"]
    for format in ("chat", "coco", "flickr8k"):
        with pytest.raises(ConfigError, match="--image-root: expected a folder"):
            opened(file, format, tmp_path / "none")


# Keys


@given(st.text(st.characters(codec=None), max_size=120))
def test_a_key_is_what_webdataset_takes_for_a_key(name: str) -> None:
    key = key_of(name)
    assert key.isprintable() and not set("./\\ ") & set(key) and len(key.encode()) <= MAX_KEY_BYTES
    assert key == key_of(name) and (not name or key)
    if key:
        assert base_plus_ext(f"{key}.0.jpg") == (key, "0.jpg")


def test_long_names_keep_different_keys() -> None:
    one, two = key_of("x" * 200 + "1"), key_of("x" * 200 + "2")
    assert one != two and one[:60] == two[:60] and len(one) == MAX_KEY_BYTES
    assert key_of("é" * 40) == "é" * 40 and len(key_of("é" * 41).encode()) <= MAX_KEY_BYTES


def test_two_samples_of_one_key_are_refused_by_both_names(tmp_path: Path) -> None:
    for name in ("a.b.jpg", "a_b.jpg"):
        draw(tmp_path / name)
    write(tmp_path / "captions.txt", HEADER + "a.b.jpg,x\na_b.jpg,y\n")
    with pytest.raises(
        ConfigError, match=r"key a_b: expected one sample .* 'captions.txt, line 2 and captions.txt, line 3'"
    ):
        read(opened(tmp_path, "flickr8k"))
    file = jsonl(tmp_path / "x.jsonl", *[{"messages": turns(WORDS), "id": 5}] * 2)
    with pytest.raises(ConfigError, match=r"key 5: expected one sample .* 'x.jsonl, line 1 and x.jsonl, line 2'"):
        read(opened(file, "chat"))


# Scenes


def test_scenes_are_those_that_the_data_module_renders() -> None:
    source = SceneSource(3, seed=4, split="unseen")
    samples, bad = read(source)
    assert list(samples) == ["unseen-4-00000000", "unseen-4-00000001", "unseen-4-00000002"] and bad == []
    rendered = ScenesDataModule(seed=4).samples("unseen")
    for index, sample in enumerate(samples.values()):
        messages = json.loads(sample["json"])["messages"]
        assert messages == rendered.messages(index)
        assert any("attribute" in part for part in messages[1]["content"])
        picture = Image.open(io.BytesIO(sample["png"]))
        assert picture.format == "PNG" and picture.tobytes() == rendered.picture(index).tobytes()


# Which source it is


def test_auto_detection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "flickr" / "captions.txt", HEADER)
    write(tmp_path / "flickr" / "other.csv", " Image, Caption \n")
    draw(tmp_path / "pairs" / "deep" / "a.jpg")
    write(tmp_path / "pairs" / "deep" / "a.txt", "x")
    for name in ("x.jsonl", "x.json"):
        write(tmp_path / name, "")
    monkeypatch.chdir(tmp_path)
    expected = {
        "flickr": "flickr8k",
        "flickr/captions.txt": "flickr8k",
        "flickr/other.csv": "flickr8k",
        "pairs": "folder",
        "x.jsonl": "chat",
        "x.json": "coco",
        "scenes": "scenes",
    }
    assert {source: detect_format(source) for source in expected} == expected


def test_auto_detection_refuses_what_is_not_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "both" / "a.jpg")
    write(tmp_path / "both" / "a.txt", "x")
    write(tmp_path / "both" / "captions.txt", HEADER)
    draw(tmp_path / "neither" / "a.jpg")
    write(tmp_path / "neither.txt", "words\n")
    draw(tmp_path / "scenes" / "a.jpg")
    write(tmp_path / "scenes" / "a.txt", "x")
    monkeypatch.chdir(tmp_path)
    expected = {
        "both": "flickr8k or folder",
        "neither": "something else",
        "neither.txt": "something else",
        "scenes": "folder or scenes",
    }
    for source, found in expected.items():
        with pytest.raises(ConfigError, match=f"{source}: SOURCE: expected what is clearly of one format.* '{found}'"):
            detect_format(source)
    with pytest.raises(ConfigError, match="SOURCE: expected a file, a folder, or the word scenes, found 'none'"):
        detect_format("none")
    assert detect_format("./scenes") == "folder"


def test_open_source_refuses_what_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", "")
    for format in ("chat", "coco", "flickr8k"):
        with pytest.raises(ConfigError, match="SOURCE: expected a file, found"):
            opened(tmp_path, format)
    with pytest.raises(ConfigError, match="SOURCE: expected a folder, found"):
        opened(tmp_path / "x.jsonl", "folder")
    with pytest.raises(ConfigError, match="--image-root: expected none for a folder"):
        opened(tmp_path, "folder", tmp_path)
    with pytest.raises(ConfigError, match="OUT: expected a folder outside of SOURCE"):
        open_source(str(tmp_path), "folder", None, tmp_path / "shards")
