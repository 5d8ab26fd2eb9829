"""`python -m step37_lit caption --model PATH IMAGES...`: captions of files, to the terminal or as JSONL."""

from __future__ import annotations

import json
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from step37_lit.errors import ConfigError, require
from step37_lit.image_header import ImageError
from step37_lit.text_file import written_whole

if TYPE_CHECKING:  # the help must not wait for torch
    from step37_lit.captioner import Step37Captioner

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SETTINGS = ("max_new_tokens", "num_beams", "length_penalty", "temperature", "top_p", "seed", "speculate")

DESCRIPTION = """\
Captions pictures, a line each: path, tab, caption. A broken picture is named on stderr and the others go on.

PATH is a run's folder (its last checkpoint), a checkpoint file, or a hub folder. IMAGES are files or folders.
"""
EXAMPLES = """\
examples:
  python -m step37_lit caption --model runs/flickr8k_tiny photos/
  python -m step37_lit caption --model hub/step37 a.jpg b.png --num-beams 3 --jsonl captions.jsonl
"""


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m step37_lit caption",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    add = parser.add_argument
    add("images", metavar="IMAGES", type=str, nargs="+", help="files or folders of pictures")
    add("--model", metavar="PATH", type=str, required=True, help="run's folder, checkpoint or hub folder")
    add("--jsonl", metavar="OUT", type=str, help="write {path, caption, logprob, finish} here")
    add("--prompt", type=str, help="question (default: Describe the picture.)")
    add("--batch-size", type=PositiveInt, default=16, help="pictures at once")
    add("--max-new-tokens", type=PositiveInt, default=64, help="longest caption")
    add("--num-beams", type=PositiveInt, default=1, help="more than 1: beam search")
    add("--length-penalty", type=float, default=1.0, help="of beams")
    add("--temperature", type=NonNegativeFloat, default=0.0, help="0: the most likely words")
    add("--top-p", type=float, default=1.0, help="draw among words of this probability together")
    add("--seed", type=int, default=0, help="of drawing")
    add(
        "--speculate",
        type=NonNegativeInt,
        default=0,
        help="tokens that MTP layers draft ahead: the same captions, sooner",
    )
    return parser


def main(args: list[str]) -> int:
    """Runs the command.

    Returns:
        The exit code 0.

    Raises:
        ConfigError, jsonargparse.ArgumentError: a mistake of the user's, or no picture that can be read.
    """
    options = parser().parse_args(args)
    paths = find_pictures(options.images)
    from step37_lit.sampling import GenerationSettings

    GenerationSettings(**{name: options[name] for name in SETTINGS})  # refused before a model is loaded
    captioner = _captioner(options)
    rows, broken = _captions(captioner, paths, options)
    for path, reason in broken:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    require(len(rows) > 0, "IMAGES", "a picture that can be read", f"{len(broken)} broken ones")
    if options.speculate:
        print(f"speculate   {captioner.generator.tokens_per_step:.2f} tokens a step", file=sys.stderr)
    if options.jsonl is None:
        for row in rows:
            print(f"{row['path']}\t{row['caption']}")
    else:
        _write(Path(options.jsonl), rows)
        print(f"captions   {len(rows)}, broken {len(broken)}: {options.jsonl}")
    return 0


def find_pictures(arguments: list[str]) -> list[Path]:
    """The files, and of folders the pictures directly in them, sorted by name.

    Raises:
        ConfigError: a path that is not there, or a folder without pictures.
    """
    found: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        require(path.exists(), "IMAGES", "a file or a folder", argument)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            require(len(inside) > 0, "IMAGES", f"a folder with pictures ({', '.join(SUFFIXES)})", argument)
            found += inside
        else:
            found.append(path)
    return found


def _captioner(options: Namespace) -> Step37Captioner:
    from step37_lit.captioner import Step37Captioner
    from step37_lit.config import Step37Config

    path = Path(options.model)
    given = {} if options.prompt is None else {"prompt": options.prompt}
    if (path / "config.json").is_file():
        layers = Step37Config.from_hub(path).text.num_mtp_layers
        require(options.speculate <= layers, "--speculate", f"at most {layers} (MTP layers)", options.speculate)
        try:
            return Step37Captioner.from_hub(path, mtp=options.speculate > 0, batch_size=options.batch_size, **given)
        except FileNotFoundError as error:  # of a file that a hub folder must have
            raise ConfigError("--model", "a hub folder", str(error)) from error
    return Step37Captioner.from_checkpoint(path, batch_size=options.batch_size, **given)


def _captions(
    captioner: Step37Captioner, paths: list[Path], options: Namespace
) -> tuple[list[dict[str, object]], list[tuple[Path, str]]]:
    """Batch by batch, so that only one batch of pictures is in memory."""
    from rich.console import Console
    from rich.progress import Progress

    from step37_lit.sampling import GenerationSettings

    settings = GenerationSettings(**{name: options[name] for name in SETTINGS})
    rows: list[dict[str, object]] = []
    broken: list[tuple[Path, str]] = []
    with Progress(console=Console(file=sys.stderr), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("captions", total=len(paths))
        for first in range(0, len(paths), options.batch_size):
            batch = paths[first : first + options.batch_size]
            prompts = []
            for path in batch:
                try:
                    prompts.append(captioner.prompt_for(path, key=str(path)))
                except ImageError as error:
                    broken.append((path, str(error)))
                except OSError as error:
                    broken.append((path, str(error.strerror)))
            for (best, *_), prompt in zip(captioner.complete(prompts, settings), prompts, strict=True):
                rows.append({"path": prompt.key, "caption": best.text, "logprob": best.logprob, "finish": best.finish})
            progress.advance(task, len(batch))
    return rows, broken


def _write(file: Path, rows: list[dict[str, object]]) -> None:
    """The file is whole or absent."""
    try:
        with written_whole(file) as staged:
            staged.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise ConfigError("--jsonl", "a file that can be written", error.strerror, file=file) from error
