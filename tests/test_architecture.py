"""Imports point one way: from tools and entry points down to the layers."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A package may import itself and those before it.
ORDER = ("Module", "Model", "Training", "Training.data", "Training.visual", "Training.runs", "Training.engine",
         "Training.tools")  # fmt: skip
FILES = [path for top in ("Module", "Model", "Training") for path in sorted((ROOT / top).rglob("*.py"))]


def find_package(module):
    """Return the longest entry of `ORDER` to which a module belongs, or None for other modules."""
    fitting = [name for name in ORDER if f"{module}.".startswith(f"{name}.")]
    return max(fitting, key=len, default=None)


def find_imports(path):
    """Return the project's packages that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {package for package in map(find_package, found) if package}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path):
    own = ORDER.index(find_package(".".join(path.relative_to(ROOT).with_suffix("").parts)))
    upward = [name for name in find_imports(path) if ORDER.index(name) > own]
    assert not upward, f"{path.relative_to(ROOT)} imports {', '.join(upward)}"


def test_training_itself_is_small():
    files = sorted(path.name for path in (ROOT / "Training").glob("*.py"))
    assert len(files) <= 6, files


def test_no_path_is_changed():
    """Tests and benchmarks are packages, so they need no change of `sys.path`."""
    changed = [path for top in ("tests", "benchmarks") for path in (ROOT / top).rglob("*.py")
               if "sys.path" in path.read_text() and path.name not in (Path(__file__).name, "subjects.py")]  # fmt: skip
    assert not changed, changed
