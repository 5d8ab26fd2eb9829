"""`python -m step37_lit index SHARDS`: writes or refreshes the index of a set and adds token lengths for a recipe."""

from __future__ import annotations

import os
import sys
from argparse import RawDescriptionHelpFormatter
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from datamodules.bad_samples import BadSamplePolicy
from datamodules.commands.recipe import packed_data_module, recipe_data
from step37_lit.commands import INTERRUPTED
from step37_lit.errors import ConfigError, require

if TYPE_CHECKING:
    from datamodules.packed import PackedDataModule
    from datamodules.shards.index import Lengths, ShardIndex

SHOWN_BAD = 10
MODEL_OPTIONS = ("preset", "hub", "tokenizer", "chat_template", "prompt", "multicrop")

DESCRIPTION = """\
Writes index.arrow beside webdataset shards, or brings it up to date: only shards that have changed are read.
With a recipe or a model it adds the token lengths that training plans with; they depend on tokenizer, chat template,
prompt, multicrop and the model's image tokens. Without a tokenizer the one beside the index is used; where there is
none, a byte-level BPE is trained on the set's texts and saved there as tokenizer.json.

SHARDS is a folder, or tars of one folder: files, a glob, a range such as train-{000..123}.tar, or URLs.
"""
EXAMPLES = """\
examples:
  python -m step37_lit index shards/coco --config recipes/flickr8k_tiny.yaml
  python -m step37_lit index shards/coco --preset tiny --multicrop --workers 8
  python -m step37_lit index shards/coco --hub checkpoints/step37 --tokenizer checkpoints/step37/tokenizer.json
  python -m step37_lit index shards/coco --bad skip                      index only; bad samples stay out of training
  python -m step37_lit index "https://host/train-{000..123}.tar" --remote-schemes https --index train.arrow
"""


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m step37_lit index",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    add = parser.add_argument
    add("shards", metavar="SHARDS", type=str, nargs="+", help="the shards of one set")
    add("--workers", type=PositiveInt, default=len(os.sched_getaffinity(0)), help="processes that read and tokenise")
    add("--bad", type=BadSamplePolicy, default="raise", help="what a bad shard or sample does")
    add("--index", type=str, help="file of the index (default: index.arrow beside the shards)")
    add("--remote-schemes", type=str, nargs="+", default=[], help="URL schemes that may be read: http https s3 gs")
    add("--config", type=str, help="recipe whose data section says what the lengths are for")
    add("--preset", type=str, help="in place of a recipe: the model by name")
    add("--hub", type=str, help="in place of a recipe: folder of a hub checkpoint")
    add("--tokenizer", type=str, help="a tokenizer.json")
    add("--chat-template", type=str, help="file of a Jinja template (default: the model's own format)")
    add("--prompt", type=str, help="question that goes with a caption")
    add("--multicrop", action="store_true", help="large pictures also as crops at full resolution")
    return parser


