"""A number that is not finite, or a spike, put into a step: the run stops before the optimizer steps, and says where.

Put into a weight, an output, a gradient, pixels or labels, on one rank of a run through the command line. Looked at:
exit codes, the one line, the weights and moments of every rank before and after, the newest checkpoint, the dump.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from torch import Tensor

from step37_lit.checkpoint.manifest import read_manifest, verify
from step37_lit.exit_codes import FAULT
from step37_lit.fault_dump import WEIGHTS, read_dump
from step37_lit.megatron.chunks import chunks_of, whole_names
from step37_lit.saved_model import find_checkpoint
from tests import forks
from tests.reliability import runs
from tests.reliability.figure import Figure

STEP, STEP_OF_SPIKE = 3, 25  # a spike needs a history
PACK = 1  # that outputs are poisoned for, of a data-parallel rank's
SPIKE_FACTORS = {"loss": 1.12, "grad_norm": 30.0}
LABEL = 11  # that no sample has
MOE = {"moe_layers": [1], "num_experts": 4, "top_k": 2, "expert_ffn_size": 32, "shared_expert_ffn_size": 32}
NAMES = {"expert": "EP", "tensor": "TP", "pipeline": "PP", "context": "CP"}


@dataclass(frozen=True)
class Case:
    """What is put where.

    Args:
        kind: Of `KINDS`.
        rank: Global rank.
        ranks: Of the run.
        strategy: What is split.
        value: nan or inf.
    """

    kind: str
    rank: int = 0
    ranks: int = 1
    strategy: dict[str, Any] = field(default_factory=dict)
    value: str = "nan"

    def __str__(self) -> str:
        split = [f"{NAMES.get(name, name)}{size}" for name, size in self.strategy.items()]
        return f"{self.value} {self.kind} on rank {self.rank} of {self.ranks} {' '.join(split)}".strip()

    @property
    def model_parallel(self) -> int:
        return math.prod(self.strategy.get(name, 1) for name in ("tensor", "pipeline", "context"))

    @property
    def stage(self) -> int:
        """Pipeline stages are the outermost dimension of megatron's ranks."""
        return self.rank * self.stages // self.ranks

    @property
    def stages(self) -> int:
        return self.strategy.get("pipeline", 1)

    @property
    def of_stage(self) -> int:
        """Number among the ranks that share a pack on the stage."""
        return self.rank % (self.model_parallel // self.stages)

    @property
    def data_rank(self) -> int:
        return self.rank // (self.model_parallel // self.stages) % (self.ranks // self.model_parallel)

    @property
    def is_of_rank(self) -> bool:
        """Whether the rank has it of its own, and not from others or like them."""
        if self.kind in ("pixels", "spike of labels"):
            return self.stage == self.of_stage == 0
        if self.kind == "unused weight":
            return self.stage == 0
        return self.kind != "output" or self.of_stage == 0 or self.stage == self.stages - 1

    @property
    def step(self) -> int:
        return STEP_OF_SPIKE if self.kind.startswith("spike") else STEP

    @property
    def is_in_dump(self) -> bool:
        """Whether the dump can bring it back: a hook that a test has set is not in it."""
        return self.kind in ("weight", "unused weight", "pixels", "spike of labels")

    @property
    def weight(self) -> str:
        """Part of the name of the weight that is concerned."""
        names = {"unused weight": "word_embeddings", "gradient of a replicated weight": "pre_mlp_layernorm"}
        return names.get(self.kind, "linear_fc1.weight")


# The unused weight is of a token that no sample has: neither loss nor gradients know of it. The norm of the gradients
# has those of replicated weights from one tensor rank only.
KINDS = (
    "weight", "unused weight", "output", "gradient", "gradient of a replicated weight", "pixels", "spike of labels",
    "spike of a gradient",
)  # fmt: skip
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {}),
    (2, {"overlap_data_parallel": True}),
    (2, {"tensor": 2}),
    (2, {"tensor": 2, "sequence_parallel": True}),
    (2, {"pipeline": 2}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
    (2, {"context": 2}),
    (2, {"expert": 2}),
    (4, {"pipeline": 2}),
    (4, {"pipeline": 2, "tensor": 2}),
    (4, {"tensor": 2, "expert": 2}),
]
SHORT = [
    Case("weight", 0),
    Case("output", 1, 2),
    Case("gradient", 1, 2, {"pipeline": 2}),
]


def all_cases() -> list[Case]:
    cases = [
        Case(kind, rank, ranks, strategy, value)
        for ranks, strategy in LAYOUTS
        for rank in range(ranks)
        for kind in KINDS
        for value in (("nan", "inf") if kind in ("weight", "gradient") else ("nan",))
    ]
    return [case for case in cases if case.is_of_rank]


