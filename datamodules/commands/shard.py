"""`python -m step37_lit shard SOURCE OUT`: writes webdataset shards and, last, their index."""

from __future__ import annotations

import os
import sys
import time
from argparse import RawDescriptionHelpFormatter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from datamodules.bad_samples import BadSamplePolicy
from datamodules.scene_world import Split
from step37_lit.commands import INTERRUPTED
from step37_lit.errors import ConfigError, require

if TYPE_CHECKING:  # what writes needs torch and webdataset, which the help must not wait for
    from datamodules.shards.write_plan import Limit
    from datamodules.sources.base import BadItem, Source

DEFAULT_SHARD_SIZE = 256 * 2**20
DEFAULT_SHARD_SAMPLES = 1000  # of rendered scenes, whose bytes are not known before
SHOWN_BAD = 10
SKIPPED_FILE = "skipped.txt"
SCENE_DEFAULTS = {"num_samples": None, "seed": 0, "split": "train", "preset": "tiny"}

Format = Literal["auto", "flickr8k", "coco", "chat", "folder", "scenes"]

DESCRIPTION = """\
Writes webdataset shards OUT/NAME-000000.tar, ... and their index. The same source gives the same bytes.

SOURCE is one of
  flickr8k  a folder with captions.txt (CSV: image,caption), or that file; pictures in images/, Images/ or beside it
  coco      a captions JSON of COCO (images and annotations)
  chat      a JSONL, each line {"messages": [...], "images": ["path", ...], "id": "..."}
  folder    a folder of pictures, each with a text file of its name (x.jpg with x.txt or x.json)
  scenes    the word: rendered pictures
"""
EXAMPLES = """\
examples:
  python -m step37_lit shard flickr8k/ shards/flickr8k
  python -m step37_lit shard captions_train2017.json shards/coco --image-root train2017 --workers 8
  python -m step37_lit shard chat.jsonl shards/chat --shard-samples 5000 --bad skip
  python -m step37_lit shard scenes shards/scenes --num-samples 20000
  python -m step37_lit shard flickr8k/ shards/flickr8k --resume         after a kill
  python -m step37_lit shard --inspect shards/flickr8k --config RECIPE   a page about shards and packs (-h: its options)
"""


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m step37_lit shard",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", type=str, help="what to read")
    add("out", metavar="OUT", type=str, help="folder of the shards, new or empty")
    add("--format", type=Format, default="auto", help="what SOURCE is; auto looks at it")
    add("--name", type=str, help="beginning of the shards' names (default: from SOURCE)")
    add("--image-root", type=str, help="folder of the pictures (coco, chat, flickr8k)")
    add("--shard-size", type=PositiveInt, help="most bytes of a shard (default: 256 MiB)")
    add("--shard-samples", type=PositiveInt, help="most samples of a shard (default for scenes: 1000)")
    add("--workers", type=PositiveInt, default=len(os.sched_getaffinity(0)), help="processes that write")
    add("--bad", type=BadSamplePolicy, default="raise", help="what a bad sample does")
    add("--resume", action="store_true", help="go on with what a killed run left in OUT")
    add("--num-samples", type=PositiveInt, help="scenes: how many")
    add("--seed", type=NonNegativeInt, help="scenes: seed (default: 0)")
    add("--split", type=Split, help="scenes: train, seen or unseen (default: train)")
    add("--preset", type=str, help="scenes: the model whose image size is used (default: tiny)")
    return parser


def main(args: list[str]) -> int:
    """Runs the command.

    Returns:
        The exit code: 0, or 130 for Ctrl-C.

    Raises:
        ConfigError, jsonargparse.ArgumentError: a mistake of the user's, or a disk that is full or closed.
        BadSample: a bad sample under `--bad raise`.
    """
    if any(argument.partition("=")[0] == "--inspect" for argument in args):
        from datamodules.inspector import inspect

        return inspect.main(args)
    options = parser().parse_args(args)
    try:
        shard(options)
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        file = error.filename or options.out  # a full disk is reported without a name
        raise ConfigError("SOURCE, OUT", "files that can be read and written", error.strerror, file=file) from error
    return 0


def shard(options: Namespace) -> None:
    from datamodules.shards.index_build import build_index
    from datamodules.shards.index_file import WRITING_FILE
    from datamodules.shards.write_plan import plan_shards
    from datamodules.shards.writer import begin, write_file, write_shards
    from datamodules.sources.base import key_of

    started, out, show = time.perf_counter(), Path(options.out), sys.stderr.isatty()
    source = _source(options)
    name = key_of(source.name) if options.name is None else options.name
    require(name != "" and key_of(name) == name, "--name", "text without dots, slashes and spaces", name)
    limit = _limit(options, source)

    plan = plan_shards(source, limit, options.bad)
    planned = sum(1 for _ in plan.entries())
    print(f"planned    {planned} samples in {len(plan.shards)} shards{source.left_out()}")
    begin(out, {"format": source.format, "name": name, **asdict(limit), **source.settings()}, plan, options.resume)
    skipped = write_shards(source, plan, out, name, options.bad, options.workers, show)
    written = planned + len(plan.skipped) - len(skipped)
    require(written > 0, "SOURCE", "a sample that can be used", skipped[0] if skipped else None)
    size, seconds = sum(path.stat().st_size for path in out.glob("*.tar")), time.perf_counter() - started
    print(f"wrote      {written} samples, {size / 1e6:.1f} MB, {written / seconds:.0f} samples/s: {out}")
    if skipped:
        write_file(out / SKIPPED_FILE, "".join(f"{bad}\n" for bad in skipped))
        _print_skipped(skipped, out / SKIPPED_FILE)
    build_index(out, options.bad, options.workers, show)
    (out / WRITING_FILE).unlink()


def _print_skipped(skipped: list[BadItem], file: Path) -> None:
    print(f"skipped    {len(skipped)} bad ones, all of them named in {file}")
    for bad in skipped[:SHOWN_BAD]:
        print(f"           {bad}")
    if len(skipped) > SHOWN_BAD:
        print(f"           and {len(skipped) - SHOWN_BAD} more")


def _source(options: Namespace) -> Source:
    from datamodules.sources.detect import detect_format, open_source

    format = detect_format(options.source) if options.format == "auto" else options.format
    print(f"source     {options.source}: taken as {format}" + (" (auto)" if options.format == "auto" else ""))
    scenes = {name: options[name] for name in SCENE_DEFAULTS if options[name] is not None}
    if format == "scenes":
        from datamodules.sources.scenes import SceneSource

        require(options.image_root is None, "--image-root", "none for rendered scenes", options.image_root)
        require("num_samples" in scenes, "--num-samples", "a number for rendered scenes", None)
        return SceneSource(**(SCENE_DEFAULTS | scenes))
    require(not scenes, ", ".join(f"--{name.replace('_', '-')}" for name in scenes), f"none for {format}", scenes)
    return open_source(options.source, format, options.image_root, Path(options.out))


def _limit(options: Namespace, source: Source) -> Limit:
    from datamodules.shards.write_plan import Limit

    size, samples = options.shard_size, options.shard_samples
    require(source.sized or size is None, "--shard-size", "--shard-samples for pictures that are rendered", size)
    if size is None and samples is None:
        return Limit(shard_size=DEFAULT_SHARD_SIZE) if source.sized else Limit(shard_samples=DEFAULT_SHARD_SAMPLES)
    return Limit(size, samples)
