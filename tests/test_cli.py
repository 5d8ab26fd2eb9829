"""`python -m step37_lit` as a user meets it: real processes, their output, exit codes and files."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
RECIPE = REPOSITORY / "recipes" / "scenes_tiny.yaml"
SHORT = [
    "--data.num_steps=4", "--data.microbatches=1", "--data.samples_per_pack=2", "--data.val_samples=4",
    "--data.num_workers=0", "--trainer.max_steps=4", "--trainer.val_check_interval=2", "--model.warmup_steps=1",
    "--seed_everything=3",
]  # fmt: skip


def command(*arguments: str, folder: Path, timeout: float = 120) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(REPOSITORY), str(folder)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    line = [sys.executable, "-m", "step37_lit", *arguments]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


def rows(path: Path, column: str) -> list[tuple[int, float]]:
    with path.open(newline="") as file:
        return [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row.get(column)]


def test_overview_imports_no_torch(tmp_path: Path) -> None:
    shown = command("-h", folder=tmp_path)
    assert shown.returncode == 0 and shown.stderr == ""
    for subcommand in ("fit", "validate", "test", "predict"):
        assert subcommand in shown.stdout
    imports = "import sys, step37_lit.__main__, step37_lit.cli_help"
    probe = f"{imports}; print({{'torch', 'lightning', 'megatron'}} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    imported = subprocess.run(
        [sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True
    )
    assert imported.stdout.strip() == "set()"


def test_fit_then_resume_then_validate(tmp_path: Path) -> None:
    run, straight = tmp_path / "run", tmp_path / "straight"
    where = f"--trainer.default_root_dir={run}"
    done = command("fit", f"--config={RECIPE}", *SHORT, where, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = [line for line in done.stdout.splitlines() if line.startswith(("layout ", "parameters ", "operations "))]
    assert len(plan) == 3 and plan[0].startswith("layout      one rank") and "924,872" in plan[1]
    lines = done.stdout.strip().splitlines()[-4:]
    assert lines[0].startswith("reached     step 4: train/loss")
    assert lines[1] == f"checkpoint  {run}/checkpoints/step_000004"
    assert str(run) in lines[2]
    assert lines[3] == f"report      {run}/report.html" and (run / "report.html").is_file()
    validations = re.findall(r"^validation  (step \d+): val/loss .*, val/cider_d \d\.\d{4}$", done.stdout, re.MULTILINE)
    assert validations == ["step 2", "step 4"]
    shown = [json.loads(line)["key"] for line in (run / "captions" / "step_000004.jsonl").read_text().splitlines()]
    assert shown == [f"unseen-3-{i}" for i in range(4)]  # the command's one seed is the data's, too

    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]  # nothing beside the run's folder
    assert [path.relative_to(run) for path in run.rglob("metrics.csv")] == [Path("metrics.csv")]
    assert {"config.yaml", "checkpoints", "tensorboard", "pictures", "tokenizer.json"} <= {
        p.name for p in run.iterdir()
    }
    assert [step for step, _ in rows(run / "metrics.csv", "train/loss")] == [0, 1, 2, 3]
    for column in ("train/grad_norm", "train/mfu", "train/tokens_per_second", "train/images_per_second"):
        assert len(rows(run / "metrics.csv", column)) == 4, column
    for column in ("val/loss", "val/attribute_accuracy", "val/attribute_accuracy_seen"):
        assert len(rows(run / "metrics.csv", column)) == 2, column
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["preset"] == "tiny"
    pictures = sorted((run / "pictures").glob("*.png"))
    assert pictures and all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)

    # Six steps straight equal four and two more from the checkpoint; the log goes on in the same file.
    longer = ["--data.num_steps=6", "--model.decay_steps=4"]
    first = command("fit", f"--config={RECIPE}", *SHORT, *longer, where, "--resume=never", folder=tmp_path)
    assert first.returncode == 0, first.stderr
    more = ["--trainer.max_steps=6"]
    resumed = command("fit", f"--config={RECIPE}", *SHORT, *longer, *more, where, folder=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resume      step 4, epoch 0: {run}/checkpoints/step_000004" in resumed.stdout
    assert "resume      changed: trainer.max_steps: 4 -> 6" in resumed.stdout
    other = ["--trainer.max_steps=6", f"--trainer.default_root_dir={straight}"]
    whole = command("fit", f"--config={RECIPE}", *SHORT, *longer, *other, folder=tmp_path)
    assert whole.returncode == 0, whole.stderr
    for column in ("train/loss", "train/grad_norm"):
        assert rows(run / "metrics.csv", column) == rows(straight / "metrics.csv", column), column

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    checkpoint = f"--ckpt_path={run}/checkpoints/step_000006"
    evaluated = command("validate", f"--config={run}/config.yaml", checkpoint, folder=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "val/attribute_accuracy" in evaluated.stdout
    changed = [path for path, content in before.items() if path.read_bytes() != content and path.suffix != ".png"]
    assert changed == []


BAD: dict[str, tuple[list[str], list[str]]] = {
    "missing recipe": (["--config=none.yaml"], ["none.yaml"]),
    "unknown option": ([f"--config={RECIPE}", "--model.lrr=1"], ["lrr"]),
    "unknown field of the model": (
        [f"--config={RECIPE}", "--model.text.hiden_size=3"],
        ["hiden_size", "hidden_size", "3"],
    ),
    "inconsistent field": (
        [f"--config={RECIPE}", "--model.text.num_heads=5"],
        ["text.num_heads", "num_kv_groups 2", "5"],
    ),
    "wrong type": ([f"--config={RECIPE}", "--model.lr=fast"], ["model.lr", "fast"]),
    "unknown preset": ([f"--config={RECIPE}", "--model.preset=huge"], ["preset", "tiny", "huge"]),
    "missing hub folder": ([f"--config={RECIPE}", "--model.preset=null", "--model.init_from=nowhere"], ["nowhere"]),
    "missing checkpoint": ([f"--config={RECIPE}", "--ckpt_path=gone.ckpt"], ["ckpt_path", "gone.ckpt"]),
    "missing tokenizer": ([f"--config={RECIPE}", "--data.tokenizer=gone.json"], ["gone.json"]),
    "packs": ([f"--config={RECIPE}", "--data.microbatches=0"], ["data.microbatches", "0"]),
    "layout": ([f"--config={RECIPE}", "--trainer.strategy.tensor=3"], ["strategy.tensor", "1 processes", "3"]),
    "heads": ([f"--config={RECIPE}", "--trainer.devices=4", "--trainer.strategy.tensor=4"], ["strategy.tensor", "4"]),
    "pieces": (
        [f"--config={RECIPE}", "--trainer.strategy.pipeline_layout=[1,2]"],
        ["strategy.pipeline_layout", "expected 1 numbers", "[1, 2]"],
    ),
    "experts": ([f"--config={RECIPE}", "--trainer.strategy.expert=2"], ["strategy.expert", "2"]),
    "another strategy": ([f"--config={RECIPE}", "--trainer.strategy=ddp"], ["trainer.strategy", "ddp"]),
    "steps": ([f"--config={RECIPE}", "--model.warmup_steps=100000"], ["model.warmup_steps", "100000"]),
    "data for another model": ([f"--config={RECIPE}", "--model.vision.image_size=56"], ["image size", "56"]),
    "accumulation": ([f"--config={RECIPE}", "--trainer.accumulate_grad_batches=2"], ["accumulate_grad_batches", "2"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_users_mistake_is_one_line(case: str, tmp_path: Path) -> None:
    arguments, named = BAD[case]
    refused = command("fit", *arguments, folder=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.count("\n") == 1, refused.stderr
    for text in named:
        assert text in refused.stderr
    assert list(tmp_path.rglob("*")) == []  # nothing written


FIT_WITH_EACH = """
import sys
from step37_lit import cli
recipe, option, *names = sys.argv[1:]
for name in names:
    print(cli.run(["fit", f"--config={recipe}", f"{option}={name}"]))
