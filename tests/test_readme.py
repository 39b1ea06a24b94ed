"""Checks the documentation: links, commands, requirements, the plain Keras example."""

import dataclasses
import re
import tomllib
from pathlib import Path

import keras
import numpy as np
import pytest

from Training.recipe import OPTIMIZERS, Recipe
from Training.visual.published import COSTS, PUBLISHED, SOURCES

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"])


def read_requirements(name):
    """Return the packages in a requirements file, without those of included files."""
    lines = (ROOT / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r "))]


def can_be_run(module):
    """Return whether `python -m module` runs a file of the project."""
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1300


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path):
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text())
    missing = {target for target in targets if not (path.parent / target).exists()}
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_that_are_run_exist(path):
    if path.name == "CHANGELOG.md":
        pytest.skip("names commands of the past")
    modules = set(re.findall(r"python -m ((?:Training|benchmarks|Model)[\w.]*\w)", path.read_text()))
    missing = {name for name in modules if not can_be_run(name)}
    assert not missing


def format_flag(item):
    """Return the row of a field of the recipe in docs/recipes.md."""
    text, choices = item.metadata["help"], item.metadata["choices"]
    text = text() if callable(text) else text
    if choices:
        text += f"; one of {', '.join(f'`{each}`' for each in choices)}"
    default = str(item.default).lower() if item.type is bool else str(item.default)
    return f"| `--{item.name.replace('_', '-')}` | {default and f'`{default}`'} | {text} |"


def test_every_flag_and_optimizer_is_documented():
    lines = set((ROOT / "docs" / "recipes.md").read_text().splitlines())
    rows = [format_flag(item) for item in dataclasses.fields(Recipe)]
    rows += [f"| `{name}` | {row.rate:g} | {'l2' if row.l2 else 'decoupled'} |" for name, row in OPTIMIZERS.items()]
    assert not [row for row in rows if row not in lines]


def test_requirements_files_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert read_requirements("requirements.txt") == project["dependencies"]
    for extra in ("gpu", "jax", "jax-gpu", "export", "tfds", "page"):
        assert read_requirements(f"requirements-{extra}.txt") == project["optional-dependencies"][extra]
    dev = read_requirements("requirements-jax.txt") + read_requirements("requirements-dev.txt")
    assert dev == project["optional-dependencies"]["dev"]


def test_lock_has_a_version_within_each_range():
    from packaging.requirements import Requirement

    pins = dict(line.split("==") for line in read_requirements("requirements.lock"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[wanted.name]), text


def test_plain_keras_example_of_the_readme_trains(monkeypatch, capsys):
    random = np.random.default_rng(0)

    def make_part(count):
        return random.integers(0, 256, (count, 32, 32, 3), "uint8"), random.integers(0, 10, (count, 1))

    monkeypatch.setattr(keras.datasets.cifar10, "load_data", lambda: (make_part(8), make_part(4)))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    code = next(block for block in blocks if ".fit(" in block)
    # Narrow layers, run eagerly: tracing and compiling would take longer than two steps.
    lighter = {
        "epochs=8": "epochs=1",
        "56(": "56(geometry='paper', ",
        '["accuracy"])': '["accuracy"], run_eagerly=True)',
    }
    for text, replacement in lighter.items():
        assert text in code
        code = code.replace(text, replacement)
    exec(code, {})
    loss, accuracy = map(float, capsys.readouterr().out.strip().splitlines()[-1].strip("[]").split(","))
    assert np.isfinite(loss) and 0 <= accuracy <= 1


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_pictures_are_described(path):
    assert all(re.findall(r"!\[([^\]]*)\]", path.read_text()))


def test_every_published_figure_has_a_source_that_can_be_looked_up():
    assert {each.source for each in (*PUBLISHED, *COSTS)} == set(SOURCES)
    assert not [text for text in SOURCES.values() if not re.search(r"https://|arXiv \d{4}\.\d{5}", text)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_results_that_are_cited_are_in_the_repository(path):
    cited = re.findall(r"`(benchmarks/results/[\w./-]+)`", path.read_text())
    assert not [each for each in cited if not (ROOT / each).exists()]
