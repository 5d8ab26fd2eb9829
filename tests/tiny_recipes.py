"""Recipes of the 200B model in a form that runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from step37_lit.recipe import load_recipe, merge
from tests import shard_sets

WHOLE = {"pipeline": 1, "virtual_pipeline": None, "pipeline_layout": None, "expert": 1, "context": 1}


def make_shards(folder: Path) -> Path:
    """A small set of shards with tokenizer and index."""
    shard_sets.write_shards(folder, range(64))
    shard_sets.index(folder, shard_sets.tokenizer_file(folder))
    return folder


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def tiny(recipe: Path, folder: Path, shards: Path, ranks: int = 1, nodes: int = 1, **layout: Any) -> Path:
    """A recipe's tiny form: preset, packs, steps and layout in place of the recipe's; all else is its own.

    Args:
        recipe: The recipe.
        folder: For the file and, below `run`, for the run.
        shards: See `make_shards`.
        ranks: Of a node.
        nodes: Number of nodes.
        layout: Arguments of the strategy; without any, nothing is split.
    """
    own = load_recipe(recipe)
    text: dict[str, Any] = {}
    if own["model"].get("text", {}).get("mtp"):
        kinds = ["full_attention", *["sliding_attention"] * 5]
        text = {"num_mtp_layers": 2, "mtp": True, "layer_types": kinds}
        text |= {"swiglu_limits": [None] * 6, "swiglu_limits_shared": [None] * 6}
    overlay = {
        "model": {"preset": "tiny_moe", "text": text, "warmup_steps": 1, "lr": 1e-3},
        "data": {
            "init_args": {
                "sets": str(shards), "preset": "tiny", "tokenizer": None, "max_length": 256, "microbatches": 4,
                "val_share": 0.25, "multicrop": False, "num_workers": 0,
            }
        },
        "trainer": {
            "strategy": {"init_args": WHOLE | layout | {"launch_timeout": 120, "cpu_threads": 1}},
            "accelerator": "cpu", "devices": ranks, "num_nodes": nodes, "precision": "32-true",
            "default_root_dir": str(folder / "run"), "max_steps": 2, "val_check_interval": 1,
        },
    }  # fmt: skip
    content = merge(own, overlay)
    content["model"]["text"] = text or None  # the recipe's own fields are those of 45 layers
    return write(folder, f"tiny_{recipe.stem}.yaml", yaml.safe_dump(content))
