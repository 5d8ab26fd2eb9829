"""`python -m step37_lit convert import|export`: hub folders to checkpoints and back."""

from __future__ import annotations

import re
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from step37_lit.errors import ConfigError, require

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
LAYOUTS = ("hub", "transformers")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}

DESCRIPTION = """\
Converts between hub folders and checkpoints, one tensor at a time. What is written appears whole or not at all.
"""
EXAMPLES = """\
examples:
  python -m step37_lit convert import --hub hub/step37 --output checkpoints/step37
  python -m step37_lit convert export --checkpoint runs/mine/checkpoints/step_002000 --output hub/mine --dtype bf16
"""


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m step37_lit convert",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    commands = parser.add_subcommands()
    importing = ArgumentParser(description="A hub folder -> a checkpoint of weights.", exit_on_error=False)
    importing.add_argument("--hub", metavar="HUB", type=str, required=True, help="hub folder, in either layout")
    importing.add_argument("--output", metavar="CKPT", type=str, required=True, help="checkpoint that is made")
    commands.add_subcommand("import", importing, help="a hub folder -> a checkpoint of weights")
    exporting = ArgumentParser(description="A checkpoint -> a hub folder.", exit_on_error=False)
    add = exporting.add_argument
    add("--checkpoint", metavar="CKPT", type=str, required=True, help="checkpoint's folder")
    add("--output", metavar="HUB", type=str, required=True, help="hub folder that is made; run again, it goes on")
    add("--dtype", type=str, help="bf16 or fp32 (default: as stored; routers' biases are always fp32)")
    add("--shard-size", type=str, default="5GB", help="of a safetensors file, such as 500MB (default: 5GB)")
    add("--layout", type=str, default="hub", help="of config.json: hub or transformers (default: hub)")
    add("--like", metavar="HUB", type=str, help="carry this hub folder's text files (default: those of the import)")
    commands.add_subcommand("export", exporting, help="a checkpoint -> a hub folder")
    return parser


def main(args: list[str]) -> int:
    """Runs the command.

    Returns:
        The exit code 0.

    Raises:
        ConfigError, jsonargparse.ArgumentError: a mistake of the user's, a damaged file, or a full disk.
    """
    options = parser().parse_args(args)
    run = {"import": _import, "export": _export}[options.subcommand]
    try:
        run(options[options.subcommand])
    except FileNotFoundError as error:  # of a file that a hub folder must have
        raise ConfigError("--hub", "a hub folder", str(error)) from error
    return 0


def _import(options: Namespace) -> None:
    require(Path(options.hub).is_dir(), "--hub", "a folder", options.hub)
    from step37_lit.hub.importing import import_hub

    done = import_hub(options.hub, options.output)
    print(f"tensors     {done.tensors}, {done.num_bytes:,} bytes, each used once")
    print(f"text files  {', '.join(done.text_files) or 'none'}")
    if done.left:
        print(f"not carried {', '.join(done.left)}")
    print(f"checkpoint  {options.output}")


def _export(options: Namespace) -> None:
    require(options.dtype is None or options.dtype in DTYPES, "--dtype", " or ".join(DTYPES), options.dtype)
    require(options.layout in LAYOUTS, "--layout", " or ".join(LAYOUTS), options.layout)
    shard_size = parse_size(options.shard_size)
    require(Path(options.checkpoint).is_dir(), "--checkpoint", "a checkpoint's folder", options.checkpoint)
    import torch

    from step37_lit.hub.exporting import ExportOptions, export_hub

    dtype = None if options.dtype is None else getattr(torch, DTYPES[options.dtype])
    like = None if options.like is None else Path(options.like)
    done = export_hub(options.checkpoint, options.output, ExportOptions(dtype, shard_size, options.layout, like))
    kept = f", {done.kept} of them kept from before" if done.kept else ""
    print(f"tensors     {done.tensors}, {done.num_bytes:,} bytes in {done.files} files{kept}")
    if done.without_mtp:
        print(f"without     {done.without_mtp} MTP layers, which the checkpoint does not have")
    print(f"hub folder  {options.output}")


def parse_size(text: str) -> int:
    """Bytes of `500MB`, `5GB` or a plain number.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(\d{1,15})(KB|MB|GB)?", text)
    size = int(match[1]) * UNITS.get(match[2], 1) if match else 0
    require(size > 0, "--shard-size", "a size such as 500MB or 5GB", text)
    return size
