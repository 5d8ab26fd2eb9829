"""Runs rows of the reliability table at full count and writes their figures into docs/reliability.md.

    make reliability [ARGS="--rows kills,corruption --seed 1 --short"]

A row that is not run keeps the line that it has. `--short` runs what the tests run and writes nothing. The exit code is
1 where a row falls short of its count, fails, or is not there.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import importlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tests.reliability.figure import Figure  # noqa: E402

# Module and promise, in the order of the table.
ROWS = {
    "kills": "survives kill -9",
    "atomic_save": "a save is atomic",
    "exact_resume": "exact resume",
    "signals": "a signal to any rank",
    "dead_ranks": "a dead or hung rank is named",
    "corruption": "corruption is found",
    "disk_full": "disk full, or read-only",
    "reshard": "reshard on load",
    "layout_parity": "layout parity",
    "elastic_data": "elastic data",
    "uneven_shards": "uneven shards",
    "bad_samples": "bad samples",
    "nan_and_spikes": "NaN and spikes",
    "bad_input": "bad input",
    "nothing_executes": "nothing executes",
    "mismatched_resume": "mismatched resume",
    "hub_round_trip": "hub round trip",
    "chaos": "all faults at random moments of one run",
}
FILE = ROOT / "docs" / "reliability.md"
START, END = "<!-- rows -->\n", "<!-- end of rows -->\n"
SEED = 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="names with commas between them")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--full", action="store_true", help="the default")
    parser.add_argument("--folder", type=Path, help="where the rows work (default: a temporary folder)")
    options = parser.parse_args()
    names = options.rows.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"rows {unknown}: expected any of {', '.join(ROWS)}")
    if options.short and options.full:
        parser.error("--short or --full")
    logging.disable(logging.WARNING)  # Lightning's, of every run
    fallen_short = [name for name in names if not _run(name, not options.short, options.seed, options.folder)]
    print(f"{len(names) - len(fallen_short)} of {len(names)} rows hold; not: {', '.join(fallen_short) or 'none'}")
    return 1 if fallen_short else 0


def _run(name: str, full: bool, seed: int, parent: Path | None) -> bool:
    try:
        module = importlib.import_module(f"tests.reliability.{name}")
    except ModuleNotFoundError as error:
        print(f"{name}: NOT RUN, there is no such module: {error}", flush=True)
        return False
    folder, begun = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent)), time.perf_counter()
    try:
        figure: Figure = module.measure(full=full, seed=seed, folder=folder)
    except Exception:
        traceback.print_exc()
        print(f"{name}: FAILED, see above; its files are in {folder}", flush=True)
        return False
    seconds = time.perf_counter() - begun
    print(f"{name}: {figure.good} of {figure.tried}, {seconds:.0f} s; {figure.detail}", flush=True)
    if full:
        _note(name, figure, seed, seconds)
    whole = figure.good == figure.tried > 0
    if whole:
        shutil.rmtree(folder)
    else:
        print(f"{name}: its files are in {folder}", flush=True)
    return whole


def _note(name: str, figure: Figure, seed: int, seconds: float) -> None:
    """Puts a row's line into the table; rows may be run at the same time."""
    date = datetime.date.today().isoformat()
    load = f"load {os.getloadavg()[0]:.0f}"
    counted = f"{figure.good} of {figure.tried}"
    cells = [ROWS[name], name, counted, figure.detail, str(seed), f"{_machine()}, {load}, {seconds:.0f} s", date]
    line = "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |\n"
    with FILE.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = file.read()
        before, rest = text.split(START)
        table, after = rest.split(END)
        head, rows = table.split("|---|---|---|---|---|---|---|\n")
        lines = {each.split(" | ")[1]: each + "\n" for each in rows.splitlines()} | {name: line}
        ordered = "".join(lines[row] for row in ROWS if row in lines)
        file.seek(0)
        file.write(f"{before}{START}{head}|---|---|---|---|---|---|---|\n{ordered}{END}{after}")
        file.truncate()


def _machine() -> str:
    cpus = len(os.sched_getaffinity(0))
    return f"{cpus} cores {platform.machine()}"


if __name__ == "__main__":
    sys.exit(main())
