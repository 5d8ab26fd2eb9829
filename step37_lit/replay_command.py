"""`python -m step37_lit replay DUMP`: a step that a run did not take, once more on one process."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from jsonargparse import ArgumentParser

DESCRIPTION = """\
Runs the batch of a fault again: losses of its samples, gradient norms by part of the model, the first module whose
output or gradient is not finite, and whether the fault is there again.

DUMP is the folder that the run's line names, RUN/faults/step_000123. Its weights are those that the step was computed
with; with --weights the same batch runs on others, such as the run's newest checkpoint: a fault that is there with the
former and not with the latter came into the weights since then.
"""
EXAMPLES = """\
examples:
  python -m step37_lit replay runs/scenes_tiny/faults/step_000123
  python -m step37_lit replay runs/scenes_tiny/faults/step_000123 --weights runs/scenes_tiny

exit code: 0 the fault is there again, 1 it is not, 2 the dump or the weights cannot be used
"""
NOT_REPRODUCED = 1


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m step37_lit replay",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    parser.add_argument("dump", metavar="DUMP", type=str, help="folder of the dump")
    parser.add_argument("--weights", type=str, help="a checkpoint's or a run's folder, in place of the dump's weights")
    return parser


def main(args: list[str]) -> int:
    """Runs the command.

    Returns:
        The exit code: 0 where the fault is there again, 1 where it is not.

    Raises:
        ConfigError, jsonargparse.ArgumentError: a mistake of the user's, or a damaged dump.
    """
    options = parser().parse_args(args)
    import torch

    from step37_lit.fault_dump import read_dump
    from step37_lit.replay import load_model, run_again

    dump = read_dump(Path(options.dump))
    print(f"dump        {dump.folder}: {dump.fault}")
    model, checkpoint = load_model(dump, None if options.weights is None else Path(options.weights))
    print(f"weights     {checkpoint}")
    for device, state in dump.random.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)
    replay = run_again(model, dump.packs)
    for sample in replay.samples:
        print(f"sample      loss {sample.loss:<8.4f} {sample.tokens:5d} tokens  pack {sample.pack}  {sample.key!r}")
    for part, norm in replay.gradients.items():
        print(f"gradient    {norm:<12.4g} {part}")
    losses = [
        f"loss {replay.loss:.4f}",
        *(f"of MTP layer {i} {loss:.4f}" for i, loss in enumerate(replay.mtp_losses, 1)),
    ]
    print(f"all         {', '.join(losses)}, gradient norm {replay.grad_norm:.4g}")
    if replay.weight is not None:
        print(f"not finite  weight: {replay.weight}")
    if replay.picture is not None:
        print(f"not finite  pixels: pack {replay.picture}")
    if replay.output is not None:
        print(f"not finite  first output: {replay.output[0]} (pack {replay.output[1]})")
    if replay.gradient is not None:
        print(f"not finite  first gradient: {replay.gradient}")
    again = replay.reproduces(dump.fault)
    verdict = "yes" if again else "no, neither these samples nor these weights bring it back"
    print(f"reproduced  {verdict}: {dump.fault.what}")
    return 0 if again else NOT_REPRODUCED
