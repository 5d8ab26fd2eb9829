"""`python -m step37_lit`: the command line."""

from __future__ import annotations

import sys
import warnings

from step37_lit.cli_help import HELP


def main() -> int:
    # The overview answers at once; a subcommand's own help needs the classes that it documents.
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(HELP, end="")
        return 0 if sys.argv[1:] else 2
    from step37_lit.commands import COMMANDS, run

    _quiet_known_warnings()  # before the imports that give them
    if sys.argv[1] in COMMANDS:
        return run(sys.argv[1], sys.argv[2:])
    from step37_lit import signals

    signals.listen()  # before the imports, which take seconds
    from step37_lit import cli

    return cli.run(sys.argv[1:])


def _quiet_known_warnings() -> None:
    """Notes of the libraries about their own insides, which a user can do nothing about."""
    for message in (
        "Transformer Engine and Apex are not installed",
        "Apex is not installed",
        "full scope is deprecated",
        "The .grad attribute of a Tensor that is not a leaf",
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
        "`torch.distributed.\\w+` is deprecated",
        "The 'train_dataloader' does not have many workers",
        "The 'val_dataloader' does not have many workers",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}")


if __name__ == "__main__":
    sys.exit(main())
