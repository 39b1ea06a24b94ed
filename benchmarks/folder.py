"""Train one epoch from a folder of generated JPEG files: python -m benchmarks.folder [--count N] [--size N] [--shards]

Writes 20,000 files of 300x200 to a temporary folder, 1 % of them broken in four ways. Prints the seconds to the first
batch, images decoded and augmented per second (the network is one dense layer), the peak memory, and whether every
broken file was named. The exit code is 1 if one was not. KERAS_BACKEND selects the backend.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from Training.console import entry_point, run_program

ROOT = Path(__file__).resolve().parent.parent

CLASSES = 10
BROKEN_EVERY = 100  # one of so many files is broken


def damage(raw, kind):
    """Return damaged bytes of a JPEG file: empty, truncated, a text, or with overwritten tables and intact ends."""
    return (b"", raw[: len(raw) // 2], b"no picture\n", raw[:20] + bytes(300) + raw[320:])[kind]


def generate(folder, count):
    """Write `count` JPEG files in ten classes, a tenth of them for validation; return the paths of broken files."""
    from PIL import Image

    rng, broken = np.random.default_rng(0), []
    for i in range(count):
        part = "val" if i % 10 == 0 else "train"
        path = folder / part / f"class {i // 10 % CLASSES}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (13, 19, 3), dtype=np.uint8))
        coarse.resize((300, 200), Image.Resampling.BICUBIC).save(path, quality=90)
        if i % BROKEN_EVERY == 1:
            path.write_bytes(damage(path.read_bytes(), i // BROKEN_EVERY % 4))
            broken.append(str(path))
    return broken


def make_network(data):
    """Make a network of one dense layer, so that nearly all time is spent on decoding and augmentation."""
    import keras
    from keras import layers

    from Model.preprocessing import mean_subtraction

    inputs = keras.Input(data.train.images.shape[1:], name="images")
    x = mean_subtraction(*data.mean_and_std("channel"))(inputs)
    x = layers.Dense(len(data.classes), name="logits")(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Softmax()(x), name="dense")


def measure_decoding(batches, count=30):
    """Return the images decoded and cropped per second, and milliseconds of processor time for each."""
    count = min(count, len(batches))
    begun, busy = time.perf_counter(), time.process_time()
    images = sum(len(batches[i][1]) for i in range(count))
    return images / (time.perf_counter() - begun), 1000 * (time.process_time() - busy) / images


def measure(dataset, data_dir, size):
    """Train one epoch in this process, and print its figures as JSON."""
    from Training.console import start_keras
    from Training.data import datasets as sets
    from Training.recipe import RECIPES, Recipe

    keras = start_keras()
    from Training.data.batches import Batches
    from Training.engine.evaluation import evaluate
    from Training.engine.fit import fit

    recipe = Recipe(**{**RECIPES["imagenet"], "dataset": dataset, "data_dir": data_dir, "epochs": 1, "batch_size": 64})
    begun = time.perf_counter()
    data = sets.load(dataset, data_dir, size=size, random_crops=True)
    read = time.perf_counter()
    data.mean_and_std("channel")
    averaged = time.perf_counter()
    batches = Batches(data.train, recipe.batch_size, recipe.seed, random_crops=True)
    batches[0]
    first = time.perf_counter()
    rate, cpu = measure_decoding(batches)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        dense = make_network(data)
        fit(dense, data, recipe, Path(folder))
        trained = time.perf_counter()
        evaluate(dense, data)
        from Training.runs.history import read_history

        trained_rate = read_history(Path(folder) / "history.csv")["images_per_second"][-1]
    evaluated = len(data.train.labels) + 2 * len(data.test.labels)
    figures = {
        "backend": keras.backend.backend(),
        "seconds_to_list": read - begun,
        "seconds_to_average": averaged - read,
        "seconds_to_first_batch": first - begun,
        "decoded_images_per_s": rate,
        "decoding_cpu_ms_per_image": cpu,
        "trained_images_per_s": trained_rate,
        "evaluated_images_per_s": evaluated / (time.perf_counter() - trained),
        "load_average": os.getloadavg()[0],
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "found_while_decoding": data.broken,
    }
    print(json.dumps({name: round(v, 2) if isinstance(v, float) else v for name, v in figures.items()}, indent=2))


@entry_point("python -m benchmarks.folder")
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--shards", action="store_true", help="write the folder as shards first, and train from them")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(*options.measure, options.size)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "pictures"
        broken = generate(folder, options.count)
        source, said = ["folder", str(folder)], ""
        if options.shards:
            command = [sys.executable, "-m", "Training.tools.shards", str(folder), f"{made}/shards"]
            said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stderr
            source = ["shards", f"{made}/shards"]
        command = [sys.executable, "-m", "benchmarks.folder", "--size", str(options.size), "--measure", *source]
        run = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        )
        print(run.stdout, end="")
        if run.returncode:
            sys.exit(run.stderr)
        lines = {line for line in (said + run.stderr).splitlines() if line.startswith("skipped: ")}
        # Pictures in shards are named by shard and position.
        named = len(lines) if options.shards else sum(any(path in line for line in lines) for path in broken)
        print(f"{named} of {len(broken)} broken files were named")
        return int(named < len(broken))


if __name__ == "__main__":
    run_program(main)
