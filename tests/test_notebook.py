"""The notebook: its outputs are there and of this code, and it runs from top to bottom."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

nbformat = pytest.importorskip("nbformat", reason="needs the extra `notebook`")
nbclient = pytest.importorskip("nbclient", reason="needs the extra `notebook`")
pytest.importorskip("ipykernel", reason="needs the extra `notebook`")
pytest.importorskip("matplotlib", reason="needs the extra `notebook`")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "first_captioner.ipynb"
FIGURES = 4
HEAD = re.compile(r"layer (\d), head (\d): +([\d.]+)% on the shape's quarter, +([\d.]+)% on each of the others")


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: Any) -> str:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def figures(notebook: Any) -> list[np.ndarray]:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    data = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [np.array(Image.open(io.BytesIO(base64.b64decode(each))).convert("L")) for each in data]


def check_figures(notebook: Any) -> None:
    shown = figures(notebook)
    assert len(shown) == FIGURES
    for figure in shown:
        assert min(figure.shape) > 150 and figure.std() > 10  # something is drawn


def test_the_committed_outputs_are_whole() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    check_figures(notebook)
    text = printed(notebook)
    assert "/home" not in text and str(ROOT) not in text
    accuracy = [float(found) for found in re.findall(r"generated_attribute_accuracy ([\d.]+)", text)]
    assert len(accuracy) == 4 and accuracy[-1] > 0.85 > accuracy[0]
    assert max(float(own) for *_, own, _ in HEAD.findall(text)) > 80


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer steps; the check inside, of the attention weights against what the layer computed, is part of it."""
    monkeypatch.setenv("STEP37_NOTEBOOK_STEPS", "24")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=280, kernel_name="python3", resources=where).execute()
    check_figures(notebook)
    text = printed(notebook)
    assert [int(step) for step in re.findall(r"step +(\d+)   loss", text)] == [6, 12, 18, 24]
    heads = [(int(layer), int(head)) for layer, head, *_ in HEAD.findall(text)]
    assert heads == [(0, head) for head in range(4)] + [(1, head) for head in range(6)]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
