"""Measure images/s of training on one device for batch sizes and precisions: python -m benchmarks.throughput

Each row is a separate training on random images on the device, through Keras' `fit` as in a run; it waits for the
device only before the first and after the last step. Also measured are, for the largest batch, the share of
augmentation in a step, and the share of the device's peak (`--peak`, TFLOP/s) that the network reaches, with 6
operations per multiply-add. `throughput.json` and `throughput.md` in `benchmarks/results/<name>` are updated after each
row.
"""

import argparse
import gc
import json
import time
from pathlib import Path

import numpy as np

from Model.geometries import GEOMETRIES
from Training.console import entry_point, report_errors, run_program, start_keras
from Training.recipe import RECIPES, Recipe
from Training.tools.report import format_console, format_markdown

RESULTS = Path(__file__).resolve().parent / "results"
PRECISIONS = Recipe.__dataclass_fields__["precision"].metadata["choices"]
FLOP = 6  # operations of a step for each multiply-add and image


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="attention_56", help="(default: %(default)s)")
    parser.add_argument("--geometry", default="compact", choices=tuple(GEOMETRIES), help="(default: %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256, 1024], help="(default: 64 256 1024)")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["mixed_bfloat16", "float32"])
    parser.add_argument("--steps", type=int, default=100, help="timed steps, after as many untimed ones (default: 100)")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, to print the share that is reached")
    parser.add_argument("--name", default="throughput", help="folder in benchmarks/results (default: throughput)")
    return parser.parse_args(arguments)


def make_recipe(batch_size, precision, augmentation, steps):
    """Return the recipe `race` with these values and all steps in one call; "none" also excludes cutout and flips."""
    changes = {**RECIPES["race"], "batch_size": batch_size, "precision": precision, "augmentation": augmentation}
    changes["steps_per_execution"] = steps
    return Recipe(**changes | ({"cutout": 0, "alternate_flip": False} if augmentation == "none" else {}))


def measure_rate(options, batch_size, precision, augmentation):
    """Return the images/s of a training, and the multiply-adds of the network."""
    import keras

    from Model import network
    from Model.count import count
    from Model.preprocessing import mean_subtraction
    from Training.engine.fit import compile_model

    keras.utils.clear_session()
    keras.config.set_dtype_policy(precision)
    shape = (GEOMETRIES[options.geometry].pixels,) * 2 + (3,)
    images = np.random.default_rng(0).integers(0, 256, (max(4096, batch_size), *shape), dtype="uint8")
    mean = mean_subtraction(np.full(shape, 120.0, "float32"))
    made = network(options.network, geometry=options.geometry, preprocessing=mean)
    recipe = make_recipe(batch_size, precision, augmentation, options.steps)
    model = compile_model(made, recipe, options.steps, stored=images)
    rng = np.random.default_rng(1)

    class Indices(keras.utils.PyDataset):
        def __len__(self):
            return options.steps

        def __getitem__(self, index):
            labels = rng.integers(0, made.output_shape[-1], batch_size, dtype="int32")
            return rng.integers(0, len(images), batch_size, dtype="int32"), labels

    ends = []
    wait = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: ends.append(time.perf_counter()))
    model.fit(Indices(), epochs=3, shuffle=False, verbose=0, callbacks=[wait])
    return options.steps * batch_size / (ends[2] - ends[1]), count(made)["multiply_adds"]


def measure_rows(options):
    """Yield figures for each batch size and precision; each takes one compilation, the largest batch size two."""
    for precision in options.precisions:
        for batch_size in options.batch_sizes:
            rate, multiply_adds = measure_rate(options, batch_size, precision, "crop")
            share = None
            if batch_size == max(options.batch_sizes):
                share = round(1 - rate / measure_rate(options, batch_size, precision, "none")[0], 4)
            gc.collect()
            tflops = rate * multiply_adds * FLOP / 1e12
            yield {
                "precision": precision,
                "batch_size": batch_size,
                "images_per_s": round(rate, 1),
                "share_of_augmentation": share,
                "tflop_per_s": round(tflops, 3),
                "share_of_peak": round(tflops / options.peak, 4) if options.peak else None,
            }


def write_results(options, machine, rows):
    """Write the rows so far, and return them as a table."""
    folder = RESULTS / options.name
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "network": options.network,
        "geometry": options.geometry,
        "steps": options.steps,
        "peak_tflops": options.peak,
    }
    (folder / "throughput.json").write_text(json.dumps({**told, "environment": machine, "rows": rows}, indent=2) + "\n")
    table = [list(rows[0]), *(["-" if value is None else str(value) for value in row.values()] for row in rows)]
    on = f"{options.network}, {options.geometry}; {machine['device']}, {machine['backend']}\n\n"
    (folder / "throughput.md").write_text(on + format_markdown(table))
    return on + format_console(table)


@entry_point("python -m benchmarks.throughput")
def main(arguments=None):
    options = parse(arguments)
    with report_errors("benchmarks/throughput.py", "Stopped."):
        start_keras()
        from Training.runs.environment import describe_environment

        machine, rows = describe_environment(), []
        for row in measure_rows(options):
            rows.append(row)
            print(row, flush=True)
            table = write_results(options, machine, rows)
    print(table, end="")


if __name__ == "__main__":
    run_program(main)
