"""Groups of parameters that a freezing schedule names, and the layer that a parameter belongs to.

Names are those of `Step37Model`, with layers numbered over the whole decoder.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError
from step37_lit.hub.names import name_table

GROUPS: dict[str, str] = {
    "vision_tower": r"vision_model\..*",
    "projector": r"align_projector\..*",
    "text_decoder": r"(embedding|decoder|output_layer)\..*",
    "router": r"decoder\.layers\.\d+\.mlp\.router\..*",
    "mtp": r"mtp\..*",
}
ROUTER_BIAS = ".router.expert_bias"  # a buffer: it follows the router's weight
LAYER = re.compile(r"(decoder\.layers|vision_model\.transformer\.resblocks)\.(\d+)\.")
BEHIND_THE_LAYERS = re.compile(r"output_layer\.|decoder\.final_layernorm\.|vision_model\.vit_downsampler")


def split_parameters(config: Step37Config, groups: Sequence[str], field: str) -> dict[str, list[str]]:
    """Names of the parameters of each group.

    Args:
        config: The model.
        groups: Names in `GROUPS`, or regular expressions that match a parameter's whole name. `text_decoder` is
            without the routers where `router` is named too.
        field: What a refusal names.

    Raises:
        ConfigError: a group is unknown, matches nothing, or has a parameter that another one has too.
    """
    names = [row.ours for row in name_table(config) if row.ours is not None and not row.ours.endswith(ROUTER_BIAS)]
    members = {group: [name for name in names if _pattern(group, field).fullmatch(name)] for group in groups}
    if "router" in members and "text_decoder" in members:
        members["text_decoder"] = [name for name in members["text_decoder"] if name not in members["router"]]
    owner: dict[str, str] = {}
    for group, own in members.items():
        if not own:
            raise _matches_nothing(group, config, field)
        for name in own:
            if name in owner:
                advice = f"groups that have no parameter in common ({name} is in {owner[name]!r} too)"
                raise ConfigError(field, advice, group)
            owner[name] = group
    return members


def layer_depths(names: Sequence[str]) -> dict[str, int] | None:
    """Distance of each parameter's layer from the end of its stack: 0 for the last layer and what stands behind it.

    What stands before the first layer (embeddings) counts as part of it. None where the names are not of one stack of
    layers.
    """
    stacks = {found[1] for name in names if (found := LAYER.match(name))}
    if len(stacks) != 1:
        return None
    numbers = [int(found[2]) for name in names if (found := LAYER.match(name))]
    first, last = min(numbers), max(numbers)

    def depth(name: str) -> int:
        found = LAYER.match(name)
        if found:
            return last - int(found[2])
        return 0 if BEHIND_THE_LAYERS.match(name) else last - first

    return {name: depth(name) for name in names}


def _pattern(group: str, field: str) -> re.Pattern[str]:
    try:
        return re.compile(GROUPS.get(group, group))
    except re.error as error:
        raise ConfigError(field, f"one of {', '.join(GROUPS)}, or a regular expression ({error})", group) from error


def _matches_nothing(group: str, config: Step37Config, field: str) -> ConfigError:
    if group == "router":
        return ConfigError(field, "a group of the model (it has no routed experts)", group)
    if group == "mtp":
        return ConfigError(field, "a group of the model (its MTP layers are not built)", group)
    close = difflib.get_close_matches(group, GROUPS, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    advice = f"one of {', '.join(GROUPS)}, or a regular expression that matches a parameter's whole name{hint}"
    return ConfigError(field, advice, group)
