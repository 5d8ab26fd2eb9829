"""A run that is resumed with something changed: refused with the field named, or the change is listed and taken."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from step37_lit.tokenizer import Step37Tokenizer
from tests import shard_sets
from tests.reliability.figure import Figure
from tests.reliability.runs import SAMPLES, Place, make_set

STEPS = 2
RUN_CHECKPOINTS = "{class_path: step37_lit.RunCheckpoints, init_args: {every_steps: 5, keep_last: 2}}"


@dataclass(frozen=True)
class Change:
    """Something that is not as it was when the checkpoint was written.

    Args:
        options: Of the command.
        named: What the error line names, or the field of the `changed:` line.
        taken: Whether the run goes on with it.
        prepare: Changes the files of the data.
        ranks: Processes of the run.
    """

    options: tuple[str, ...]
    named: str
    taken: bool = False
    prepare: Callable[[Path], object] | None = None
    ranks: int = 1


def _other_tokenizer(data: Path) -> None:
    texts = [" ".join(reversed(shard_sets.WORDS)), "user\nassistant\nwhat is there?"] * 20
    Step37Tokenizer.train(texts, 390).save(data / "tokenizer.json")
    shard_sets.index(data / "set", data / "tokenizer.json")


def _other_samples(data: Path) -> None:
    shutil.rmtree(data / "set")
    shard_sets.write_shards(data / "set", range(1, SAMPLES + 1))
    shard_sets.index(data / "set", data / "tokenizer.json")


def _more_samples(data: Path) -> None:
    shard_sets.write_shards(data / "more", range(SAMPLES, SAMPLES + 8))
    (data / "more" / "part-0000.tar").rename(data / "set" / "part-0009.tar")
    shard_sets.index(data / "set", data / "tokenizer.json")


def _another_set(data: Path) -> None:
    shutil.copytree(data / "set", data / "other")


def _refused() -> dict[str, Change]:
    model = {
        "layers of text": ("text.num_layers=3", f"--model.text.layer_types=[{','.join(['full_attention'] * 3)}]",
                           "--model.text.swiglu_limits=[null,null,null]",
                           "--model.text.swiglu_limits_shared=[null,null,null]"),
        "layers of vision": ("vision.num_layers=2",),
        "vocabulary": ("text.vocab_size=1024",),
        "hidden size": ("text.hidden_size=48",),
        "feed-forward size": ("text.ffn_hidden_size=96",),
        "window": ("text.sliding_window=4",),
        "norm": ("text.norm_eps=1e-3",),
        "width of vision": ("vision.width=32", "--model.vision.ffn_hidden_size=96"),
    }  # fmt: skip
    changes = {}
    for name, (first, *others) in model.items():
        field = "vision.ffn_hidden_size" if name == "width of vision" else first.split("=")[0]
        changes[name] = Change((f"--model.{first}", *others), field)
    data = {
        "seed": ("--seed_everything=6", "seed"),
        "length of packs": ("--data.max_length=128", "max_length"),
        "window of packs": ("--data.window=7", "window"),
        "packs of a step": ("--data.microbatches=2", "microbatches"),
        "share that validates": ("--data.val_share=0.4", "data.sets"),
        "prompt": ("--data.prompt=What?", "prompt"),
        "crops": ("--data.multicrop=true", "multicrop"),
        "texts that are too long": ("--data.too_long=drop", "data.sets"),
        "set": ("--data.sets={data}/other", "sets"),
        "precision": ("--trainer.precision=bf16-true", "trainer.precision"),
    }
    changes |= {name: Change((option,), word) for name, (option, word) in data.items()}
    changes["set"] = Change(changes["set"].options, "data.sets", prepare=_another_set)
    changes["tokenizer"] = Change((), "tokenizer", prepare=_other_tokenizer)
    changes["samples"] = Change((), "data.sets", prepare=_other_samples)
    changes["more samples"] = Change((), "data.sets", prepare=_more_samples)
    return changes


TAKEN = {
    "model.lr": "2e-3", "model.min_lr_factor": "0.2", "model.warmup_steps": "2", "model.decay_steps": "500",
    "model.weight_decay": "0.3", "model.betas": "[0.8,0.9]", "model.eps": "1e-6",
    "model.lr_factors": "{vision_model.*: 0.5}", "model.freeze_vision_model": "true",
    "trainer.gradient_clip_val": "0.5", "trainer.val_check_interval": "3", "trainer.callbacks": f"[{RUN_CHECKPOINTS}]",
    "trainer.strategy.init_args.cpu_threads": "2", "trainer.deterministic": "true",
    "data.init_args.num_workers": "1", "data.init_args.prefetch": "2", "data.init_args.resize": "exact",
    "data.init_args.mixture": "tokens", "data.init_args.bad": "skip", "data.init_args.max_bad_share": "0.5",
    "data.init_args.max_pixels": "1000000",
}  # fmt: skip


def cases() -> dict[str, Change]:
    changes = _refused()
    for field, value in TAKEN.items():
        changes[field] = Change((f"--{field.replace('init_args.', '')}={value}",), field, taken=True)
    changes["steps"] = Change((), "trainer.max_steps", taken=True)
    changes["layout"] = Change(("--trainer.strategy.tensor=2",), "trainer.strategy.init_args.tensor", True, None, 2)
    changes["ranks"] = Change((), "trainer.devices", True, None, 2)
    return changes


def measure(full: bool, seed: int, folder: Path) -> Figure:
    # Nothing is drawn at random here, so that the seed changes nothing.
    data = make_set(folder / "made")
    straight = Place.make(folder / "straight", data, STEPS, every=STEPS)
    straight.finish()
    chosen = cases()
    if not full:
        chosen = {name: chosen[name] for name in ("layers of text", "tokenizer", "samples", "seed", "model.lr")}
    wrong = []
    for number, (name, change) in enumerate(chosen.items()):
        problem = _problem(change, straight, data, folder / f"case{number}")
        if problem is not None:
            wrong.append(f"{name}: {problem}")
            print(wrong[-1], flush=True)
    listed = sum(change.taken for change in chosen.values())
    told = f"{len(chosen) - listed} changes are to be refused by name with nothing written, {listed} listed and taken"
    return Figure(len(chosen) - len(wrong), len(chosen), f"{told}; silent or otherwise: {len(wrong)}")


def _problem(change: Change, straight: Place, made: Path, folder: Path) -> str | None:
    data = shutil.copytree(made, folder / "data")
    run = shutil.copytree(straight.run, folder / "run")
    place = Place.make(folder / "fit", made, STEPS + 1, run=run, every=STEPS)
    sets = (f"--data.sets={data / 'set'}", f"--data.tokenizer={data / 'tokenizer.json'}") if change.prepare else ()
    if change.prepare is not None:
        change.prepare(data)
    options = [option.replace("{data}", str(data)) for option in (*sets, *change.options)]
    before = digest(run)
    done = next(child.wait() for child in place.start_ranks(change.ranks, "--resume=must", *options))
    if change.taken:
        listed = [line for line in done.out.splitlines() if line.startswith(f"resume      changed: {change.named}")]
        went_on = (run / "checkpoints" / f"step_{STEPS + 1:06d}").is_dir()
        problem = None if done.code == 0 and listed and " -> " in listed[0] and went_on else done.out + done.err[-900:]
    elif done.code != 2 or not done.err.startswith("error: ") or len(done.err.splitlines()) != 1:
        problem = f"exit code {done.code}\n{done.out}{done.err[-900:]}"
    elif change.named not in done.err:
        problem = f"{change.named} is not in: {done.err}"
    else:
        problem = None if digest(run) == before else "something was written"
    if problem is None:
        shutil.rmtree(folder)
    return problem


def digest(folder: Path) -> str:
    """Of names and contents of all files."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        whole.update(f"{path.relative_to(folder)}\0".encode())
        if path.is_file():
            whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()
