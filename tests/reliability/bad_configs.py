"""Configs that are refused: mistakes of all kinds in options and recipes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.forks import ROOT
from tests.reliability.bad_input import Case

RECIPE = ROOT / "recipes" / "scenes_tiny.yaml"
# Mistakes that a user makes: options behind the recipe, and what the line names.
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "unknown option": (["--model.lrr=1"], ["lrr"]),
    "unknown field of the model": (["--model.text.hiden_size=3"], ["hiden_size", "hidden_size", "3"]),
    "inconsistent field": (["--model.text.num_heads=5"], ["text.num_heads", "num_kv_groups 2", "5"]),
    "wrong type": (["--model.lr=fast"], ["model.lr", "fast"]),
    "unknown preset": (["--model.preset=huge"], ["preset", "tiny", "huge"]),
    "missing hub folder": (["--model.preset=null", "--model.init_from=nowhere"], ["nowhere"]),
    "missing checkpoint": (["--ckpt_path=gone.ckpt"], ["ckpt_path", "gone.ckpt"]),
    "missing tokenizer": (["--data.tokenizer=gone.json"], ["gone.json"]),
    "packs": (["--data.microbatches=0"], ["data.microbatches", "0"]),
    "layout": (["--trainer.strategy.tensor=3"], ["strategy.tensor", "1 processes", "3"]),
    "heads": (["--trainer.devices=4", "--trainer.strategy.tensor=4"], ["strategy.tensor", "4"]),
    "pieces": (
        ["--trainer.strategy.pipeline_layout=[1,2]"],
        ["strategy.pipeline_layout", "expected 1 numbers", "[1, 2]"],
    ),
    "experts": (["--trainer.strategy.expert=2"], ["strategy.expert", "2"]),
    "another strategy": (["--trainer.strategy=ddp"], ["trainer.strategy", "ddp"]),
    "steps": (["--model.warmup_steps=100000"], ["model.warmup_steps", "100000"]),
    "data for another model": (["--model.vision.image_size=56"], ["image size", "56"]),
    "accumulation": (["--trainer.accumulate_grad_batches=2"], ["accumulate_grad_batches", "2"]),
    "own seed of the data": (["--data.seed=3"], ["data.seed", "seed_everything"]),
}
# Values that an option cannot have.
VALUES: dict[str, list[str]] = {
    "seed_everything": ["x", "-1", "1.5"],
    "resume": ["maybe", "3"],
    "ckpt_path": ["gone", "/etc/passwd", "3"],
    "model.preset": ["3", "[tiny]", "null"],
    "model.lr": ["-1", "nan", "inf", "[1]", "{}", "null"],
    "model.min_lr_factor": ["x", "-0.5", "nan"],
    "model.warmup_steps": ["-1", "1.5", "x", "null"],
    "model.decay_steps": ["-5", "0", "x"],
    "model.weight_decay": ["-1", "x", "nan"],
    "model.betas": ["[0.9]", "[2,0.9]", "x", "[0.9,0.95,0.99]", "[-1,0.9]", "[0.9,1.0]"],
    "model.eps": ["-1", "x", "nan"],
    "model.lr_factors": ["{nothing.*: 1}", "x", "{vision_model.*: -1}", "{vision_model.*: x}"],
    "model.text": ["3", "x", "[]", "{vocab_size: -1}", "{num_heads: 0}", "{layer_types: [x]}",
                   "{hidden_size: x}", "{hidden_size: 1.5}", "{vocab_size: null}", "{norm_eps: nan}",
                   "{sliding_window: 0}", "{mtp: 1}"],
    "model.vision": ["x", "{image_size: 0}", "{patch_size: 0}", "{num_layers: -1}", "{width: 7}", "{num_heads: 5}"],
    "model.tokens": ["x", "{im_start: -1}", "{unknown: 3}", "{im_start: 1000000000}"],
    "model.freeze_language_model": ["maybe"],
    "trainer.max_steps": ["x", "1.5", "-2"],
    "trainer.max_epochs": ["x", "1.5"],
    "trainer.devices": ["x", "0", "-3"],
    "trainer.precision": ["8", "16-mixed", "x"],
    "trainer.gradient_clip_val": ["x"],
    "trainer.val_check_interval": ["x", "-1", "1.5"],
    "trainer.limit_val_batches": ["x", "-1", "1.5"],
    "trainer.accelerator": ["abacus"],
    "trainer.callbacks": ["3", "[{class_path: nothing.Here}]", "[{class_path: 3}]", "[{init_args: {}}]",
                          "[{class_path: step37_lit.RunCheckpoints, init_args: {every_steps: 0}}]",
                          "[{class_path: step37_lit.RunCheckpoints, init_args: {keep_last: 1}}]",
                          "[{class_path: step37_lit.RunCheckpoints, init_args: {mode: most}}]"],
    "trainer.logger": ["x", "{class_path: nothing.Here}"],
    "trainer.strategy.tensor": ["0", "-1", "x", "1.5"],
    "trainer.strategy.pipeline": ["0", "x", "2"],
    "trainer.strategy.context": ["0", "x", "2"],
    "trainer.strategy.verify": ["none"],
    "trainer.strategy.cpu_threads": ["x", "-1"],
    "data": ["x", "3", "{class_path: nothing.Here}", "{class_path: pathlib.Path}"],
    "data.num_steps": ["x", "0", "-1"],
    "data.samples_per_pack": ["0", "x"],
    "data.num_workers": ["-1", "x"],
}  # fmt: skip
# Recipes by name: content, and what the line names.
RECIPES: dict[str, tuple[bytes, list[str]]] = {
    "no YAML": (b"model: [1, 2\n", ["YAML"]),
    "a tab": (b"model:\n\tpreset: tiny\n", ["YAML"]),
    "not UTF-8": (b"model: \xff\xfe\n", ["YAML"]),
    "NUL": (b"model: a\0b\n", ["YAML"]),
    "binary": (bytes(range(256)) * 8, ["YAML"]),
    "empty": (b"", ["mapping"]),
    "a list": (b"- model\n- data\n", ["mapping", "list"]),
    "a number": (b"3\n", ["mapping", "int"]),
    "a text": (b"model\n", ["mapping", "str"]),
    "unknown alias": (b"model: *nothing\n", ["YAML"]),
    "unknown tag": (b"model: !thing {a: 1}\n", ["YAML"]),
    "deeply nested": (b"model: " + b"[" * 5000 + b"]" * 5000 + b"\n", ["YAML"]),
    "a section twice": (b"model: {preset: tiny}\nmodel: {preset: flash}\n", ["'model' twice"]),
    "a field twice": (b"model: {preset: tiny, preset: flash}\n", ["'preset' twice"]),
    "unknown section": (b"modle: {preset: tiny}\n", ["modle"]),
    "section is a number": (b"model: 3\ndata: {class_path: datamodules.scenes.ScenesDataModule}\n", ["model"]),
    "section is a list": (b"trainer: []\n", ["trainer"]),
    "data without a class": (b"model: {preset: tiny}\ndata: {init_args: {}}\n", ["data"]),
    "data of no class": (b"model: {preset: tiny}\ndata: {class_path: datamodules.scenes.Nothing}\n", ["Nothing"]),
    "a base that is missing": (b"base: gone.yaml\n", ["base", "gone.yaml"]),
    "its own base": (b"base: recipe.yaml\n", ["base", "recipe.yaml"]),
    "a base that is a number": (b"base: 3\n", ["base", "3"]),
    "a base that is a folder": (b"base: .\n", ["base"]),
    "a base that is no recipe": (b"base: /etc/passwd\n", ["passwd"]),
    "own seed of the data": (b"data: {init_args: {seed: 3}}\n", ["seed"]),
}


def cases() -> Iterator[Case]:
    for name, (options, words) in MISTAKES.items():
        yield Case("mistake", name, ("fit", f"--config={RECIPE}", *options), tuple(words))
    yield Case("mistake", "missing recipe", ("fit", "--config=none.yaml"), ("none.yaml",))
    for option, values in VALUES.items():
        for value in values:
            named = "RunCheckpoints." if "RunCheckpoints" in value else option.split(".")[-1]
            named = "trainer" if option in ("trainer.devices", "trainer.accelerator") else named
            args = ("fit", f"--config={RECIPE}", f"--{option}={_escaped(value)}")
            yield Case("value", f"{option}={value}", args, (named,))
    for name, (content, words) in RECIPES.items():

        def prepare(folder: Path, content: bytes = content) -> None:
            (folder / "recipe.yaml").write_bytes(content)

        yield Case("recipe", name, ("fit", "--config=recipe.yaml"), ("recipe.yaml", *words), prepare)


def _escaped(value: str) -> str:
    return value.replace("{", "{{").replace("}", "}}")
