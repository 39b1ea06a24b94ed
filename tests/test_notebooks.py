"""Both notebooks run from their first cell to their last, on the digits and the smallest network."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ("training_56.ipynb", "training_92.ipynb")
BUDGET = """
import functools, training_cifar10; from tests.support import small
training_cifar10.build = small.build
training_cifar10.train = functools.partial(training_cifar10.train, build=small.build)
DATASET, DATA_DIR, SAMPLES, EPOCHS, SEED, LOGS, SHOW_DATA = "digits", "", 128, 2, 0, {logs!r}, True
"""


def read(name):
    return nbformat.read(ROOT / name, as_version=4)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_with_a_tiny_budget(name, tmp_path):
    notebook = read(name)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    given = {line.split(" = ")[0] for line in parameters.source.splitlines()}
    assert given == {"DATASET", "DATA_DIR", "SAMPLES", "EPOCHS", "SEED", "LOGS", "SHOW_DATA"}
    parameters.source = BUDGET.format(logs=str(tmp_path))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert len(list(tmp_path.glob("*/result.json"))) == 2
    pictures = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(pictures) >= 6


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs_are_whole_and_say_their_budget(name):
    notebook = read(name)
    assert "Budget of the outputs below" in notebook.cells[0].source
    (parameters,) = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    samples, epochs = (int(re.search(rf"{key} = (\d+)", parameters)[1]) for key in ("SAMPLES", "EPOCHS"))
    assert f"{samples:,} of its" in notebook.cells[0].source and f"{epochs} epochs" in notebook.cells[0].source
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]
