"""Train for many epochs and watch memory and time: python -m benchmarks.growth --epochs 100 [--name NAME]

The run is one of `training_cifar10.py` on the digits with a network of a few thousand weights, including checkpoints,
event files and pictures. Prints the medians of resident memory and seconds per step in each quarter of the epochs, and
with `--name` writes them to `benchmarks/results/<name>/growth.json`. The exit code is 1 if the last quarter takes 2 %
more memory than the second; in the first, buffers are still filling. Linux only.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import training_cifar10
from tests.support import tiny
from Training.console import entry_point, run_program, start_keras
from Training.recipe import Recipe

RESULTS = Path(__file__).resolve().parent / "results"
LARGEST_GROWTH = 1.02
STEPS = 20  # steps of 16 images per epoch


def measure_memory():
    """Return the resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def watch(found):
    """Make every run append `(MB, seconds of the median step)` to `found` at the end of each epoch."""
    keras = start_keras()
    from Training.engine import event_callbacks

    class Watch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.ends = []

        def on_train_batch_end(self, batch, logs=None):
            self.ends.append(time.perf_counter())

        def on_epoch_end(self, epoch, logs=None):
            steps = [b - a for a, b in zip(self.ends, self.ends[1:])]
            found.append((measure_memory(), statistics.median(steps)))

    own = event_callbacks.make_event_callbacks
    event_callbacks.make_event_callbacks = lambda *arguments: [*own(*arguments), Watch()]


def summarize_quarters(found):
    """Return the medians of memory and time per step in each quarter of the epochs."""
    size = len(found) // 4
    parts = [found[i * size : (i + 1) * size] for i in range(4)]
    return [
        {"memory_mb": statistics.median(m for m, _ in part), "step_s": statistics.median(s for _, s in part)}
        for part in parts
    ]


@entry_point("python -m benchmarks.growth")
def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100, help="at least 8 (default: %(default)s)")
    parser.add_argument("--name", help="folder in benchmarks/results")
    options = parser.parse_args(arguments)
    if options.epochs < 8:
        parser.error(f"--epochs must be 8 or more, received {options.epochs}")
    found = []
    with tempfile.TemporaryDirectory() as logs:
        watch(found)
        training_cifar10.train(
            Recipe(dataset="digits", samples=16 * STEPS, batch_size=16, epochs=options.epochs, masks_every=1,
                   checkpoint_steps=7, logs=logs),
            build=tiny.tiny_build,
        )  # fmt: skip
    result = summarize_quarters(found)
    for number, quarter in enumerate(result, start=1):
        print(f"quarter {number}: {quarter['memory_mb']:.1f} MB, {1000 * quarter['step_s']:.2f} ms per step")
    if options.name:
        folder = RESULTS / options.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "growth.json").write_text(json.dumps({"quarters": result, "epochs": found}) + "\n")
    return int(result[3]["memory_mb"] > LARGEST_GROWTH * result[1]["memory_mb"])


if __name__ == "__main__":
    run_program(main)
