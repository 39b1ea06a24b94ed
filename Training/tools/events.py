"""Write the TensorBoard event files of a finished run again: `python -m Training.tools.events RUN`.

This is for runs whose event files are lost or were written by an earlier version. Curves come from the run's
`history.csv`, the rest from its result, its network and its data. The pictures of earlier epochs cannot be restored:
the masks are those of the saved network. The run's small files are copied to the new folder, but not the network.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import shutil
from pathlib import Path

from Training.console import entry_point, report_errors, run_program, start_keras
from Training.data.datasets import load_for_recipe, load_photographs
from Training.errors import InputError, format_os_error, format_path
from Training.flags import Parser
from Training.recipe import label_run
from Training.runs import history, run_folder, saved

PROGRAM = "python -m Training.tools.events"
COPIED = ("history.csv", "result.json", "environment.json", "classes.json", "split.json", "predictions.csv")


def parse(arguments):
    parser = Parser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--model", metavar="NAME|FILE", help="the trained network (default: the run's last.keras)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the data set, as in training (default: the run's)")
    parser.add_argument("--output", metavar="FOLDER", help="a new folder (default: Logs/<time>-<label of the run>)")
    parser.add_argument("--projector", action="store_true", help="features on the PROJECTOR page, as in training")
    parser.add_argument("--mistakes", type=int, metavar="N", help="most confidently wrong images, as in training")
    parser.add_argument(
        "--photographs", action="store_true", help="masks of the photographs of scikit-learn, not of test images"
    )
    options = parser.parse_args(arguments)
    if options.mistakes is not None and options.mistakes < 0:
        parser.error(f"--mistakes must be 0 or more, received {options.mistakes}")
    return options


class Clock:
    """Times of events in seconds since 1970, from the start of a run and the durations of its epochs."""

    def __init__(self, run):
        name = run.folder.resolve().name
        try:
            self.now = datetime.datetime.strptime(name[: len("YYYYmmdd-HHMMSS")], "%Y%m%d-%H%M%S").timestamp()
        except (ValueError, OverflowError, OSError):  # not a time, or a time that the system cannot represent
            written = (run.folder / "history.csv").stat().st_mtime
            self.now = max(written - sum(run.history["seconds"]), 0.0)

    def __call__(self):
        return self.now


def write_epochs(folder, run, recipe, network, images, clock):
    """Write graph, recipe and curves, and the masks of the network over the first images at the last epoch."""
    from Training.engine import event_callbacks
    from Training.runs import event_file
    from Training.visual import inspection

    files = event_file.EventFiles(folder, clock)
    files["train"].graph(network)
    files["train"].layout()
    for tag, text in event_callbacks.describe_recipe(recipe).items():
        files["train"].text(tag, text)
    names = list(run.history)
    for values in zip(*run.history.values()):
        logs = dict(zip(names, values))
        clock.now += logs["seconds"]
        event_callbacks.add_epoch(files, logs, int(logs.pop("epoch")))
    if inspection.find_blocks(network):
        masks = inspection.make_mask_model(network).predict(images[: event_callbacks.MASKED], verbose=0)
        event_callbacks.add_masks(files["train"], images, masks, len(run.history["epoch"]) - 1)
    for file in files.values():
        file.close()


def write(options, run, folder):
    """Write all files to an existing folder.

    Raises:
        InputError: the network or the data cannot be read, or do not match.
    """
    recipe = saved.read_recipe(run.folder / "recipe.json")
    place = recipe.data_dir if options.data_dir is None else options.data_dir
    recipe = dataclasses.replace(recipe, data_dir="", cache="", logs="Logs")  # instead of paths of this machine
    path = saved.find(options.model or run.folder)
    start_keras()
    from Training.engine import evaluation, final_events
    from Training.engine.training_model import make_logits_model
    from Training.tools.evaluate import refuse_other_data

    network = saved.load(path)
    data = load_for_recipe(dataclasses.replace(recipe, data_dir=place))
    refuse_other_data(network, None, data, recipe.dataset)
    mistakes = recipe.mistakes if options.mistakes is None else options.mistakes
    shown = dataclasses.replace(recipe, projector=recipe.projector or options.projector, mistakes=mistakes)
    with data.reading():
        clock = Clock(run)
        images = load_photographs(*network.input_shape[1:3]) if options.photographs else data.test.images
        write_epochs(folder, run, recipe, network, images, clock)
        _, _, logits = evaluation.score(make_logits_model(network), data.test)
        final_events.write_final_events(folder, network, data, shown, run.result, logits, clock)
    for name in COPIED:
        if (run.folder / name).is_file():
            shutil.copyfile(run.folder / name, folder / name)
    run_folder.write(folder, "recipe.json", recipe.to_json())


def choose_folder(options, run):
    """Return the folder to write.

    Raises:
        InputError: it already exists.
    """
    recipe = saved.read_recipe(run.folder / "recipe.json")
    time = datetime.datetime.fromtimestamp(Clock(run).now).strftime("%Y%m%d-%H%M%S")
    folder = Path(options.output) if options.output else Path("Logs") / f"{time}-{label_run(recipe)}"
    if folder.exists():
        raise InputError(f"{format_path(folder)} already exists: choose another folder with --output")
    return folder


@entry_point(PROGRAM)
def main(arguments=None):
    options = parse(arguments)
    with report_errors(PROGRAM, "Stopped."):
        if not importlib.util.find_spec("tensorboard"):
            raise InputError("tensorboard is not installed: pip install tensorboard")
        run = history.read_run(options.run)
        if min(run.history.get("seconds", [-1])) < 0:
            raise InputError(f"{format_path(run.folder)}: its history.csv has no valid seconds of each epoch")
        folder = choose_folder(options, run)
        try:
            folder.mkdir(parents=True)
            write(options, run, folder)
        except BaseException as error:  # an unfinished folder would look like a run
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise InputError(format_os_error(error, folder)) from None
            raise
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{format_path(folder)}: {size / 1000:,.0f} kB")


if __name__ == "__main__":
    run_program(main)
