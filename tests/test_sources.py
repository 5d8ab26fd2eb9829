"""Sources of samples: what each takes, how keys are made, what is refused by name, and that no path leads outside."""

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
from datamodules.shards.write_plan import Limit, plan_shards
from datamodules.shards.writer import members
from datamodules.sources.base import MAX_KEY_BYTES, MAX_LINE_BYTES, BadItem, Source, key_of
from datamodules.sources.detect import detect_format, open_source
from datamodules.sources.scenes import SceneSource
from step37_lit.config import ConfigError

OUT = Path("/nowhere")
HEADER = "image,caption\n"


def draw(path: Path, color: str = "red", format: str | None = None) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), color).save(path, format)
    return path.read_bytes()


def write(path: Path, content: str | bytes | dict | list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict | list):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(source: Source) -> tuple[dict[str, dict[str, bytes]], list[str]]:
    """Members of every good sample by key, in order, and every bad one's line."""
    plan = plan_shards(source, Limit(shard_samples=100), "skip")
    samples, bad = {}, [str(bad) for bad in plan.skipped]
    for entry in plan.entries():
        try:
            samples[entry.key] = members(source, entry)
        except BadItem as error:
            bad.append(str(error))
    return samples, bad


def bad_lines(source: Source) -> list[str]:
    return [str(ref) for ref in _all(source) if isinstance(ref, BadItem)]


def _all(source: Source):
    for ref in source.refs():
        try:
            yield ref if isinstance(ref, BadItem) else source.item(ref)
        except BadItem as bad:
            yield bad


def opened(path: Path, format: str, root: Path | None = None) -> Source:
    return open_source(str(path), format, None if root is None else str(root), OUT)


# Flickr8k


@pytest.mark.parametrize("folder", ["images", "Images", "."])
def test_flickr8k(tmp_path: Path, folder: str) -> None:
    one, two = draw(tmp_path / folder / "one.v2.jpg"), draw(tmp_path / folder / "two.JPG", "blue")
    lines = '\ufeffimage,caption\r\none.v2.jpg,"A dog , ""Rex"" ."\r\ntwo.JPG,a cat\r\none.v2.jpg,Ein Hündchen\r\n\r\n'
    write(tmp_path / "captions.txt", lines)
    samples, bad = read(opened(tmp_path, "flickr8k"))
    assert list(samples) == ["one_v2", "two"] and bad == []
    assert samples["one_v2"]["jpg"] == one and samples["two"]["jpg"] == two
    assert json.loads(samples["one_v2"]["json"]) == {"captions": ['A dog , "Rex" .', "Ein Hündchen"]}
    assert samples == read(opened(tmp_path / "captions.txt", "flickr8k"))[0]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"a.jpg,", "captions.txt, line 3: caption: empty"),
        (b"a.jpg,  ", "captions.txt, line 3: caption: empty"),
        (b"a.jpg", "captions.txt, line 3: expected 2 fields (image,caption; a comma needs quotes), found 1"),
        (b"a.jpg,a dog, red", "captions.txt, line 3: expected 2 fields (image,caption; a comma needs quotes), found 3"),
        (b'a.jpg,"a dog', "captions.txt, line 3: not CSV: unexpected end of data"),
        (b'a.jpg,"a" dog', "captions.txt, line 3: not CSV: ',' expected after '\"'"),
        (b"a.jpg,caf\xe9", "captions.txt, line 3: not UTF-8: unexpected end of data at byte 9 of the line"),
        (b"a.jpg,a\0b", "captions.txt, line 3: caption: NUL at character 1"),
        (b"b.jpg,no such", "captions.txt, line 3, key b: 'b.jpg': No such file or directory"),
        (b",no name", "captions.txt, line 3, key : expected a picture (jpg, jpeg, png, webp), found ''"),
        (b"a.gif,a gif", "captions.txt, line 3, key a: expected a picture (jpg, jpeg, png, webp), found 'a.gif'"),
        (b"a.jpg," + b"x" * 200_000, "captions.txt, line 3: not CSV: field larger than field limit (131072)"),
        (b"a.jpg," + b"x" * (MAX_LINE_BYTES + 10**6), f"line 3: expected a line of at most {MAX_LINE_BYTES} bytes"),
    ],
)
def test_a_bad_line_of_flickr8k_is_named_and_the_others_stay(tmp_path: Path, line: bytes, expected: str) -> None:
    draw(tmp_path / "images" / "a.jpg")
    write(tmp_path / "captions.txt", b"image,caption\na.jpg,one\n" + line + b"\na.jpg,two\n")
    samples, bad = read(opened(tmp_path, "flickr8k"))
    assert json.loads(samples["a"]["json"]) == {"captions": ["one", "two"]}
    (found,) = bad
    assert expected.replace(", key :", ":") in found and "\n" not in found


