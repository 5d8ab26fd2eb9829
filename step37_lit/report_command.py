"""`python -m step37_lit report RUN`: one HTML page about a run, while it is going on or after it."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from jsonargparse import ArgumentParser

DESCRIPTION = """\
Writes RUN/report.html: curves, freezing stages, captions of the validations, expert load, bad samples and the recipe
of a run, which may still be going on. The page needs no network and has no scripts.

RUN is the run's folder (trainer.default_root_dir).
"""
EXAMPLES = """\
examples:
  python -m step37_lit report runs/scenes_tiny
"""


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m step37_lit report",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    parser.add_argument("run", metavar="RUN", type=str, help="folder of the run")
    return parser


def main(args: list[str]) -> int:
    """Runs the command.

    Returns:
        The exit code 0.

    Raises:
        ConfigError, jsonargparse.ArgumentError: a mistake of the user's.
    """
    options = parser().parse_args(args)
    from step37_lit.report import write_report

    written = write_report(Path(options.run))
    print(f"report      {written.stat().st_size / 1e6:.1f} MB: {written}")
    return 0