def measure(full: bool, seed: int, folder: Path) -> Figure:
    cases = all_cases() if full else SHORT
    random.Random(seed).shuffle(cases)
    data = runs.make_set(folder)
    good, by_kind, replayed = 0, Counter[str](), 0
    for number, case in enumerate(cases):
        wrong = look_at(case, data, folder / f"run{number}")
        good += not wrong
        by_kind[case.kind] += 1
        replayed += case.is_in_dump and not wrong
        if wrong:
            print(f"{folder / f'run{number}'}: {case}: {wrong}", flush=True)
    kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(by_kind.items()))
    layouts = len({(case.ranks, str(case.strategy)) for case in cases})
    return Figure(
        good,
        len(cases),
        f"{kinds} on each rank of {layouts} layouts; exit code {FAULT} on all ranks, weights and moments bit-equal; "
        f"{replayed} dumps bring the fault back on one process, the others say that it was not in the batch or weights",
    )


# ---- one run ----


def look_at(case: Case, data: Path, folder: Path) -> list[str]:
    """Runs a case; what is not as promised."""
    folder.mkdir(parents=True)
    done = start(case, data, folder)
    wrong = [f"rank {rank}: exit code {each.code}" for rank, each in enumerate(done) if each.code != FAULT]
    if wrong:
        return wrong + [each.err[-1500:] for each in done]
    seen = [json.loads((folder / f"seen{rank}.json").read_text()) for rank in range(case.ranks)]
    wrong += [f"rank {rank}: {name} has changed" for rank, each in enumerate(seen) for name in each["changed"]]
    lines = [line for each in done for line in each.err.splitlines() if "fault: " in line]
    missing = [part for part in expected_parts(case, seen) if len(lines) != 1 or part not in lines[0]]
    if missing:
        wrong.append(f"{missing} is not in {lines}")
    newest = find_checkpoint(folder / "run")
    if read_manifest(newest).step != case.step - 1:
        wrong.append(f"the newest checkpoint is {newest}")
    verify(newest)
    return wrong + look_at_dump(case, newest, folder)


def look_at_dump(case: Case, newest: Path, folder: Path) -> list[str]:
    place = folder / "run" / "faults" / f"step_{case.step:06d}"
    dump, wrong = read_dump(place), []
    if not set(dump.fault.keys) <= {key for pack in dump.packs for key in pack.sample_keys}:
        wrong.append("the dump has other samples")
    before, at_fault = (runs.digests(checkpoint, parts=("model",)) for checkpoint in (newest, place / WEIGHTS))
    differing = [name for name in before if at_fault.get(name) != before[name]]
    if len(differing) != ("weight" in case.kind and case.is_in_dump):
        wrong.append(f"weights of the dump that are not the checkpoint's: {differing}")
    again = forks.call(forks.command, ["replay", str(place)], cwd=folder, log=folder / "replay")
    if again.code != (0 if case.is_in_dump else 1):
        wrong.append(f"replay: exit code {again.code}\n{again.out[-1500:]}{again.err[-1500:]}")
    return wrong


def expected_parts(case: Case, seen: Sequence[dict[str, Any]]) -> list[str]:
    """What the line must say."""
    own, last = seen[case.rank], case.stage == case.stages - 1
    whats = {
        "output": f"loss {case.value} " if last else f"output of pipeline stage {case.stage} not finite ",
        "pixels": "loss nan " if case.stages == 1 else "output of pipeline stage 0 not finite ",
        "weight": f"weight {own['name']} not finite (1 of {own['size']} numbers) ",
        "gradient": f"gradient of {own['name']} not finite (1 of {own['size']} numbers) ",
        "unused weight": f"weight {own['name']} not finite (1 of {own['size']} numbers) ",
        "gradient of a replicated weight": f"gradient of {own['name']} not finite (1 of {own['size']} numbers) ",
        "spike of labels": "loss ",
        "spike of a gradient": "gradient norm ",
    }
    spike = case.kind.startswith("spike")
    start = f"fault: step {case.step}: {whats[case.kind]}"
    where = f"on rank {case.rank} (data-parallel rank {case.data_rank}, pipeline stage {case.stage} of {case.stages});"
    if case.kind == "spike of labels":  # the losses are the last stage's
        where = f"(data-parallel rank {case.data_rank}, pipeline stage {case.stages - 1} of {case.stages});"
    packs = [PACK] if case.kind in ("output", "pixels") else range(len(own["keys"]))
    keys = ", ".join(repr(key) for pack in packs for key in own["keys"][pack])
    return [start, where, "the optimizer has not stepped", "limit" if spike else "", f"; samples {keys}"]


