"""The plan of a run that is about to start: a few lines, and a refusal of what cannot fit."""

from __future__ import annotations

from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError
from step37_lit.flops import decoder_flops, head_flops, mtp_flops
from step37_lit.planner.layout import PlannedLayout
from step37_lit.planner.weights import DType, Part, StateBytes, rank_weights, state_bytes

SEQUENCE = 1024  # tokens of the sequences that operations are given for


def largest_state(
    config: Step37Config, layout: PlannedLayout, dtype: DType, frozen: frozenset[Part]
) -> tuple[int, StateBytes]:
    """The pipeline stage that holds most, and what it holds besides activations."""
    states = [state_bytes(config, layout, stage, dtype, frozen) for stage in range(layout.pipeline)]
    stage = max(range(layout.pipeline), key=lambda stage: states[stage].total)
    return stage, states[stage]


def short_form(config: Step37Config, layout: PlannedLayout, dtype: DType, frozen: frozenset[Part]) -> str:
    """Layout, parameters, state of a rank and operations a token, in three lines."""
    text = config.text
    total = sum(weight.numel for weight in rank_weights(config, 1, 1, 1))
    stage, state = largest_state(config, layout, dtype, frozen)
    lengths, learnt = (SEQUENCE,), [SEQUENCE] * text.num_built_mtp_layers
    flops = decoder_flops(text, lengths, range(text.num_layers)).total + head_flops(text, SEQUENCE)
    flops += mtp_flops(text, lengths, learnt)
    where = f" (stage {stage} of {layout.pipeline})" if layout.pipeline > 1 else ""
    parts = f"weights {_size(state.weights)}, gradients {_size(state.gradients)}, optimizer {_size(state.optimizer)}"
    return (
        f"layout      {layout.label}; {dtype}\n"
        f"parameters  {total:,}, of them {state.parameters:,} on a rank{where}: {parts}, before activations\n"
        f"operations  {3 * flops / SEQUENCE / 1e6:,.4g} MFLOP a text token in sequences of {SEQUENCE}, without pictures"
    )


def refuse_too_large(
    config: Step37Config, layout: PlannedLayout, dtype: DType, frozen: frozenset[Part], memory: int
) -> None:
    """Refuses a layout whose weights, gradients and optimizer state alone are more than a GPU has.

    Args:
        memory: Bytes of the GPU.

    Raises:
        ConfigError: names the stage that needs most.
    """
    stage, state = largest_state(config, layout, dtype, frozen)
    if state.total > memory:
        expected = f"a layout whose state fits {memory / 1e9:.1f} GB (`python -m step37_lit plan --gpus N` lists some)"
        raise ConfigError("trainer.strategy", expected, f"{state.total / 1e9:.1f} GB on stage {stage}")


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.4g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.4g} MB"
