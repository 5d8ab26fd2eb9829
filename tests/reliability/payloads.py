"""What runs code where a file is read without care: each makes a folder, the marker."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import jinja2
import torch
import yaml  # type: ignore[import-untyped]

from tests import tars


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.marker),))


def pickled(marker: Path) -> bytes:
    return pickle.dumps(Payload(marker))


def saved(marker: Path) -> bytes:
    """As `torch.save` writes it."""
    file = io.BytesIO()
    torch.save({"state": Payload(marker)}, file)
    return file.getvalue()


def module(marker: Path) -> str:
    """Source of a module that runs where it is imported."""
    return f"import os\nos.mkdir({str(marker)!r})\n\nclass Thing:\n    def __init__(self, **values):\n        pass\n"


# Of YAML; `{marker}` is the folder.
TAGS = {
    "apply": "!!python/object/apply:os.mkdir ['{marker}']",
    "new": "!!python/object/new:os.mkdir ['{marker}']",
    "long": "!<tag:yaml.org,2002:python/object/apply:os.mkdir> ['{marker}']",
    "module": "!!python/module:planted ''",
    "name": "!!python/name:planted.Thing ''",
    "object": "!!python/object:planted.Thing {{}}",
}
# Of Jinja.
TEMPLATES = {
    "globals": "{{ cycler.__init__.__globals__.os.mkdir('{marker}') }}",
    "lipsum": "{{ lipsum.__globals__['os'].mkdir('{marker}') }}",
    "self": "{{ self.__init__.__globals__.__builtins__.__import__('os').mkdir('{marker}') }}",
    "namespace": "{{ namespace.__init__.__globals__['__builtins__']['__import__']('os').mkdir('{marker}') }}",
    "filter": "{{ (cycler|attr('__init__')|attr('__globals__'))['os'].mkdir('{marker}') }}",
    "by map": "{% for g in [cycler]|map(attribute='__init__')|map(attribute='__globals__') %}"
    "{{ g['os'].mkdir('{marker}') }}{% endfor %}",
}


def outside_tar(kind: str) -> bytes:
    """A shard whose members lie outside of the folder that it is unpacked in."""
    good = tars.sample("good")
    (picture, pixels), (text, words) = tars.sample("k")
    named = {
        "..": [(f"../{picture}", pixels), (f"../{text}", words)],
        ".. within": [(f"a/../../{picture}", pixels), (f"a/../../{text}", words)],
        "absolute": [(f"{{marker}}/{picture}", pixels), (f"{{marker}}/{text}", words)],
        "symbolic link": [(tars.special("k.jpg", tarfile.SYMTYPE, "../outside"), b""), ("k.json", words)],
        "hard link": [(tars.special("k.jpg", tarfile.LNKTYPE, "../outside"), b""), ("k.json", words)],
        "through a link": [(tars.special("out", tarfile.SYMTYPE, ".."), b""), (f"out/{picture}", pixels)],
        "pipe": [(tars.special("k.jpg", tarfile.FIFOTYPE), b""), ("k.json", words)],
    }
    return tars.tar([*good, *named[kind]])


OUTSIDE = ("..", ".. within", "absolute", "symbolic link", "hard link", "through a link", "pipe")


def controls(folder: Path) -> int:
    """Shows that what is planted runs where it is let, and gives the number of the ways."""
    folder.mkdir(parents=True)
    markers = [folder / f"ran{number}" for number in range(4 + len(TAGS) + 4)]
    free = iter(markers)
    pickle.loads(pickled(next(free)))
    torch.load(io.BytesIO(saved(next(free))), weights_only=False)
    subprocess.run(f"mkdir {next(free)}", shell=True, check=True)
    for name in ("globals", "lipsum", "self", "namespace"):
        jinja2.Environment().from_string(TEMPLATES[name].replace("{marker}", str(next(free)))).render()
    for number, text in enumerate(TAGS.values()):
        marker, own = next(free), f"planted{number}"
        (folder / f"{own}.py").write_text(module(marker))
        imports = "planted" in text
        text = text.replace("planted", own).replace("{{}}", "{}").replace("{marker}", str(marker))
        sys.path.insert(0, str(folder))
        try:
            yaml.unsafe_load(text)
        except yaml.YAMLError:  # what is made is not of the kind that the tag says
            __import__(own) if imports else None
        finally:
            sys.path.remove(str(folder))
    (folder / "deep").mkdir()
    with tarfile.open(fileobj=io.BytesIO(outside_tar(".."))) as archive:
        archive.extractall(folder / "deep", filter="fully_trusted")
    made = [marker for marker in markers if marker.exists()]
    assert len(made) == 3 + 4 + len(TAGS) and (folder / "k.jpg").exists(), f"what is planted does not run: {made}"
    return len(made) + 1