def start(case: Case, data: Path, folder: Path) -> list[forks.Done]:
    """All ranks of a run, to their end."""
    recipe = runs.recipe(data, folder / "run", case.step + 2, every=1, validation=1000)
    recipe["trainer"]["callbacks"][0]["init_args"].pop("monitor")
    recipe["trainer"]["strategy"]["init_args"] |= case.strategy
    recipe["trainer"]["devices"] = case.ranks
    if case.strategy.get("virtual_pipeline"):
        kinds = ["full_attention", *["sliding_attention"] * 3]
        recipe["model"]["text"] |= {
            "num_layers": 4,
            "layer_types": kinds,
            "swiglu_limits": [None] * 4,
            "swiglu_limits_shared": [None] * 4,
        }
    if case.strategy.get("expert"):
        recipe["model"]["text"] |= MOE
    if case.kind.startswith("spike"):
        recipe["model"] |= {"spike_factors": SPIKE_FACTORS, "lr": 3e-3}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    children = [
        forks.Child(fit, (str(file), str(folder), asdict(case)), folder, folder / f"rank{rank}", environment)
        for rank, environment in enumerate(environments(case.ranks))
    ]
    return [child.wait() for child in children]


def environments(ranks: int) -> list[dict[str, str]]:
    """Of processes that a launcher has started."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    return [common | {"LOCAL_RANK": str(rank)} for rank in range(ranks)] if ranks > 1 else [{}]


# ---- in the ranks ----


def fit(recipe: str, folder: str, case: dict[str, Any]) -> int:
    from step37_lit import cli

    cli.TRAINER_DEFAULTS["callbacks"] = [Poison(Case(**case), Path(folder))]
    return forks.command(["fit", f"--config={recipe}"])


class Poison(pl.Callback):
    """Puts the case's value into a step, and writes what this rank had before and has behind it."""

    def __init__(self, case: Case, folder: Path):
        self.case, self.folder = case, folder
        self.seen: dict[str, Any] = {}
        self.before: dict[str, bytes] = {}

    def on_train_batch_start(self, trainer: Any, lit: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 != self.case.step:
            return
        strategy, case = trainer.strategy, self.case
        self.seen["keys"] = [list(pack.sample_keys) for pack in batch]
        value = float(case.value)
        name, weight = next(pair for pair in whole_names(lit.model) if case.weight in pair[0])
        self.seen |= {"name": name, "size": weight.numel()}
        if case.kind == "spike of labels":
            if strategy.data_parallel_rank == case.data_rank:
                for pack in batch:
                    pack.labels.fill_(LABEL)
        elif trainer.global_rank == case.rank:
            if case.kind in ("weight", "unused weight"):
                with torch.no_grad():
                    weight.view(-1)[-1] = value
            elif case.kind in ("gradient", "gradient of a replicated weight"):
                weight.register_hook(lambda gradient: with_value(gradient, value))
            elif case.kind == "spike of a gradient":
                weight.register_hook(lambda gradient: 1e5 * gradient)
            elif case.kind == "pixels":
                for image in batch[PACK].images:
                    image.images = torch.full(image.images.shape, value)
            else:
                poison_output(chunks_of(lit.model)[-1], value)
        self.before = state(trainer, lit)

    def on_exception(self, trainer: Any, lit: Any, exception: BaseException) -> None:
        behind = state(trainer, lit)
        self.seen["changed"] = [name for name in behind if behind[name] != self.before[name]]
        (self.folder / f"seen{trainer.global_rank}.json").write_text(json.dumps(self.seen))


def with_value(gradient: Tensor, value: float) -> Tensor:
    poisoned = gradient.clone()
    poisoned.view(-1)[-1] = value
    return poisoned


def poison_output(chunk: Any, value: float) -> None:
    packs = iter(range(1000))
    chunk.register_forward_hook(lambda module, inputs, output: output * value if next(packs) == PACK else output)


def state(trainer: Any, lit: Any) -> dict[str, bytes]:
    """Every number that the optimizer's step changes."""
    found = {name: tensor for name, tensor in lit.model.state_dict().items() if torch.is_tensor(tensor)}
    for number, shard in enumerate(trainer.optimizers[0].shards()):
        found |= {f"shard {number} {name}": tensor for name, tensor in shard.state.items()}
        found[f"shard {number}"] = shard.main
    return {
        name: tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, tensor in found.items()
    }
