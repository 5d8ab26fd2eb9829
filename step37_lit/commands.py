"""Commands beside Lightning's own: each is a module with `main(args) -> exit code`, imported only when it is called."""

from __future__ import annotations

import importlib
import sys

from jsonargparse import ArgumentError

from step37_lit.errors import UserError
from step37_lit.exit_codes import INTERRUPTED, USER_ERROR

COMMANDS = {
    "shard": "datamodules.commands.shard",
    "index": "datamodules.commands.index",
    "caption": "step37_lit.caption_command",
    "checkpoint": "step37_lit.checkpoint_command",
    "report": "step37_lit.report_command",
    "plan": "step37_lit.planner.command",
    "convert": "step37_lit.convert_command",
    "replay": "step37_lit.replay_command",
}


def run(name: str, args: list[str]) -> int:
    """Runs a command of `COMMANDS`.

    Returns:
        The exit code: 0, 2 for a mistake of the user's (one line on stderr), 130 for Ctrl-C.
    """
    try:
        return importlib.import_module(COMMANDS[name]).main(args)
    except (UserError, ArgumentError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