def main(args: list[str]) -> int:
    """Runs the command.

    Returns:
        The exit code: 0, or 130 for Ctrl-C.

    Raises:
        ConfigError, jsonargparse.ArgumentError: a mistake of the user's.
        BadSample: a bad shard or sample under `--bad raise`.
    """
    options = parser().parse_args(args)
    try:
        _index(options)
    except KeyboardInterrupt:
        print("stopped; the index is as it was", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        file = error.filename or " ".join(options.shards)
        raise ConfigError("index", "files that can be read and written", error.strerror, file=file) from error
    return 0


def _index(options: Namespace) -> None:
    from datamodules.shards.index_build import build_index
    from datamodules.shards.index_file import refuse_unfinished

    given = [name for name in MODEL_OPTIONS if options[name]]
    require(options.config is None or not given, "--config", "a recipe or options of the model", given)
    named = options.config is not None or bool({"preset", "hub"} & set(given))
    require(named or not given, "--preset or --hub", "the model that the lengths are for", given)
    init_args = None if options.config is None else recipe_data(options.config)
    shards = options.shards[0] if len(options.shards) == 1 else options.shards
    show = sys.stderr.isatty()
    refuse_unfinished(options.shards[0])
    index = build_index(shards, options.bad, options.workers, show, options.index, options.remote_schemes)
    _print_index(index)
    if not named:
        print("lengths    none: --config RECIPE or --preset NAME adds those that training needs")
        return
    _add_lengths(options, index, init_args)


def _add_lengths(options: Namespace, index: ShardIndex, init_args: dict[str, Any] | None) -> None:
    from datamodules.shards.index import set_fingerprint
    from datamodules.shards.lengths import add_lengths

    data, schemes = _data_module(options, index, init_args), options.remote_schemes
    _train_tokenizer(data, index, schemes)
    processor, show = data.processor, sys.stderr.isatty()
    index = add_lengths(index, processor, data.prompt, options.bad, options.workers, show, schemes)
    fingerprint = set_fingerprint(processor, data.prompt)
    lengths = index.lengths(fingerprint)
    print(f"lengths    {_described(lengths)}; fingerprint {fingerprint}, {index.counts.texts_read} texts read")
    _print_bad(index, [(i, problem) for i, problem in index.problems(fingerprint) if index.problem(i) is None])


def _data_module(options: Namespace, index: ShardIndex, init_args: dict[str, Any] | None) -> PackedDataModule:
    """The data module that will train on the set: it knows how a processor is made."""
    from datamodules.packed import PackedDataModule

    if init_args is None:
        given = {name: options[name] for name in MODEL_OPTIONS if options[name]}
        return PackedDataModule(sets=os.fspath(index.file.parent), **given)
    return packed_data_module(init_args)


def _train_tokenizer(data: PackedDataModule, index: ShardIndex, remote_schemes: list[str]) -> None:
    """Trains the tokenizer that the data module will look for, where none is named and none is there."""
    from datamodules.shards.lengths import read_texts
    from step37_lit.processor import ROLES
    from step37_lit.tokenizer import Step37Tokenizer

    file = data.tokenizer_path
    if data.tokenizer_file is not None or file.exists():
        return
    own = file.parent.resolve() == index.file.parent.resolve()
    require(own, "data.tokenizer", f"a file, or {file}, which indexing that set first makes", None)
    texts = (text for texts in read_texts(index, remote_schemes) for text in texts.authored())
    frame = [data.prompt, *(f"{role}\n" for role in ROLES)]
    tokenizer = Step37Tokenizer.train((text for part in (frame, texts) for text in part), data.config.text.vocab_size)
    tokenizer.check_ids(data.config.tokens, data.config.text.vocab_size)
    tokenizer.save(file)
    print(f"tokenizer  {tokenizer.vocab_size} tokens, trained on the texts of the set: {file}")


def _print_index(index: ShardIndex) -> None:
    counts = index.counts
    print(f"shards     {len(index.shards)}: {counts.shards_read} read, {counts.shards_compared} compared, ", end="")
    print(f"{counts.shards_kept} unchanged ({counts.bytes_read / 1e6:.1f} MB)")
    ignored = sum(entry.ignored for entry in index.shards)
    print(f"samples    {len(index)}" + (f"; {ignored} members of other kinds left alone" if ignored else ""))
    print(f"index      {index.file}")
    for entry in index.shards:
        if entry.problem is not None:
            print(f"damaged    {entry.name}: {entry.problem}")
    _print_bad(index, list(index.problems()))


def _print_bad(index: ShardIndex, problems: list[tuple[int, str]]) -> None:
    from datamodules.bad_samples import BadSample

    if problems:
        print(f"bad        {len(problems)} of {len(index)} samples; they stay in the index with the reason")
    for i, problem in problems[:SHOWN_BAD]:
        print(f"           {BadSample(index.shards[index.shard_of(i)].name, index.key(i), '', problem)}")
    if len(problems) > SHOWN_BAD:
        print(f"           and {len(problems) - SHOWN_BAD} more (column problem of {index.file})")


def _described(lengths: Lengths) -> str:
    values = lengths.values
    return f"{len(values)} texts of {values.min()} to {values.max()} tokens, {values.mean():.1f} on average"
