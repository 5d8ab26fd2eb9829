"""Recipes: what they inherit, whether they can run on the GPUs that they name, and a tiny run of each."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from datamodules.commands.recipe import recipe_data
from step37_lit import cli, commands
from step37_lit.errors import ConfigError
from step37_lit.megatron import process
from step37_lit.recipe import load_recipe, load_recipes, merge
from tests import tiny_recipes
from tests.tiny_recipes import write

ROOT = Path(__file__).parents[1]
FLASH = sorted(set((ROOT / "recipes").glob("flash_*.yaml")) - {ROOT / "recipes" / "flash_base.yaml"})
DEBUG = sorted((ROOT / "recipes").glob("debug_*.yaml"))
RANKS = {
    "flash_sft_64gpu": 64,
    "flash_smoke_4gpu": 4,
    "flash_pretrain_512gpu": 512,
    "flash_projector_32gpu": 32,
    "flash_long_context_cp": 128,
}


class CheckedCLI(cli.Step37CLI):
    """Everything of `fit` before the run itself."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture(autouse=True)
def own_signals_and_groups() -> Iterator[None]:
    """The command line sets handlers and makes groups; other tests of this process have their own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    process.shutdown()
    yield
    process.shutdown()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipes.make_shards(tmp_path_factory.mktemp("recipes") / "set")


# ---- inheritance ----


def test_a_recipe_is_its_base_and_what_differs(tmp_path: Path) -> None:
    write(tmp_path, "deep/ground.yaml", "a: {x: 1, y: [1, 2], z: {u: 1}}\nb: 2\n")
    write(tmp_path, "middle.yaml", "base: deep/ground.yaml\na: {y: [3], z: {v: 2}}\n")
    top = write(tmp_path, "top.yaml", "base: middle.yaml\na: {x: null}\nc: 1.0e-5\n")
    expected = {"a": {"x": None, "y": [3], "z": {"u": 1, "v": 2}}, "b": 2, "c": 1e-5}
    assert load_recipe(top) == expected
    assert load_recipes([top, write(tmp_path, "more.yaml", "b: 5\n")]) == expected | {"b": 5}


def test_arguments_of_another_class_are_not_inherited() -> None:
    base = {"class_path": "A", "init_args": {"x": 1}}
    assert merge(base, {"init_args": {"y": 2}}) == {"class_path": "A", "init_args": {"x": 1, "y": 2}}
    assert merge(base, {"class_path": "B", "init_args": {"y": 2}}) == {"class_path": "B", "init_args": {"y": 2}}


BROKEN = {
    "cycle": (
        {"a.yaml": "base: b.yaml\n", "b.yaml": "base: a.yaml\n"},
        ["a.yaml", "base", "a.yaml -> b.yaml -> a.yaml"],
    ),
    "itself": ({"a.yaml": "base: a.yaml\n"}, ["a.yaml", "base", "a.yaml -> a.yaml"]),
    "missing": ({"a.yaml": "base: gone.yaml\n"}, ["a.yaml: base: expected a file", "gone.yaml"]),
    "no path": ({"a.yaml": "base: [b.yaml]\n"}, ["a.yaml", "base", "the path of a recipe"]),
    "no mapping": ({"a.yaml": "base: b.yaml\n", "b.yaml": "- 1\n"}, ["b.yaml", "mapping", "list"]),
    "no YAML": ({"a.yaml": "base: b.yaml\n", "b.yaml": "a: [\n"}, ["b.yaml", "YAML"]),
    "python": ({"a.yaml": "base: b.yaml\n", "b.yaml": "a: !!python/name:os.system\n"}, ["b.yaml", "YAML"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_base_is_one_line_for_every_command(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, named = BROKEN[case]
    for name, text in files.items():
        write(tmp_path, name, text)
    top = tmp_path / "a.yaml"
    with pytest.raises(ConfigError) as raised:
        recipe_data(str(top))
    assert cli.run(["fit", "--config", str(top)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    for text in named:
        assert text in str(raised.value) and text in printed, (text, printed)


@pytest.mark.parametrize("option", [["--config={}"], ["--config", "{}"], ["-c", "{}"]])
def test_fit_takes_the_base_and_options_override(option: list[str], tmp_path: Path) -> None:
    own = write(tmp_path, "own.yaml", f"base: {ROOT}/recipes/scenes_tiny.yaml\nmodel: {{lr: 3e-4}}\n")
    arguments = [text.format(own) for text in option]
    parsed = CheckedCLI(["fit", *arguments, "--data.samples_per_pack=4"])
    section = parsed.config["fit"]
    assert section["model"]["lr"] == 3e-4 and section["model"]["warmup_steps"] == 150
    assert section["data"]["init_args"]["samples_per_pack"] == 4
    with pytest.raises(Exception, match="nonsense"):
        own.write_text(f"base: {ROOT}/recipes/scenes_tiny.yaml\nmodel: {{nonsense: 3}}\n")
        CheckedCLI(["fit", *arguments])


@pytest.mark.parametrize("based", [True, False])
def test_a_seed_of_the_data_alone_is_refused(based: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """jsonargparse links it to seed_everything, and would say nothing."""
    base = f"base: {ROOT}/recipes/scenes_tiny.yaml\n" if based else ""
    own = write(tmp_path, "own.yaml", f"{base}data: {{init_args: {{seed: 9}}}}\n")
    assert cli.run(["fit", "--config", str(own)]) == 2
    told = capsys.readouterr().err
    assert "data.init_args.seed: expected seed_everything" in told and "found 9" in told and told.count("\n") == 1


def test_debug_recipes_are_short() -> None:
    assert len(DEBUG) == 3
    for recipe in DEBUG:
        assert len(recipe.read_text().splitlines()) < 15, recipe


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(["fit", f"--config={recipe}", "--print_config"])
    assert ended.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["trainer"]["default_root_dir"] == f"runs/{recipe.stem}" and "base" not in shown


# ---- on the GPUs that a recipe names ----


@pytest.mark.parametrize("recipe", FLASH, ids=lambda path: path.stem)
def test_layout_fits_model_packs_and_world(recipe: Path, tmp_path: Path) -> None:
    """All that `fit` checks of model, layout and steps, at the recipe's own size; data of the same packs."""
    packs = load_recipe(recipe)["data"]["init_args"]
    microbatches = packs["microbatches"]
    data = {"preset": "flash", "microbatches": microbatches, "pad_to": packs["max_length"]}
    data |= {"samples_per_pack": 1, "val_samples": microbatches, "tokenizer": None}
    scenes = {"class_path": "datamodules.scenes.ScenesDataModule", "init_args": data}
    overlay = {"data": scenes, "trainer": {"accelerator": "cpu", "default_root_dir": str(tmp_path)}}
    other = write(tmp_path, "overlay.yaml", yaml.safe_dump(overlay))
    checked = CheckedCLI(["fit", f"--config={recipe}", f"--config={other}"])
    trainer, layout = checked.trainer, checked.trainer.strategy.layout
    assert trainer.world_size == RANKS[recipe.stem]
    assert checked.model.config.text.hidden_size == 4096
    ranks = layout.data_parallel_size(trainer.world_size)
    assert ranks * layout.model_parallel_size == trainer.world_size
    waits = (layout.pipeline - 1) / (layout.virtual_pipeline or 1)
    assert waits / (waits + microbatches / ranks) < 1 / 3  # of the time, for a stage
    with pytest.raises(ConfigError, match="strategy"):
        layout.validate(checked.model.config, trainer.world_size + 1)