def test_flickr8k_refuses_another_file_and_unclear_folders(tmp_path: Path) -> None:
    write(tmp_path / "captions.txt", "image|caption\n")
    with pytest.raises(ConfigError, match=r"captions.txt: header: expected image,caption, found 'image\|caption'"):
        read(opened(tmp_path, "flickr8k"))
    for name in ("images", "Images"):
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match="one of images/ and Images/"):
        opened(tmp_path, "flickr8k")


def test_a_picture_folder_that_is_a_link_out_must_be_named(tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere" / "a.jpg")
    write(tmp_path / "set" / "captions.txt", HEADER + "a.jpg,a dog\n")
    (tmp_path / "set" / "images").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="--image-root: expected named, since the picture folder is a link out"):
        opened(tmp_path / "set", "flickr8k")
    samples, _ = read(opened(tmp_path / "set", "flickr8k", tmp_path / "elsewhere"))
    assert list(samples) == ["a"]


# COCO


def coco(tmp_path: Path, images: list, annotations: list) -> Path:
    return write(tmp_path / "captions_val.json", {"info": {}, "images": images, "annotations": annotations})


def test_coco(tmp_path: Path) -> None:
    pictures = tmp_path / "elsewhere"
    one = draw(pictures / "val" / "1.jpg")
    draw(pictures / "val" / "2.jpg")
    images = [{"id": 7, "file_name": "val/1.jpg", "height": 8}, {"id": 5, "file_name": "val/2.jpg"}]
    annotations = [
        {"image_id": 5, "id": 1, "caption": "a cat\n"},
        {"image_id": 7, "id": 2, "caption": "a dog"},
        {"image_id": 5, "id": 3, "caption": "cats"},
    ]
    samples, bad = read(opened(coco(tmp_path, images, annotations), "coco", pictures))
    assert list(samples) == ["val_1", "val_2"] and bad == []
    assert samples["val_1"] == {"json": b'{"captions": ["a dog"]}', "jpg": one}
    assert json.loads(samples["val_2"]["json"]) == {"captions": ["a cat", "cats"]}


GOOD_IMAGE, GOOD_ANNOTATION = {"id": 1, "file_name": "a.jpg"}, {"image_id": 1, "caption": "a dog"}


@pytest.mark.parametrize(
    ("images", "annotations", "expected"),
    [
        ([{"id": 2}], [], "captions_val.json, images[1]: expected an object with a file_name"),
        ([{"file_name": "b.jpg"}], [], "images[1]: expected id, a number or text, found None"),
        ([{"id": 1, "file_name": "b.jpg"}], [], "images[1]: id 1 is that of captions_val.json, images[0] too"),
        ([{"id": 2, "file_name": "b.jpg"}], [], "images[1], key b: no caption that can be used"),
        ([{"id": 2, "file_name": "b.jpg"}], [{"image_id": 2, "caption": "x"}], "images[1], key b: 'b.jpg': No such"),
        ([], [{"image_id": 9, "caption": "x"}], "annotations[1]: image_id 9 is not among the images"),
        ([], [{"image_id": 1, "caption": " "}], "annotations[1]: caption: empty"),
        ([], [{"image_id": 1, "caption": None}], "annotations[1]: expected an object with a caption"),
        ([], [{"image_id": [1], "caption": "x"}], "annotations[1]: expected image_id, a number or text, found [1]"),
        ([], [{"image_id": 1, "caption": "\ud800"}], "annotations[1]: 'utf-8' codec can't encode"),
        ([], ["x"], "annotations[1]: expected an object with a caption"),
    ],
)
def test_bad_parts_of_coco_are_named(tmp_path: Path, images: list, annotations: list, expected: str) -> None:
    draw(tmp_path / "a.jpg")
    file = coco(tmp_path, [GOOD_IMAGE, *images], [GOOD_ANNOTATION, *annotations])
    samples, bad = read(opened(file, "coco"))
    assert samples["a"]["json"] == b'{"captions": ["a dog"]}'
    (found,) = bad
    assert expected in found


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "SOURCE: expected a JSON file, found 'not JSON"),
        (b"\xff", "SOURCE: expected a JSON file, found 'not UTF-8"),
        ("[" * 100_000, "SOURCE: expected a JSON file, found 'not JSON: nested too deep'"),
        ("[]", "images: expected a list in an object, found 'something else'"),
        ('{"images": []}', "annotations: expected a list in an object, found 'something else'"),
        ('{"images": [], "annotations": []}', "SOURCE: expected samples, found 'none, and 0 bad ones'"),
    ],
)
def test_coco_refuses_another_file(tmp_path: Path, content: str | bytes, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(opened(write(tmp_path / "x.json", content), "coco"))
    assert expected.partition(", found")[0] in str(caught.value) and expected.partition("found ")[2] in str(
        caught.value
    )


# Chat


def turns(*parts: dict | str) -> list[dict]:
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "yes"}]


