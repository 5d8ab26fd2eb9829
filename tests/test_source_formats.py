"""Flickr8k, COCO, chat and folders: what each takes, and every bad line by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from datamodules.sources.base import MAX_LINE_BYTES
from step37_lit.errors import ConfigError
from tests.made_sources import (
    HEADER,
    PICTURE,
    WORDS,
    bad_lines,
    coco,
    draw,
    jsonl,
    opened,
    read,
    turns,
    write,
)

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