@pytest.mark.parametrize("recipe", FLASH, ids=lambda path: path.stem)
def test_plan_says_that_it_fits(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On H100s of 80 GB; long packs with 8 pictures, the others with one for each 1,024 tokens."""
    options = PICTURES.get(recipe.stem, [])
    assert commands.run("plan", ["--config", str(recipe), *options]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert f"on {RANKS[recipe.stem]} ranks" in printed
    assert "! does not fit" not in printed, printed


PICTURES = {"flash_long_context_cp": ["--sequence-length", "16384", "--images", "8"]}
STARTED = {
    "torchrun": {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
    "SLURM": {
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "step37",
    },
}  # fmt: skip


@pytest.mark.parametrize("launcher", STARTED)
def test_another_number_of_processes_than_the_launchers(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STARTED[launcher].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as raised:
        CheckedCLI(["fit", f"--config={ROOT}/recipes/scenes_tiny.yaml", "--trainer.devices=4"])
    found = "trainer.devices x num_nodes: expected the 2 processes that were started, found '4 x 1'"
    assert str(raised.value) == found


# ---- tiny runs ----


@pytest.mark.parametrize("recipe", FLASH, ids=lambda path: path.stem)
def test_tiny_run_of_each_recipe(
    recipe: Path, tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny_recipes.tiny(recipe, tmp_path, shards)
    assert cli.run(["fit", "--config", str(file)]) == 0, capsys.readouterr().err
    assert "reached     step 2: train/loss" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.csv").is_file()


@pytest.mark.parametrize("recipe", DEBUG, ids=lambda path: path.stem)
def test_debug_recipes_run(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--config={recipe}", f"--trainer.default_root_dir={tmp_path}/run", "--data.num_workers=0"]
    if recipe.stem == "debug_profiler":
        arguments += [f"--trainer.profiler.dirpath={tmp_path}/run", "--trainer.max_steps=4"]
        arguments += ["--data.samples_per_pack=2", "--data.val_samples=2"]
    if recipe.stem == "debug_overfit":
        arguments += ["--trainer.max_steps=30", "--data.samples_per_pack=4", "--data.val_samples=4"]
    assert cli.run(["fit", *arguments]) == 0, capsys.readouterr().err
    if recipe.stem == "debug_overfit":
        losses = [float(row.split(",")[column]) for row, column in loss_rows(tmp_path / "run" / "metrics.csv")]
        print(f"overfit: {losses[0]:.3f} -> {losses[-1]:.3f}")
        assert losses[-1] < 0.6 * losses[0]
        assert math.isfinite(losses[-1])
    written = {path.name for path in (tmp_path / "run").rglob("*")}
    if recipe.stem == "debug_profiler":
        assert "run_training_batch" in (tmp_path / "run" / "fit-profile.txt").read_text()
    if recipe.stem == "debug_fast":
        assert "tokenizer.json" in written and "metrics.csv" not in written


def loss_rows(path: Path) -> Iterator[tuple[str, int]]:
    header, *rows = path.read_text().splitlines()
    column = header.split(",").index("train/loss")
    yield from ((row, column) for row in rows if row.split(",")[column])
