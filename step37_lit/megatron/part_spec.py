"""`PartSpec`: how a feed-forward part is described to every megatron-core from 0.16 to 0.19."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any


@dataclass
class PartSpec:
    """A module and what it is made with.

    megatron-core 0.16 gives it to `build_module`, which reads these fields; 0.17 (experts) and 0.18 (all of a layer's
    feed-forward part) call it. It is no `ModuleSpec`: of one with a class that is not megatron's own each layer warns.

    Args:
        module: The class.
        submodules: Its `submodules`, or None where it takes none.
        params: Its other arguments, by name.
    """

    module: type
    submodules: Any = None
    params: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *args: Any, **handed_over: Any) -> Any:
        """Builds it. What newer versions hand over to every part (`name`, `is_mtp_layer`, groups that it has already)
        is left out where the class does not take it."""
        taken = inspect.signature(self.module).parameters.keys() - self.params.keys()
        own = {name: value for name, value in handed_over.items() if name in taken}
        submodules = {} if self.submodules is None else {"submodules": self.submodules}
        return self.module(*args, **submodules, **self.params, **own)
