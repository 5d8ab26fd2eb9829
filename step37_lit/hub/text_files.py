"""Files of a hub folder beside its tensors: which are carried through a conversion, as they are."""

from __future__ import annotations

from pathlib import Path

from step37_lit.text_file import read_bytes

CARRIED = (".json", ".jinja", ".txt", ".md", ".py")  # code is carried and never run
CARRIED_NAMES = ("LICENSE", "NOTICE")
CONFIG_FILE, TOKENIZER_FILE, TEMPLATE_FILE = "config.json", "tokenizer.json", "chat_template.jinja"
PREPROCESSOR_FILE = "preprocessor_config.json"
INDEX_SUFFIX = ".index.json"  # of the shards, which an export makes anew


def text_files(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """Contents of the text files directly in a folder by name, and the names of what is neither one nor tensors.

    Raises:
        ConfigError: a file cannot be read, or is larger than any text file of a model.
    """
    contents: dict[str, bytes] = {}
    left: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors" or path.name.endswith(INDEX_SUFFIX):
            continue
        if not path.is_file() or not (path.suffix in CARRIED or path.name in CARRIED_NAMES):
            left.append(path.name)
            continue
        contents[path.name] = read_bytes(path)
    return contents, left
