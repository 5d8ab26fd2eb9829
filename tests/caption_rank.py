"""One rank of `test_caption_metrics_ranks.py`: updates the metrics with its share of each case and writes the scores.

    python tests/caption_rank.py RANK RANKS FOLDER

FOLDER/cases.json: for each case, for each rank, a list of batches; a batch is the arguments of `update`.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torchmetrics import MetricCollection

from step37_lit.errors import ConfigError
from step37_lit.metrics import CIDErD, CocoBLEU, CocoROUGEL


def results_of(metrics: MetricCollection, batches: list[dict]) -> dict:
    metrics.reset()
    for batch in batches:
        metrics.update(**batch)
    try:
        values = {name: value.tolist() for name, value in metrics.compute().items()}
    except ConfigError as error:
        return {"error": str(error)}
    each = {name: metric.per_item()[1].tolist() for name, metric in metrics.items()}
    return {"values": values, "keys": metrics["CIDErD"].per_item()[0], "each": each}


def main(rank: int, ranks: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", f"file://{folder}/store{ranks}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    metrics = MetricCollection([CocoBLEU(), CocoROUGEL(), CIDErD()], compute_groups=False)
    cases = json.loads((folder / "cases.json").read_text())
    results = {name: results_of(metrics, shares[rank]) for name, shares in cases.items()}
    (folder / f"rank{rank}of{ranks}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
