"""`manifest.json`: what a checkpoint's folder holds, with size and SHA-256 of every file.

Everything is checked against it before anything is read.

A checkpoint without a manifest is half-written: the manifest is the last file of a save.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from step37_lit.errors import ConfigError

FORMAT = 2
MANIFEST = "manifest.json"
OWN_HASH = "sha256"
KINDS = ("training", "weights", "fault")
SMALL_FILE = 16 * 2**20  # bytes up to which `sample` hashes every file
SAMPLED_SHARE = 8  # of the larger ones it hashes one in this many

VerifyMode = Literal["full", "sample"]


@dataclass(frozen=True)
class FileEntry:
    """A file's size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What is in a checkpoint's folder.

    Args:
        kind: `training` (can be resumed), `weights`, or `fault` (a step that was not taken: no weights).
        step: Optimizer steps that were done.
        epoch: The epoch it was written in, from 0.
        layout: Sizes of the parallel groups that wrote it, and `world_size`; empty for one process.
        dtype: Of the parameters, as torch names it without `torch.`.
        packages: Versions of what wrote it.
        created: Seconds since 1970.
        files: By path relative to the folder, with `/`.
    """

    kind: str
    step: int
    epoch: int
    layout: Mapping[str, Any]
    dtype: str
    packages: Mapping[str, str]
    created: float
    files: Mapping[str, FileEntry]

    @property
    def num_bytes(self) -> int:
        return sum(entry.size for entry in self.files.values())

    def headline(self, folder: Path) -> str:
        """What a resumed run says of it."""
        return f"step {self.step}, epoch {self.epoch}: {folder}, {self.num_bytes / 1e6:.1f} MB"

    def to_json(self) -> str:
        """The file's text; its last field is the SHA-256 of the others, so that no bit of it can change unseen."""
        plain = {"format": FORMAT, **dataclasses.asdict(self)}
        digest = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
        return json.dumps(plain | {OWN_HASH: digest}, indent=1) + "\n"


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of a file as it is on disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(os.fstat(file.fileno()).st_size, digest)


def hash_files(folder: Path, names: Iterable[str], threads: int | None = None) -> dict[str, FileEntry]:
    """`hash_file` of several, in threads (hashing holds no lock of the interpreter); None is one a core."""
    names = list(names)
    with ThreadPoolExecutor(_threads() if threads is None else threads) as pool:
        return dict(zip(names, pool.map(lambda name: hash_file(folder / name), names), strict=True))