PICTURE, WORDS = {"type": "image"}, {"type": "text", "text": "Is it so?"}


def jsonl(path: Path, *lines: dict | bytes) -> Path:
    return write(path, b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))


def test_chat(tmp_path: Path) -> None:
    pictures = [draw(tmp_path / "p" / f"{i}.png", color) for i, color in enumerate(("red", "green", "blue"))]
    several = {
        "id": "a/b.c",
        "messages": turns(PICTURE, PICTURE, WORDS) + turns(WORDS, PICTURE),
        "images": ["p/2.png", "p/0.png", "p/1.png"],
        "licence": "CC0",
    }
    one = {"messages": turns(PICTURE, WORDS), "images": ["p/0.png"], "id": 12}
    samples, bad = read(opened(jsonl(tmp_path / "talk.jsonl", several, b"", one, {"messages": turns(WORDS)}), "chat"))
    assert list(samples) == ["a_b_c", "12", "talk-00000004"] and bad == []
    texts = json.loads(samples["a_b_c"].pop("json"))
    assert texts == {name: value for name, value in several.items() if name != "images"}
    assert samples["a_b_c"] == {"0.png": pictures[2], "1.png": pictures[0], "2.png": pictures[1]}
    assert set(samples["12"]) == {"json", "png"} and set(samples["talk-00000004"]) == {"json"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{", "chat.jsonl, line 2: not JSON"),
        (b"[]", "chat.jsonl, line 2: expected an object with a list of messages"),
        (b"{}", "chat.jsonl, line 2: expected an object with a list of messages"),
        (b'{"messages": "\xff"}', "chat.jsonl, line 2: not UTF-8"),
        (b"[" * 100_000, "chat.jsonl, line 2: not JSON: nested too deep"),
        (b'{"messages": [' + b"[" * 200 + b"]" * 200 + b"]}", "key chat-00000002: member json: JSON nested 202 deep"),
        (b'{"messages": [], "x": NaN}', "key chat-00000002: Out of range float values are not JSON compliant"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "key chat-00000002: 'utf-8' codec can't encode"),
        ({"messages": turns(WORDS), "images": "a.jpg"}, 'key chat-00000002: expected "images", a list of paths'),
        ({"messages": turns(WORDS), "id": True}, "line 2: expected an id of text or a number, found True"),
        ({"messages": turns(WORDS), "id": ""}, "line 2: expected an id of text or a number, found ''"),
        ({"messages": turns(PICTURE)}, "1 image parts in messages, 0 image members"),
        ({"messages": turns(WORDS), "images": ["a.jpg"]}, "0 image parts in messages, 1 image members"),
        ({"messages": [], "id": "k"}, "line 2, key k: member json: messages: expected a list of turns"),
        ({"messages": turns("x")}, "messages[0].content[0].type: expected text or image"),
        ({"messages": turns(PICTURE), "images": ["b.jpg"]}, "key chat-00000002: 'b.jpg': No such file or directory"),
        ({"messages": turns(PICTURE), "images": ["a.jpg\0"]}, "key chat-00000002: expected a "),
    ],
)
def test_a_bad_line_of_chat_is_named_and_the_others_stay(tmp_path: Path, line: dict | bytes, expected: str) -> None:
    draw(tmp_path / "a.jpg")
    good = {"messages": turns(PICTURE), "images": ["a.jpg"]}
    samples, bad = read(opened(jsonl(tmp_path / "chat.jsonl", good, line, good), "chat"))
    assert list(samples) == ["chat-00000001", "chat-00000003"]
    (found,) = bad
    assert expected in found and found.isprintable()


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path) -> None:
    good = {"messages": turns(WORDS)}
    file = jsonl(tmp_path / "chat.jsonl", b"x" * (MAX_LINE_BYTES + 1), good, b"y" * (2 * MAX_LINE_BYTES))
    samples, bad = read(opened(file, "chat"))
    assert list(samples) == ["chat-00000002"]
    assert bad == [
        f"chat.jsonl, line {n}: expected a line of at most {MAX_LINE_BYTES} bytes, found more" for n in (1, 3)
    ]


