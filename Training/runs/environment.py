"""What a run stands on: versions, backend, device and commit."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

from Training.devices import device_name

PACKAGES = ("keras", "tensorflow", "jax", "tensorboard", "numpy", "scikit-learn", "matplotlib", "pillow")


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit():
    """The commit of this code, with a + where files differ from it, or None outside a checkout."""
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
    """Versions, backend, device, processor and git commit, as plain data."""
    import keras

    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "backend": keras.backend.backend(),
        "device": device_name(),
        "git_commit": _git_commit(),
    }
