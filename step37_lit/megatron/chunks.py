"""What a pipeline stage holds under virtual pipelining: several pieces of the decoder that are not neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import nn

from step37_lit.megatron.initialize import global_name
from step37_lit.megatron.transformer_config import Step37TransformerConfig
from step37_lit.model.step37_model import Step37Model


class ModelChunks(nn.ModuleList):
    """The `Step37Model` of each virtual stage, in the model's order."""

    @property
    def models(self) -> list[Step37Model]:
        return [cast(Step37Model, chunk) for chunk in self]

    @property
    def config(self) -> Step37TransformerConfig:
        """The one that all chunks share."""
        return self.models[0].config

    def freeze(self, *parts: bool, **named_parts: bool) -> None:
        """See `Step37Model.freeze`."""
        for model in self.models:
            model.freeze(*parts, **named_parts)


def chunks_of(model: Step37Model | ModelChunks) -> list[Step37Model]:
    """The chunks of a stage; one without virtual stages."""
    return model.models if isinstance(model, ModelChunks) else [model]


def whole_names(model: Step37Model | ModelChunks) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters under their names in the whole model."""
    for chunk in chunks_of(model):
        for name, parameter in chunk.named_parameters():
            yield global_name(chunk, name), parameter
