"""One rank of `launch.agree` with the fingerprint that it is given; started by tests/test_launch.py.

python tests/layouts/launch_worker.py '{"address": ..., "port": ..., "rank": 0, "ranks": 2, "timeout": 5, "fields": {}}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

import torch
import torch.distributed as dist

from step37_lit.megatron import launch


def main() -> int:
    job = json.loads(sys.argv[1])
    own = launch.fingerprint(recipe=job["fields"])
    where = job["address"], job["port"]
    try:
        store = launch.agree(*where, job["rank"], job["ranks"], own, job["timeout"])
    except launch.LaunchError as error:
        print(error, file=sys.stderr)
        return 2
    address = f"tcp://{where[0]}:{where[1]}"  # the process group at the same address, as the strategy makes it
    dist.init_process_group("gloo", init_method=address, rank=job["rank"], world_size=job["ranks"])
    del store
    total = torch.tensor(float(job["rank"]))
    dist.all_reduce(total)
    print(total.item())
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
