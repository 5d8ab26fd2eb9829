"""Cases that ranks of one start run one behind the other, since starting them takes longer than a case."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state


def run_cases(run: Callable[[dict[str, Any], int], None]) -> None:
    """Calls `run` with each case of the list in the command's argument and with the number of ranks."""
    if "OMP_NUM_THREADS" not in os.environ:
        raise SystemExit("start through tests/layouts/resharding.py, which sets what a rank needs to know")
    torch.set_num_threads(1)
    environment = dict(os.environ)
    for case in json.loads(sys.argv[1]):
        os.environ.update(environment)  # of which Lightning removes some at the end of a run
        run(case, int(environment["WORLD_SIZE"]))
        parallel_state.destroy_model_parallel()  # the next case has another layout