"""


@pytest.mark.parametrize("option", ["--trainer.callbacks+", "--trainer.strategy", "--data", "--trainer.logger"])
def test_a_class_that_is_not_allowed_is_not_imported(option: str, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text("import pathlib\npathlib.Path('imported').touch()\nclass Thing:\n    pass\n")
    names = ("planted.Thing", "subprocess.Popen", "lightning.pytorch.callbacks.LambdaCallback")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(tmp_path)]),
    }
    line = [sys.executable, "-W", "ignore", "-c", FIT_WITH_EACH, str(RECIPE), option, *names]
    refused = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert refused.stdout.split() == ["2", "2", "2"], refused.stderr
    for told, name in zip(refused.stderr.splitlines(), names, strict=True):
        assert name in told
    assert not (tmp_path / "imported").exists()


def test_a_recipe_cannot_carry_python(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: !!python/object/apply:os.system ['touch ran']\n")
    refused = command("fit", f"--config={recipe}", folder=tmp_path)
    assert refused.returncode == 2
    assert "recipe.yaml" in refused.stderr
    assert not (tmp_path / "ran").exists()


def test_help_of_a_subcommand_comes_from_the_docstrings(tmp_path: Path) -> None:
    shown = command("fit", "-h", folder=tmp_path)
    assert shown.returncode == 0
    for text in ("--model.lr_factors", "Peak learning rate of AdamW", "--model.swap_images"):
        assert text in shown.stdout


def test_ctrl_c_ends_behind_a_step_and_says_what_was_reached(tmp_path: Path) -> None:
    long = ["--data.num_steps=100000", "--trainer.max_steps=100000", "--trainer.val_check_interval=100000"]
    line = [sys.executable, "-m", "step37_lit", "fit", f"--config={RECIPE}", *SHORT, *long]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    output = tmp_path / "out.txt"
    with output.open("w") as file:
        process = subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=file, stderr=subprocess.STDOUT)
        # The tokenizer is trained and saved before the first step; steps take milliseconds.
        deadline = time.monotonic() + 90
        while not list(tmp_path.rglob("tokenizer.json")) and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(4)
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    text = output.read_text()
    assert code == 130, text
    assert "reached     step " in text and "Traceback" not in text
    assert "resume      no checkpoint in runs/scenes_tiny/checkpoints: begins at step 0" in text
    reached = int(text.partition("reached     step ")[2].partition(":")[0])

    # The same command goes on behind the last step and says so; --resume must would not have begun anew.
    more = ["--data.num_steps=100000", f"--trainer.max_steps={reached + 2}", "--resume=must"]
    again = command("fit", f"--config={RECIPE}", *SHORT, *more, folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"resume      step {reached}, epoch 0: runs/scenes_tiny/checkpoints/step_{reached:06d}" in again.stdout
    assert f"resume      changed: trainer.max_steps: 100000 -> {reached + 2}" in again.stdout
    assert f"reached     step {reached + 2}: " in again.stdout
    steps = [step for step, _ in rows(tmp_path / "runs" / "scenes_tiny" / "metrics.csv", "train/loss")]
    assert steps == list(range(reached + 2))
    ended = command("fit", f"--config={RECIPE}", *SHORT, *more, folder=tmp_path)
    assert ended.returncode == 0 and f"resume      nothing is left of {reached + 2} steps: " in ended.stdout, (
        ended.stderr
    )

    # What would train something else is refused before anything is written.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for option, named in (("--model.text.sliding_window=9", "sliding_window"), ("--seed_everything=9", "data.seed")):
        refused = command("fit", f"--config={RECIPE}", *SHORT, *more, option, folder=tmp_path)
        assert refused.returncode == 2 and named in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
