"""Files that are whole at every moment."""

import os
from pathlib import Path


def replace_file(path, raw):
    """Write bytes beside the file, sync them, and put them in its place: it is whole at every moment."""
    beside = Path(f"{path}.new")
    try:
        with open(beside, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the name, too, must be on the disk
        folder = os.open(Path(path).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
