"""`python -m step37_lit checkpoint verify|list|prune|show PATH`: what lies in a folder of checkpoints."""

from __future__ import annotations

import datetime
import json
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from step37_lit.checkpoint.folder import Found, latest_name, list_checkpoints, prune
from step37_lit.checkpoint.manifest import MANIFEST, Manifest, VerifyMode, files_to_hash, verify
from step37_lit.errors import ConfigError, require

DESCRIPTION = """\
Looks at checkpoints. PATH is a checkpoint, a folder of them, or a run's folder.

  verify  hashes every file and compares it with the manifest; exit code 2 names the first that differs
  list    a line for each checkpoint; * is the one that a resumed run takes
  show    what a checkpoint holds: step, layout, sizes, versions
  prune   removes all but the newest ones (and those of --keep-every)
"""
EXAMPLES = """\
examples:
  python -m step37_lit checkpoint verify runs/scenes_tiny
  python -m step37_lit checkpoint prune runs/scenes_tiny --keep-last 1 --keep-every 1000
"""
ACTIONS = ("verify", "list", "show", "prune")


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m step37_lit checkpoint",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    add = parser.add_argument
    add("action", metavar="ACTION", type=str, choices=ACTIONS, help=", ".join(ACTIONS))
    add("path", metavar="PATH", type=str, help="a checkpoint, a folder of checkpoints, or a run's folder")
    add("--mode", type=VerifyMode, default="full", help="verify: sample hashes one in eight of the large files")
    add("--keep-last", type=PositiveInt, default=2, help="prune: how many of the newest stay")
    add("--keep-every", type=PositiveInt, help="prune: those whose step is a multiple stay, too")
    return parser


def main(args: list[str]) -> int:
    """Runs the command.

    Returns:
        The exit code 0.

    Raises:
        ConfigError, jsonargparse.ArgumentError: a mistake of the user's, or a damaged checkpoint.
    """
    options = parser().parse_args(args)
    path = Path(options.path)
    require(path.is_dir(), "PATH", "a folder", options.path)
    {"verify": _verify, "list": _list, "show": _show, "prune": _prune}[options.action](path, options)
    return 0


def _parent(path: Path) -> Path:
    """The folder of checkpoints that is meant."""
    inside = path / "checkpoints"
    return inside if inside.is_dir() else path


def _found(path: Path) -> list[Found]:
    if (path / MANIFEST).exists():
        return [found for found in list_checkpoints(path.parent) if found.path.name == path.name]
    found = list_checkpoints(_parent(path))
    require(len(found) > 0, "PATH", "a checkpoint, or a folder of them", str(path))
    return found


def _verify(path: Path, options: Namespace) -> None:
    """All are looked at before the first damaged one is the error."""
    first: ConfigError | None = None
    for each in _found(path):
        try:
            manifest = verify(each.path, options.mode)
            hashed = files_to_hash(manifest, options.mode)
            size = sum(manifest.files[name].size for name in hashed)
            print(f"good      {each.path}: {len(hashed)} of {len(manifest.files)} files, {size / 1e6:.1f} MB hashed")
        except ConfigError as error:
            print(f"damaged   {error}")
            first = first or error
    if first is not None:
        raise first


def _list(path: Path, options: Namespace) -> None:
    for each in _found(path):
        mark = "*" if each.path.name == latest_name(each.path.parent) else " "
        print(f"{mark} {each.path.name:20} {_summary(each)}")


def _summary(each: Found) -> str:
    if each.manifest is None:
        return str(each.problem)
    manifest = each.manifest
    return f"step {manifest.step}, {manifest.kind}, {manifest.num_bytes / 1e6:.1f} MB, {_clock(manifest)}"


def _show(path: Path, options: Namespace) -> None:
    each = _found(path)[0]
    if each.manifest is None:
        raise ConfigError("checkpoint", "a manifest that can be read", each.problem, each.path)
    manifest = each.manifest
    sizes: dict[str, int] = {}
    for name, entry in manifest.files.items():
        top = name.partition("/")[0]
        sizes[top] = sizes.get(top, 0) + entry.size
    lines = {
        "checkpoint": str(each.path),
        "kind": manifest.kind,
        "step": f"{manifest.step}, epoch {manifest.epoch}",
        "written": _clock(manifest),
        "layout": json.dumps(dict(manifest.layout)),
        "dtype": manifest.dtype,
        "packages": ", ".join(f"{name} {version}" for name, version in manifest.packages.items()),
        **{name: f"{size / 1e6:.3f} MB" for name, size in sorted(sizes.items())},
    }
    for name, value in lines.items():
        print(f"{name:20} {value}")


def _prune(path: Path, options: Namespace) -> None:
    removed = prune(_parent(path), options.keep_last, options.keep_every)
    for each in removed:
        print(f"removed   {each}")
    print(f"kept      {len(list_checkpoints(_parent(path)))} in {_parent(path)}")


def _clock(manifest: Manifest) -> str:
    return datetime.datetime.fromtimestamp(manifest.created).strftime("%Y-%m-%d %H:%M:%S")
