"""Both notebooks run completely: with the recorded runs, and while training the smallest network."""

import ast
import json
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from Model import weights
from Training.errors import InputError
from Training.runs import history
from Training.tools import recorded
from Training.visual.published import COSTS, find_published

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ("training_56.ipynb", "training_92.ipynb")
BUDGET = """
from tests.support.small import build as BUILD
TRAIN, DATASET, DATA_DIR, SAMPLES, EPOCHS, SEED, LOGS, SHOW_DATA = True, "digits", "", 128, 2, 0, {logs!r}, True
"""
PARAMETERS = {"TRAIN", "DATASET", "DATA_DIR", "SAMPLES", "EPOCHS", "SEED", "LOGS", "SHOW_DATA", "BUILD"}
RECORDED = {"training_56.ipynb": 11, "training_92.ipynb": 7}  # least number of pictures: predictions add one
TRAINED = {"training_56.ipynb": 12, "training_92.ipynb": 7}


def read(name):
    return nbformat.read(ROOT / name, as_version=4)


def find_parameters(notebook):
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell


def execute(notebook):
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()


def count_pictures(notebook):
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return sum("image/png" in out.get("data", {}) for out in outputs)


def collect_text(notebook):
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return "\n".join(out.get("text") or out.get("data", {}).get("text/markdown") or "" for out in outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_trains_with_a_tiny_budget(name, tmp_path):
    notebook = read(name)
    cell = find_parameters(notebook)
    assigned = [node.targets[0].id for node in ast.parse(cell.source).body]
    assert set(assigned) == PARAMETERS
    cell.source = BUDGET.format(logs=str(tmp_path))
    execute(notebook)
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*/result.json")]
    assert sorted(result["learning"] for result in results) == ["arl", "nal"]
    assert count_pictures(notebook) == TRAINED[name]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_shows_what_is_recorded(name, tmp_path, monkeypatch):
    """On a fresh clone, there is no data set, and nothing is trained."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    notebook = read(name)
    assert "TRAIN = False" in find_parameters(notebook).source
    execute(notebook)
    assert count_pictures(notebook) >= RECORDED[name]
    assert not list(tmp_path.glob("keras/datasets/*"))
    for row in (recorded.make_learning_table, recorded.make_depth_table):
        assert " | ".join(row(recorded.find_recorded())[-1]) in collect_text(notebook)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs_are_whole(name):
    notebook = read(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]
    assert count_pictures(notebook) >= RECORDED[name]
    assert not [cell.source for cell in notebook.cells if "/root/" in str(cell) or "/tmp/" in str(cell)]


def make_run(name="run", error=10.0, **recipe):
    defaults = {**recorded.find_recorded()[0].recipe, "model": "attention_56", "learning": "arl", "epochs": 2}
    result = {"test_error_percent": error, "seed": recipe.get("seed", 0), "device": "a CPU", "running_time_s": 1.0}
    return history.Run(Path(name), {**defaults, **recipe}, result, {})


def test_the_comparison_differs_in_one_field_only_and_is_the_best():
    runs = [make_run(error=5.0, epochs=9), make_run(error=20.0), make_run(error=30.0, learning="nal"),
            make_run(error=12.0, epochs=4, learning="nal"), make_run(error=11.0, epochs=4),
            make_run(error=11.5, epochs=4, seed=1), make_run(error=1.0, epochs=4, model="attention_92")]  # fmt: skip
    chosen = recorded.choose_comparison(runs, "learning", model="attention_56")
    assert [run.result["test_error_percent"] for run in chosen] == [11.0, 11.5, 12.0]
    assert recorded.describe(chosen).startswith("4 epochs, ") and recorded.describe(chosen).endswith("seeds 0, 1")
    assert recorded.describe([make_run(weights="cifar10")]).startswith("2 epochs from cifar10, ")
    assert recorded.choose_comparison(runs, "learning", model="attention_92") == []
    with pytest.raises(InputError, match="no recorded runs differ only in learning"):
        recorded.make_learning_table(runs[:1])


def test_the_tables_have_our_and_published_values(monkeypatch):
    monkeypatch.setattr(weights, "FOLDER", Path("missing"))
    monkeypatch.setattr(recorded, "RESULTS", recorded.RESULTS / "arl-nal-quick")
    runs = recorded.find_recorded()
    header, *rows = recorded.make_learning_table(runs)
    assert header[:4] == ["dataset", "model", "ARL %", "NAL %"]
    assert [row[2:4] for row in rows] == [["61.12", "65.73"], ["61.77", "67.69"]]
    assert rows[0][4:6] == ["5.52 (paper), 5.28 (reference)", "5.89 (paper), 9.03 (reference)"]
    assert rows[0][6:] == [
        "6 epochs, 1,500 training images, paper geometry, seed 0",
        "Intel(R) Xeon(R) Processor, 2 cores",
    ]
    header, *rows = recorded.make_depth_table(runs)
    both = "5.52 (paper), 5.28 (reference)"
    assert rows[0][2:8] == ["54.73", "3.27 (reference)", "61.90", "5.28 (reference)", "61.12", both]
    assert rows[0][8:10] == ["2 min", "337 min (reference)"]
    both = "4.99 (paper), 36.20 (reference)"
    assert rows[1][3:10:2] == ["36.10 (reference)", "33.19 (reference)", both, "403 min (reference)"]


def test_the_published_validation_error_of_attention_56_is_its_test_error():
    known = {each.error for each in find_published(make_run().recipe) if each.source == "reference"}
    assert known == {COSTS[0].validation_error}


def test_a_run_in_both_folders_counts_once_and_shares_its_predictions(tmp_path, monkeypatch):
    source = recorded.RESULTS / "cifar10-quick-cpu"
    for name in ("results", "weights"):
        shutil.copytree(source, tmp_path / name / "run")
    monkeypatch.setattr(recorded, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "weights")
    (run,) = recorded.find_recorded()
    packed = history.read_run(tmp_path / "weights" / "run")
    assert recorded.find_predictions(packed) is None
    (run.folder / "predictions.csv").write_text("label,predicted\n0,1\n")
    assert recorded.find_predictions(packed) == tmp_path / "results" / "run" / "predictions.csv"
