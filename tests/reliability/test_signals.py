import csv
from pathlib import Path

from tests.conftest import SEED
from tests.reliability import signals
from tests.reliability.rank_runs import LAST, VALIDATED, Act, RankRun, newest


def test_a_signal_to_one_rank_ends_all_alike(tmp_path: Path) -> None:
    figure = signals.measure(full=False, seed=SEED, folder=tmp_path)
    print(figure)
    assert figure.good == figure.tried == 2, figure


def test_a_validation_that_was_cut_is_made_up_for(tmp_path: Path) -> None:
    """Losses, what validations log, and their captions are those of the straight run, each once; also where the signal
    ended the run between a step and its validation."""
    straight = RankRun(tmp_path / "straight", 1, Act(0, "never", "wait"))
    (ended,) = straight.wait()
    assert ended.code == 0, ended.err
    captions = {path.name: path.read_bytes() for path in straight.folder.glob("run/captions/*.jsonl")}
    for moment in ("step", "captions"):
        cut = RankRun(tmp_path / moment, 1, Act(0, moment, "SIGUSR1"))
        (ended,) = cut.wait()
        assert ended.code == 75 and newest(cut.folder) == VALIDATED, ended.err
        assert values(cut.folder)["val/loss"] == [] and not list(cut.folder.glob("run/captions/*.jsonl"))
        (ended,) = cut.again(Act(0, "never", "wait")).wait()
        assert ended.code == 0 and f"resume      step {VALIDATED}, " in ended.out, ended.err
        found = values(cut.folder)
        assert [step for step, _ in found["val/loss"]] == [step - 1 for step in range(VALIDATED, LAST + 1, VALIDATED)]
        assert found == values(straight.folder), moment
        assert {path.name: path.read_bytes() for path in cut.folder.glob("run/captions/*.jsonl")} == captions != {}


def values(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Step and text of the values in metrics.csv, of the columns that do not depend on the time."""
    with (folder / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {name for row in rows for name in row if name in ("train/loss", "train/grad_norm")} | {
        "val/loss",
        "val/cider_d",
    }
    return {name: [(int(row["step"]), row[name]) for row in rows if row.get(name)] for name in names}
