"""`python -m step37_lit shard --inspect SHARDS`: one HTML page about shards and the packs that a recipe trains on."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from step37_lit.errors import ConfigError

if TYPE_CHECKING:  # the help must not wait for torch
    from datamodules.packed import PackedDataModule

PAGE_FILE = "inspector.html"
MAX_PACKS = 24
MAX_THUMBNAILS = 48

DESCRIPTION = """\
Writes one HTML page about indexed shards: the packs of the first epoch that a recipe would train on, token lengths,
sizes of the pictures, samples as the model sees them, and bad samples. The page needs no network and has no scripts.

SHARDS takes the place of the recipe's sets. It needs the recipe's token lengths, which `python -m step37_lit index`
adds.
"""
EXAMPLES = """\
examples:
  python -m step37_lit shard --inspect data/flickr8k --config recipes/flickr8k_tiny.yaml
  python -m step37_lit shard --inspect data/flickr8k --config recipes/flickr8k_tiny.yaml --output page.html --packs 100
"""


def main(args: list[str]) -> int:
    """Runs the command.

    Returns:
        The exit code: 0.

    Raises:
        ConfigError, jsonargparse.ArgumentError: a mistake of the user's.
    """
    options = _parser().parse_args(args)
    module = _data_module(options)
    folder = Path(options.inspect) if Path(options.inspect).is_dir() else Path(options.inspect).parent
    output = Path(options.output) if options.output is not None else folder / PAGE_FILE
    try:
        inspect_set(module, output, options.packs, options.thumbnails)
    except OSError as error:
        raise ConfigError("--output", "a file that can be written", error.strerror, file=output) from error
    print(f"page       {output.stat().st_size / 1e6:.1f} MB: {output}")
    return 0


def inspect_set(
    module: PackedDataModule, output: Path, max_packs: int = MAX_PACKS, max_thumbnails: int = MAX_THUMBNAILS
) -> Path:
    """Writes the page; the file is whole or absent.

    Args:
        module: Its `sets` are inspected.
        output: Where to.
        max_packs: Packs that are read and shown.
        max_thumbnails: Pictures that are shown; a sample without any counts as one.

    Returns:
        `output`.

    Raises:
        ConfigError: an index is missing or stale, or no epoch can be planned.
        OSError: the page cannot be written.
    """
    from datamodules.inspector.collect import collect
    from datamodules.inspector.page import page
    from step37_lit.pages.render import write_page

    write_page(page(collect(module, max_packs, max_thumbnails)), output)
    return output


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m step37_lit shard --inspect",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    add = parser.add_argument
    add("--inspect", metavar="SHARDS", type=str, required=True, help="folder of the shards and their index")
    add("--config", metavar="RECIPE", type=str, required=True, help="recipe whose data section plans the packs")
    add("--output", metavar="PAGE", type=str, help=f"where to (default: {PAGE_FILE} beside the index)")
    add("--packs", type=PositiveInt, default=MAX_PACKS, help="packs that are read and shown")
    add("--thumbnails", type=PositiveInt, default=MAX_THUMBNAILS, help="pictures that are shown")
    return parser


def _data_module(options: Namespace) -> PackedDataModule:
    """The recipe's data module with SHARDS in place of its sets.

    Without a tokenizer in the recipe it is the one beside the recipe's first set where SHARDS is one of its sets, as in
    training, and otherwise the one beside SHARDS.
    """
    from datamodules.commands.recipe import packed_data_module, recipe_data

    init_args = recipe_data(options.config)
    data = packed_data_module(init_args)
    shards = Path(options.inspect).resolve()
    tokenizer = init_args.get("tokenizer")
    if tokenizer is None and shards in [Path(config.path).resolve() for config in data.train_configs]:
        tokenizer = str(data.tokenizer_path)
    return packed_data_module({**init_args, "sets": options.inspect, "val_sets": None, "tokenizer": tokenizer})
