"""Records what a run is computed with: versions, backend, device and commit."""

import json
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

from Training.devices import device_name
from Training.errors import InputError, escape
from Training.files import read_text, replace_file

PACKAGES = ("keras", "tensorflow", "jax", "tensorboard", "numpy", "scikit-learn", "matplotlib", "pillow")
NAME = re.compile(r"environment(?:-(\d{1,6}))?\.json")


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit():
    """Return the commit of this code, followed by + if files differ from it, or None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        status = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "") or None


def describe_environment():
    """Return versions, backend, device, system and git commit as plain data."""
    import keras

    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "backend": keras.backend.backend(),
        "device": device_name(),
        "git_commit": _git_commit(),
    }


def list_environments(folder):
    """Return the paths of a run's environment files, the oldest first."""
    found = [(NAME.fullmatch(path.name), path) for path in Path(folder).glob("environment*.json")]
    return [path for _, path in sorted((int(match[1] or 1), path) for match, path in found if match)]


def record_environment(folder, environment):
    """Write what this part of a run is computed with, unless it is the same as before.

    The first part of a run writes `environment.json`. If the run is resumed with other versions or on another machine,
    it writes `environment-2.json`, and so on. No file is overwritten.

    Returns:
        A list of texts: the differences from the part before that can change the results.
    """
    paths = list_environments(folder)
    before = _read(paths[-1]) if paths else None
    if before == environment:
        return []
    number = int(NAME.fullmatch(paths[-1].name)[1] or 1) + 1 if paths else 1
    name = f"environment-{number}.json" if paths else "environment.json"
    replace_file(Path(folder) / name, (json.dumps(environment, indent=2) + "\n").encode())
    return find_differences(before, environment) if before else []


def find_differences(before, after):
    """Return the differences between two environments that can change results, each as a text."""
    found = []
    for name, old, new in (
        *((name, before.get(name), after[name]) for name in ("python", "backend", "device")),
        *((name, _packages(before).get(name), version) for name, version in _packages(after).items()),
    ):
        if old != new:
            found.append(escape(f"{name} {new or 'none'} (before: {str(old or 'none'):.80})"))
    return found


def _packages(environment):
    packages = environment.get("packages")
    return packages if isinstance(packages, dict) else {}


def _read(path):
    """Return the environment in a file, or an empty one if the file cannot be used."""
    try:
        value = json.loads(read_text(path))
    except (InputError, OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
