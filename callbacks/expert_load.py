"""Load of the routed experts while training: who gets how many tokens, and where the router's bias stands."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from callbacks.caption_metrics import write_captions
from step37_lit.batch import PackedBatch
from step37_lit.errors import require
from step37_lit.megatron.expert_load import ExpertLoadRecording, LayerLoad

FILE = "expert_load.jsonl"


class ExpertLoad(pl.Callback):
    """Tokens of each routed expert in every n-th optimizer step, over all ranks.

    Logs for each layer with experts `train/expert_entropy/layer_N` (1 where all experts get as many tokens, 0 where
    one gets all), `train/expert_largest_share/layer_N` (1 / experts at best) and `train/router_bias_spread/layer_N`
    (largest bias - smallest), and `train/dropped_tokens`: what is missing in the counts. That is zero by
    construction, since experts have no capacity that a token could exceed. Layers are numbered over the whole decoder,
    from 0.

    Appends to `expert_load.jsonl` in the run's folder, for each layer,
    `{"step": optimizer steps done, "layer": int, "tokens": [int of each expert], "bias": [float of each expert]}`
    (see `LayerLoad`). A resumed run goes on in the file behind its checkpoint's step; another run starts it anew.

    Args:
        every_n_steps: Steps between two that are counted; the others do nothing for it.
    """

    def __init__(self, every_n_steps: int = 50):
        require(every_n_steps > 0, "expert_load.every_n_steps", "a positive number", every_n_steps)
        self.every_n_steps = every_n_steps
        self._recording: ExpertLoadRecording | None = None

    def check(self, trainer: pl.Trainer, module: Any) -> None:
        """Raises `ConfigError` for a model without routed experts."""
        layers = module.config.text.moe_layers
        require(len(layers) > 0, "callbacks.expert_load.ExpertLoad", "a model with experts (text.moe_layers)", layers)

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self.check(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        file = Path(trainer.default_root_dir) / FILE
        if trainer.is_global_zero and file.is_file():  # steps behind the checkpoint are trained again
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may have left half a line
            write_captions(file, [row for row in rows if row["step"] <= trainer.global_step])

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.global_step + 1) % self.every_n_steps == 0:
            self._recording = ExpertLoadRecording(pl_module.model)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: list[PackedBatch], batch_idx: int
    ) -> None:
        if self._recording is None:
            return
        loads = self._recording.gather()
        self._recording = None
        positions = sum(pl_module.strategy.gather_from_data_ranks(sum(pack.input_ids.numel() for pack in batch)))
        routed = positions * pl_module.config.text.top_k
        values: dict[str, float] = {"train/dropped_tokens": sum(routed - sum(load.tokens) for load in loads)}
        for load in loads:
            values |= {f"train/{name}/layer_{load.layer}": value for name, value in load_figures(load).items()}
        for logger in trainer.loggers:  # not `log`: between two counts it would give the last ones again
            logger.log_metrics(values, step=trainer.global_step - 1)  # where the step's loss is
        if trainer.is_global_zero:
            file = Path(trainer.default_root_dir) / FILE
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as out:
                out.write("".join(_row(trainer.global_step, load) for load in loads))


def load_figures(load: LayerLoad) -> dict[str, float]:
    """Entropy of the shares in units of its largest value, the largest share, and the spread of the bias."""
    total = sum(load.tokens)
    shares = [tokens / total for tokens in load.tokens]
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    return {
        "expert_entropy": entropy / math.log(len(shares)),
        "expert_largest_share": max(shares),
        "router_bias_spread": max(load.bias) - min(load.bias),
    }


def _row(step: int, load: LayerLoad) -> str:
    bias = [float(f"{value:.7g}") for value in load.bias]  # the digits of fp32
    return json.dumps({"step": step, "layer": load.layer, "tokens": load.tokens, "bias": bias}) + "\n"