def files_below(folder: Path) -> list[str]:
    """Relative paths of everything below `folder` that is no folder, sorted; links are not followed."""
    found = []
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if Path(root, name).is_symlink()]
        found += [Path(root, name).relative_to(folder).as_posix() for name in (*names, *links)]
    return sorted(found)


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks a manifest; no other file is looked at.

    Raises:
        ConfigError: there is none, it cannot be read, a path in it leads out of the folder, or it was changed.
    """
    file = folder / MANIFEST
    if not folder.is_dir():
        raise ConfigError("checkpoint", "a checkpoint's folder", "no folder", folder)
    if not file.is_file() or file.is_symlink():
        raise ConfigError("checkpoint", "a file (without it the checkpoint is half-written)", "none", file)
    content = file.read_bytes()
    try:
        plain = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError("checkpoint", "JSON", str(error), file) from error
    found = plain.get("format") if isinstance(plain, dict) else plain
    if found != FORMAT or isinstance(found, bool):
        raise ConfigError("format", FORMAT, _shown(found), file)
    manifest = _manifest_of(plain, file)
    if manifest.to_json().encode() != content:
        raise ConfigError("checkpoint", "a manifest as it was written", f"{OWN_HASH} {_shown(plain[OWN_HASH])}", file)
    return manifest


def _manifest_of(plain: dict[str, Any], file: Path) -> Manifest:
    types: dict[str, Any] = {
        "kind": str, "step": int, "epoch": int, "layout": dict, "dtype": str, "packages": dict,
        "created": (int, float), "files": dict,
    }  # fmt: skip
    expected = {"format", *types, OWN_HASH}
    if plain.keys() != expected:
        raise ConfigError("fields", sorted(expected), sorted(plain), file)
    for name, kind in types.items():
        if not isinstance(plain[name], kind) or isinstance(plain[name], bool):
            raise ConfigError(name, "a value of its type", _shown(plain[name]), file)
    if plain["kind"] not in KINDS:
        raise ConfigError("kind", " or ".join(KINDS), plain["kind"], file)
    entries = {name: _entry(name, value, file) for name, value in plain["files"].items()}
    return Manifest(**{name: plain[name] for name in types if name != "files"}, files=entries)


def _entry(name: str, value: Any, file: Path) -> FileEntry:
    path = PurePosixPath(name)
    plain = path.as_posix() == name and not path.is_absolute() and ".." not in path.parts and "\\" not in name
    if not plain or name in ("", ".", MANIFEST) or "\0" in name:
        raise ConfigError("files", "paths inside the checkpoint", name, file)
    if isinstance(value, dict) and value.keys() == {"size", "sha256"}:
        size, digest = value["size"], value["sha256"]
        if type(size) is int and size >= 0 and isinstance(digest, str):
            return FileEntry(size, digest)
    raise ConfigError(f"files.{name}", "size and sha256", _shown(value), file)


def check_structure(folder: Path, manifest: Manifest) -> None:
    """Every file of the manifest is there in its size, and no other file is.

    Raises:
        ConfigError: names the first file that is missing, too many, of another size or a link.
    """
    found = [name for name in files_below(folder) if name != MANIFEST]
    for name in manifest.files:
        if name not in found:
            raise ConfigError("checkpoint", f"a file of {manifest.files[name].size} bytes", "none", folder / name)
    for name in found:
        path = folder / name
        if name not in manifest.files:
            raise ConfigError("checkpoint", f"no file that is not in {MANIFEST}", "one", path)
        if path.is_symlink() or not path.is_file():
            raise ConfigError("checkpoint", "a plain file", "a link or a device", path)
        size = path.stat().st_size
        if size != manifest.files[name].size:
            raise ConfigError("checkpoint", f"{manifest.files[name].size} bytes", size, path)


def check_hashes(folder: Path, manifest: Manifest, names: Iterable[str]) -> int:
    """Compares the contents of files with the manifest, in threads.

    Returns:
        Bytes that were hashed.

    Raises:
        ConfigError: names the first file that differs, in the manifest's order.
    """
    found = hash_files(folder, names)
    for name, entry in found.items():
        expected = manifest.files[name].sha256
        if entry.sha256 != expected:
            raise ConfigError("checkpoint", f"SHA-256 {expected[:16]}", entry.sha256[:16], folder / name)
    return sum(entry.size for entry in found.values())


def files_to_hash(manifest: Manifest, mode: VerifyMode = "full", only: str | None = None) -> list[str]:
    """Names of the files that a verification hashes.

    Args:
        manifest: The checkpoint's.
        mode: `full` hashes every file; `sample` every small one and one in `SAMPLED_SHARE` of those above
            `SMALL_FILE` bytes, which ones depends on their hashes and so on the checkpoint.
        only: A folder in the checkpoint: tensors of others are left out.
    """
    names = [name for name in manifest.files if only is None or "/" not in name or name.startswith(f"{only}/")]
    if mode == "full":
        return names
    small = [name for name in names if manifest.files[name].size <= SMALL_FILE]
    large = sorted(set(names) - set(small), key=lambda name: manifest.files[name].sha256)
    return small + large[: -(-len(large) // SAMPLED_SHARE)]


def verify(folder: Path, mode: VerifyMode = "full", only: str | None = None) -> Manifest:
    """Checks a checkpoint before anything in it is read.

    Args:
        folder: The checkpoint.
        mode, only: See `files_to_hash`; names and sizes are checked of all files in any case.

    Raises:
        ConfigError: one line with the file, what was expected and what was found.
    """
    manifest = read_manifest(folder)
    check_structure(folder, manifest)
    check_hashes(folder, manifest, files_to_hash(manifest, mode, only))
    return manifest


def _threads() -> int:
    return max(1, min(16, os.cpu_count() or 1))


def _shown(value: Any) -> Any:
    text = repr(value)
    return value if len(text) <= 60 else f"{text[:57]}..."