# A folder


def test_folder(tmp_path: Path) -> None:
    pictures = [draw(tmp_path / name) for name in ("b.png", "a.x.jpg", "sub/c.webp", "sup/f.jpg", "sub/d/e.jpg")]
    write(tmp_path / "b.txt", "a red bar\n")
    write(tmp_path / "a.x.json", {"caption": "red"})
    write(tmp_path / "sub" / "c.json", {"width": 12})
    write(tmp_path / "sub" / "c.txt", "the picture")
    for name in ("sup/f.txt", "sub/d/e.txt"):
        write(tmp_path / name, "deeper")
    for name in (".DS_Store", "._b.png", "notes.md", "Makefile"):
        write(tmp_path / name, "x")
    source = opened(tmp_path, "folder")
    samples, bad = read(source)
    assert list(samples) == ["a_x", "b", "sub_c", "sub_d_e", "sup_f"]
    assert bad == [] and source.left_out() == "; left out: 1 .md, 2 hidden, 1 no suffix"
    assert samples == {
        "a_x": {"json": b'{"caption": "red"}', "jpg": pictures[1]},
        "b": {"txt": b"a red bar\n", "png": pictures[0]},
        "sub_c": {"json": b'{"width": 12}', "txt": b"the picture", "webp": pictures[2]},
        "sub_d_e": {"txt": b"deeper", "jpg": pictures[4]},
        "sup_f": {"txt": b"deeper", "jpg": pictures[3]},
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["b.jpg"], ["b.jpg: no b.txt or b.json beside it"]),
        (["b.txt"], ["b.txt: no picture b.jpg (or jpeg, png, webp) beside it"]),
        (["b.gif", "b.txt"], ["b.gif, key b: expected a picture (jpg, jpeg, png, webp), found 'b.gif'"]),
        (["b.jpg", "b.txt", "b.TXT"], ["b.jpg, key b: expected one text file of a kind, found b.TXT, b.txt"]),
        (["b.jpg", "b.json"], ["b.jpg, key b: member json: not JSON: Expecting value: line 1 column 1 (char 0)"]),
    ],
)
def test_what_is_alone_or_broken_in_a_folder_is_named(tmp_path: Path, files: list[str], expected: list[str]) -> None:
    draw(tmp_path / "a.jpg")
    write(tmp_path / "a.txt", "a dog")
    for name in files:
        write(tmp_path / name, "words")
    samples, bad = read(opened(tmp_path, "folder"))
    assert list(samples) == ["a"] and bad == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "b.png, key b: member txt: caption: empty"),
        (b" \n", "b.png, key b: member txt: caption: empty"),
        (b"caf\xe9", "b.png, key b: member txt: not UTF-8 at byte 3"),
        (b"a\0b", "b.png, key b: member txt: caption: NUL at character 1"),
        (b"x" * 10_000_000, "b.png, key b: 'b.txt': expected at most 1048576 bytes of text, found 10000000"),
    ],
)
def test_bad_texts_of_a_folder(tmp_path: Path, text: bytes, expected: str) -> None:
    for stem, words in (("a", b"a dog"), ("b", text)):
        draw(tmp_path / f"{stem}.png")
        write(tmp_path / f"{stem}.txt", words)
    assert bad_lines(opened(tmp_path, "folder")) == [expected]


# Pictures


def _png_of_another_kind(path: Path) -> None:
    draw(path, format="PNG")


def _truncated(path: Path) -> None:
    path.write_bytes(draw(path)[:100])


def _gif(path: Path) -> None:
    draw(path, format="GIF")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_png_of_another_kind, "expected JPEG behind this suffix, found PNG"),
        (_truncated, "JPEG"),
        (_gif, "GIF"),
        (lambda path: path.write_bytes(b""), ""),
    ],
)
def test_a_bad_picture_is_named_when_its_bytes_are_read(tmp_path: Path, spoil, expected: str) -> None:
    for name in ("a.jpg", "b.jpg"):
        draw(tmp_path / "images" / name)
    spoil(tmp_path / "images" / "b.jpg")
    write(tmp_path / "captions.txt", HEADER + "a.jpg,x\nb.jpg,y\n")
    samples, bad = read(opened(tmp_path, "flickr8k"))
    (found,) = bad
    assert (
        list(samples) == ["a"] and found.startswith("captions.txt, line 3, key b, member jpg: ") and expected in found
    )


# Nothing outside


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
