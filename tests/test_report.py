"""The report of a run: what is read of its folder, how curves are drawn, which samples are shown, what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from made_runs import (
    CONFIG,
    HOSTILE_KEY,
    caption,
    hostile_run,
    plain_run,
    scene,
    training_rows,
    write_lines,
    write_metrics,
)
from PIL import Image

from step37_lit.errors import ConfigError
from step37_lit.report import write_report
from step37_lit.report.axes import Axis, round_step, short
from step37_lit.report.charts import CHARTS, Chart, lines_of, other_charts
from step37_lit.report.choose import choose, unknown_words
from step37_lit.report.experts import balance, heat_map
from step37_lit.report.page import state
from step37_lit.report.pictures import picture_path, picture_uris, save_picture
from step37_lit.report.plots import MOST_SPANS, bands, plot
from step37_lit.report.read import Series, read_run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_run(tmp_path_factory.mktemp("runs") / "plain")


def series(values: dict[int, float]) -> Series:
    return Series(np.array(list(values), dtype=np.int64), np.array(list(values.values())))


# ---- reading ----


def test_values_and_steps_are_those_logged(run_folder: Path) -> None:
    run = read_run(run_folder)
    rows = training_rows(600)
    for name in ("train/loss", "val/cider_d", "lr-ForwardingOptimizer/pg2"):
        logged = [(row["step"] + 1, row[name]) for row in rows if name in row]
        assert list(zip(run.metrics[name].steps.tolist(), run.metrics[name].values.tolist(), strict=True)) == logged
    assert (run.step, run.max_steps, run.epoch) == (600, 600, 0)
    assert [v.step for v in run.validations[""]] == [150, 300, 450, 600] and len(run.validations[""][0].captions) == 20
    assert len(run.loads) == 16 and run.loads[-1].tokens.shape == (8,) and not run.bad
    assert [c.num_bytes for c in run.checkpoints] == [5_400_000]
    assert not {"step", "epoch", "train/stage"} & run.metrics.keys()


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    """Cut anywhere, every file gives its whole lines."""
    folder = hostile_run(tmp_path / "run")
    run = read_run(folder)
    assert len(run.bad) == 3 and run.step == 12
    for name in ("metrics.csv", "bad_samples.jsonl", "expert_load.jsonl"):
        data = (folder / name).read_bytes()
        for cut in (0, *range(1, len(data), len(data) // 9), len(data) - 1):
            (folder / name).write_bytes(data[:cut])
            read = read_run(folder)
            lines = data[:cut].count(b"\n")
            if name == "metrics.csv":
                steps = read.metrics["train/loss"].steps if "train/loss" in read.metrics else ()
                assert len(steps) == min(12, max(0, lines - 1))
            else:
                assert len(read.bad if name == "bad_samples.jsonl" else read.loads) == lines
            write_report(folder)
        (folder / name).write_bytes(data)


def test_a_resumed_step_counts_once(tmp_path: Path) -> None:
    write_metrics(
        tmp_path, [{"step": 0, "a": 1.0}, {"step": 1, "a": 2.0}, {"step": 1, "a": 3.0}, {"step": 2, "b": 4.0}]
    )
    metrics = read_run(tmp_path).metrics
    assert metrics["a"].steps.tolist() == [1, 2] and metrics["a"].values.tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("metrics.csv", "a,b\n1,2\n", "a column named step"),
        ("metrics.csv", "step,a\n0,1\n1,2,3\n", "line 3: expected 2 cells, found 3"),
        ("metrics.csv", "step,a\n0,1\n1,much\n", "line 3: expected numbers"),
        ("metrics.csv", "step,a\n0.5,1\n", "line 2: expected numbers"),
        ("metrics.csv", b"step,\xff\n0,1\n", "UTF-8"),
        ("config.yaml", "trainer: [\n", "config: expected YAML"),
        ("config.yaml", "name: a service\n", "trainer: expected the section of a recipe"),
        ("config.yaml", "- 1\n", "trainer: expected the section of a recipe"),
        ("captions/step_000001.jsonl", '{"key": "a"\n', "line 1: expected JSON"),
        ("captions/step_000001.jsonl", "[1]\n", "line 1: expected a JSON object"),
        ("captions/step_000001.jsonl", '{"key": "a", "caption": 3}\n', "line 1: caption: expected a str, found 3"),
        ("captions/step_000001.jsonl", json.dumps(caption("a", "b", [], 1.0) | {"references": [4]}) + "\n", "strings"),
        ("bad_samples.jsonl", "{}\nnot JSON\n", "line 2: expected JSON"),
        ("expert_load.jsonl", '{"step": 1, "layer": 2, "tokens": [1, -1], "bias": []}\n', "numbers of tokens"),
        ("expert_load.jsonl", '{"step": 1, "layer": 2, "tokens": [1, "a"], "bias": []}\n', "lists of numbers"),
        ("expert_load.jsonl", '{"step": 1, "layer": 2, "tokens": [1, 2], "bias": [0]}\n', "bias: expected 2 entries"),
        ("expert_load.jsonl", '{"step": true, "layer": 2, "tokens": [1], "bias": [0]}\n', "step: expected a int"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: str | bytes, told: str) -> None:
    write_metrics(tmp_path, [{"step": 0, "train/loss": 1.0}])
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match="expected") as raised:
        write_report(tmp_path)
    assert told in str(raised.value) and str(path) in str(raised.value)
    assert not (tmp_path / "report.html").exists()


# ---- curves ----


def test_spans_hold_every_value(run_folder: Path) -> None:
    """Means over spans weighted by their steps give the mean of all, and the strip has the extremes."""
    draw = np.random.default_rng(3)
    steps = np.sort(draw.choice(np.arange(1, 10001), 5000, replace=False))
    values = draw.standard_normal(5000)
    drawn = plot(Chart("a", ""), {"x": Series(steps, values)}, 10000)
    (line,) = drawn.lines
    assert line.area and not line.dots and line.path.count("L") == MOST_SPANS - 1
    assert len(drawn.spots) == MOST_SPANS and drawn.spots[0].title[0].startswith("steps ")
    span = [values[(steps > 100 * i) & (steps <= 100 * i + 100)] for i in range(MOST_SPANS)]
    for spot, inside in zip(drawn.spots, span, strict=True):
        expected = f"x: {short(inside.mean())} ({short(inside.min())} to {short(inside.max())})"
        assert spot.title[1] == expected
    assert math.isclose(drawn.spots[-1].x + drawn.spots[-1].width, 100)


def test_few_values_are_drawn_as_they_are() -> None:
    drawn = plot(Chart("a", "", zero=True), {"x": series({10: 1.0, 30: 3.0}), "y": series({30: 2.0})}, 40)
    x, y = drawn.lines
    assert [round(place[0], 6) for place in x.dots] == [25, 75] and not x.area
    top = 3 * 1.06 - 1 * 0.06  # room above the largest value
    assert math.isclose(x.dots[1][1], 100 - 100 * 3 / top, abs_tol=1e-9)
    assert [spot.title for spot in drawn.spots] == [("step 10", "x: 1"), ("step 30", "x: 3", "y: 2")]
    assert [(spot.x, spot.x + spot.width) for spot in drawn.spots] == [(0, 50), (50, 100)]
    assert y.colour != x.colour


def test_values_that_are_not_finite_are_told_and_not_drawn() -> None:
    data = {"x": series({1: 1.0, 2: math.nan, 3: math.inf, 4: 2.0}), "y": series({2: math.nan})}
    drawn = plot(Chart("a", ""), data, 4)
    assert drawn.lines[0].not_finite == (2, 2) and drawn.lines[1].not_finite == (1, 2)
    assert len(drawn.lines[0].dots) == 2 and drawn.lines[1].path == "" and drawn.lines[1].last == "nan"
    assert "nan" not in drawn.lines[0].path + drawn.lines[0].last


def test_stages_are_bands(run_folder: Path) -> None:
    run = read_run(run_folder)
    found = bands(run.stages, run.stage_configs, run.step)
    assert [(b.index, b.name, b.first, b.last) for b in found] == [
        (0, "projector", 1, 200), (1, "text", 201, 320), (2, "everything", 321, 600),
    ]  # fmt: skip
    assert found[2].trains == "text_decoder × 0.5; vision_tower × 0.1, a layer more every 100 steps"
    assert [round(b.x, 3) for b in found] == [0, 33.333, 53.333]
    assert math.isclose(sum(b.width for b in found), 100)
    assert [b.name for b in bands(series({1: 0.0, 2: 4.0}), [], 2)] == ["stage 0", "stage 4"]
    assert bands(None, run.stage_configs, 600) == ()


def test_every_logged_value_is_in_a_chart(run_folder: Path) -> None:
    metrics = read_run(run_folder).metrics
    fixed = {chart.title: lines_of(chart, metrics) for chart in CHARTS}
    assert list(fixed["Loss"]) == ["training", "validation", "validation, seen"]
    assert list(fixed["Learning rate"]) == ["pg1", "pg2"]
    others = {chart.title: list(lines) for chart, lines in other_charts(metrics)}
    assert others == {"val/attribute_accuracy": ["color", "shape", "size"], "val/bleu_1": ["bleu_1"]}
    drawn = sum(len(lines) for lines in (*fixed.values(), *others.values()))
    assert drawn == len(metrics)
    rates = {f"lr-Adam/pg{i}": series({1: 1.0 + i // 2}) for i in range(4)}
    rate = next(chart for chart in CHARTS if chart.title == "Learning rate")
    assert list(lines_of(rate, rates)) == ["pg0, pg1", "pg2, pg3"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (1234.6, "1,235"), (2.16128, "2.161"), (6e-4, "6e-4"), (1.209e-5, "1.209e-5"),
     (-0.25, "-0.25"), (12345678, "1.235e7"), (999.96, "1,000"), (100, "100"), (math.nan, "nan")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(("least", "most"), [(0, 0), (5, 5), (-3, 7), (1e-7, 6e-4), (0.9999, 1.0), (0, 2.5e9)])
@pytest.mark.parametrize("log", [False, True])
def test_axes_hold_their_values(least: float, most: float, log: bool) -> None:
    axis = Axis.over(least, most, zero=True, log=log)
    assert 0 <= axis.at(least) <= axis.at(most) <= 100
    ticks = axis.ticks(5)
    assert 1 <= len(ticks) <= 6 and all(-1e-6 <= tick.at <= 100 + 1e-6 for tick in ticks)
    assert len({tick.label for tick in ticks}) == len(ticks)


def test_round_steps() -> None:
    assert [round_step(x) for x in (1, 1.2, 2.1, 5.5, 0.03, 900)] == [1, 2, 5, 10, 0.05, 1000]


# ---- gallery ----


def test_best_worst_and_most_changed(run_folder: Path) -> None:
    validations = read_run(run_folder).validations[""]
    groups = {group.title: group for group in choose(validations, 3)}
    last = {c.key: c.cider_d for c in validations[-1].captions}
    first = {c.key: c.cider_d for c in validations[0].captions}
    order = sorted(last, key=last.__getitem__)
    assert [card.key for card in groups["Best"].cards] == order[::-1][:3]
    assert [card.key for card in groups["Worst"].cards] == order[:3]
    rest = [key for key in last if key not in (*order[::-1][:3], *order[:3])]
    rest.sort(key=lambda key: -abs(last[key] - first[key]))
    assert [card.key for card in groups["Most changed"].cards] == rest[:3]
    card = groups["Best"].cards[0]
    assert [attempt.step for attempt in card.shown] == [150, 300, 450, 600]
    assert math.isclose(card.change, last[card.key] - first[card.key])


def test_many_validations_show_first_and_last(tmp_path: Path) -> None:
    (card,) = choose(read_run(hostile_run(tmp_path / "run")).validations["seen"], 1)[0].cards
    assert len(card.shown) == 5 and (card.shown[0].step, card.shown[-1].step) == (1, 12)
    assert sorted(attempt.step for attempt in card.shown + card.hidden) == list(range(1, 13))


def test_no_sample_is_shown_twice(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 0, "train/loss": 1.0}])
    write_lines(tmp_path / "captions" / "step_000001.jsonl", [caption("only", "a", ["b"], 1.0)])
    groups = choose(read_run(tmp_path).validations[""])
    assert [(group.title, len(group.cards)) for group in groups] == [("Best", 1)]


def test_words_of_no_reference() -> None:
    pieces = unknown_words("A red dog, in RAIN.", ["a dog", "Rain on the roof"])
    assert pieces == (("A ", False), ("red", True), (" dog, ", False), ("in", True), (" RAIN.", False))
    assert unknown_words("一只狗", ["一只猫"]) == (("一只", False), ("狗", True))
    assert unknown_words("", ["a"]) == ()


def test_pictures_are_written_once_and_small(tmp_path: Path) -> None:
    key = "../../etc/passwd\x00<é>"
    for number in range(2):
        save_picture(tmp_path, key, scene(number), number)
    written = picture_path(tmp_path, key)
    assert written.parent == tmp_path / "captions" / "pictures" and len(list(written.parent.iterdir())) == 2
    with Image.open(written) as image:
        assert image.size == (160, 120) and image.format == "JPEG"
        assert np.abs(np.asarray(image, dtype=int)[60, 80] - scene(0)[90, 120]).max() < 12
    before = written.read_bytes()
    save_picture(tmp_path, key, scene(9))
    assert written.read_bytes() == before
    assert len(picture_uris(tmp_path, key)) == 2 and picture_uris(tmp_path, "other") == ()
    written.write_bytes(b"<svg onload='1'>")
    assert len(picture_uris(tmp_path, key)) == 1


# ---- experts ----


def test_heat_map_is_the_last_whole_step(tmp_path: Path) -> None:
    rows = [
        {"step": 5, "layer": 3, "tokens": [4, 0, 0, 0], "bias": []},
        {"step": 5, "layer": 4, "tokens": [1, 1, 1, 1], "bias": [0.5, -0.25, 0, 0]},
        {"step": 9, "layer": 3, "tokens": [1, 1, 1, 1], "bias": []},  # layer 4 is not there yet
    ]
    write_metrics(tmp_path, [{"step": 8, "train/loss": 1.0}])
    write_lines(tmp_path / "expert_load.jsonl", rows)
    loads = read_run(tmp_path).loads
    heat = heat_map(loads)
    assert heat is not None and (heat.step, heat.experts, [row.layer for row in heat.rows]) == (5, 4, [3, 4])
    assert heat.rows[0].cells == ((0, "M1 0h1v1h-1zM2 0h1v1h-1zM3 0h1v1h-1z"), (6, "M0 0h1v1h-1z"))
    assert [level for level, _ in heat.rows[1].cells] == [3]
    assert "router bias: -0.25 to 0.5" in heat.rows[1].title
    assert "most: expert 0, 4.00 × the mean" in heat.rows[0].title
    (_, busiest), (_, evenness) = balance(loads)
    assert busiest["highest layer"].values.tolist() == [4, 1] and busiest["mean of layers"].values.tolist() == [2.5, 1]
    assert evenness["lowest layer"].values.tolist() == [0, 1]
    assert heat_map([]) is None


# ---- state and command ----


def test_state(run_folder: Path, tmp_path: Path) -> None:
    run = read_run(run_folder)
    assert state(run, ended=False, now=run.last_written + 1e6).word == "finished"
    going = read_run(hostile_run(tmp_path / "run"))
    assert state(going, ended=False, now=going.last_written + 5).word == "running"
    assert state(going, ended=False, now=going.last_written + 5).detail.startswith("step 12 of 600")
    assert state(going, ended=False, now=going.last_written + 3600).word == "stopped"
    assert state(going, ended=True, now=going.last_written).word == "finished"
    os.utime(tmp_path / "run" / "metrics.csv", (time.time() + 500,) * 2)
    assert math.isclose(read_run(tmp_path / "run").last_written, time.time() + 500, abs_tol=60)
    written = write_report(tmp_path / "run")
    os.utime(written, (time.time() + 5000,) * 2)
    assert read_run(tmp_path / "run").last_written < time.time() + 1000  # the report is no sign of life


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps(CONFIG))
    html = write_report(tmp_path).read_text()
    assert "Nothing has been logged yet." in html and "There has been no validation yet." in html
    (tmp_path / "metrics.csv").write_bytes(b"")
    assert write_report(tmp_path).read_text().count("Nothing has been logged yet.") == 1


def test_an_earlier_report_is_replaced(run_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run_folder, tmp_path / "copy"))
    first = write_report(folder)
    before = first.read_text()
    write_metrics(folder, training_rows(450))
    assert write_report(folder) == first and "step 450 of 600" not in before
    assert "step 600 of 600" in first.read_text()  # captions and expert load are further than what is logged
    (folder / "captions" / "step_000600.jsonl").unlink()
    (folder / "expert_load.jsonl").unlink()
    write_report(folder)
    assert "step 450 of 600" in first.read_text()
    assert [path.name for path in folder.iterdir() if "report" in path.name] == ["report.html"]


def report(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """The command in a process where torch, megatron and lightning cannot be imported."""
    code = (
        "import sys\n"
        "for name in ('torch', 'lightning', 'megatron', 'torchmetrics'): sys.modules[name] = None\n"
        "from jsonargparse import ArgumentError\n"
        "from step37_lit.errors import UserError\n"
        "from step37_lit.report_command import main\n"
        "try: sys.exit(main(sys.argv[1:]))\n"
        "except (UserError, ArgumentError) as error: print(f'error: {error}', file=sys.stderr); sys.exit(2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_command_needs_no_torch(run_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "copy")
    done = report(tmp_path, "copy")
    assert done.returncode == 0 and "copy/report.html" in done.stdout, done.stderr
    assert (Path(folder) / "report.html").stat().st_size > 50_000
    assert "RUN/report.html" in report(tmp_path, "-h").stdout


def test_command_refuses_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.yaml").write_text("version: 2\nservices: {}\n")
    (tmp_path / "file").write_text("")
    for name in ("absent", "empty", "foreign", "file"):
        done = report(tmp_path, name)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and name in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert not list(tmp_path.rglob("report.html"))


def test_hostile_key_has_its_picture(tmp_path: Path) -> None:
    folder = hostile_run(tmp_path / "run")
    save_picture(folder, f"{HOSTILE_KEY}0", scene(0))
    assert write_report(folder).read_text().count("data:image/jpeg;base64,") == 1
