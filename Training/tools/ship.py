"""Pack a finished run into `weights/`, where `attention_56(weights="cifar10")` finds it.

python -m Training.tools.ship Logs/<run> --name attention_56-cifar10
"""

import dataclasses
import hashlib
import re
import shutil
import tempfile
from pathlib import Path

from Model import weights
from Model.console import hold_signals
from Model.geometries import DEPTHS, Depth, parse_name
from Training.console import entry_point, run_program, start_keras
from Training.data.datasets import load_for_recipe
from Training.errors import InputError, format_os_error, format_path, shorten
from Training.flags import Parser
from Training.recipe import find_dataset
from Training.runs import history, run_folder, saved

PROGRAM = "python -m Training.tools.ship"
COPIED = ("history.csv", "result.json", "environment.json")
NAME = re.compile(r"[a-z0-9_]+(-[a-z0-9_]+)+")


def parse(arguments):
    parser = Parser(prog=PROGRAM, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--name", help="<network>-<weights>, such as attention_56-cifar10-nal (default: derived from the recipe)"
    )
    parser.add_argument(
        "--average",
        nargs="+",
        default=[],
        metavar="NAME|RUN",
        help="average the weights with those of these networks; all must come from the same training",
    )
    parser.add_argument("--best", action="store_true", help="the run's best.keras instead of its last.keras")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the data set, as in training (default: the run's)")
    parser.add_argument("--replace", action="store_true", help="replace existing weights of this name")
    return parser.parse_args(arguments)


def describe_architecture(recipe, network):
    """Return the arguments of `Model.network` that build the run's network, as plain data."""
    depth = DEPTHS.get(parse_name(recipe.model)[1], Depth())
    own = {name: getattr(recipe, name, 0) or value for name, value in depth._asdict().items()}
    own["r_up"] = own["r_up"] or own["r"]
    return {
        "model": recipe.model,
        **{name: getattr(recipe, name) for name in ("geometry", "learning", "attention", "mask")},
        **own,
        "classes": network.output_shape[1],
        "input_shape": list(network.input_shape[1:]),
    }


def choose_name(recipe, name=None):
    """Return the name of the weights; by default, network, data set and, for naive attention learning, `nal`.

    Raises:
        InputError: the name is invalid or does not begin with the name of the network.
    """
    learning = f"-{recipe.learning}" if recipe.learning != "arl" else ""
    name = name or f"{recipe.model}-{re.sub('[^a-z0-9]+', '_', recipe.dataset.lower())}{learning}"
    if not NAME.fullmatch(name) or not name.startswith(f"{recipe.model}-"):
        raise InputError(
            f"--name must be {recipe.model}-<weights>, in lower-case letters, digits, _ and -, received {name!r}"
        )
    return name


def average(network, own, names, data, recipe):
    """Average a network with others, and return the name and SHA-256 of each file of weights.

    Raises:
        InputError: there is no such network, it is a different one, or it is named twice. `own` is the network's file.
    """
    from Training.engine.averaging import average_weights, recompute_statistics

    paths = [saved.find(name, network=recipe.model) for name in names]
    places = [path.resolve() for path in (own, *paths)]
    twice = next((path for path, place in zip(paths, places[1:]) if places.count(place) > 1), None)
    if twice:
        raise InputError(f"--average needs other networks, each of them once, received {format_path(twice)} twice")
    average_weights(network, {str(path): saved.load(path) for path in paths})
    recompute_statistics(network, data, recipe)
    return [
        {"name": path.parent.name, "file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in paths
    ]


def pack(network, run, recipe, class_names, folder):
    """Write the weights, their description and files of the run to a folder; return the description."""
    try:
        weights.pack_weights(network, folder / weights.FILE)
    except ValueError as error:
        raise InputError(f"{format_path(run.folder)}: {shorten(error)}") from None
    for file in COPIED:
        shutil.copyfile(run.folder / file, folder / file)
    places = {"data_dir": "", "cache": "", "logs": "Logs"}
    run_folder.write(folder, "recipe.json", dataclasses.replace(recipe, **places).to_json())
    about = {
        "name": folder.name,
        "sha256": hashlib.sha256((folder / weights.FILE).read_bytes()).hexdigest(),
        "architecture": describe_architecture(recipe, network),
        "dataset": recipe.dataset,
        "class_names": class_names,
        "epochs": run.result.get("epochs") or len(run.history["epoch"]),
        "seed": recipe.seed,
        "parameters": network.count_params(),
    }
    run_folder.write_json(folder, weights.ABOUT, about)
    return about


def measure_both(network, packed, data, flip):
    """Return the test errors of the run's network and of the packed one, both in float32 arithmetic.

    Raises:
        InputError: the errors differ by more than rounding can explain.
    """
    from Training.tools.evaluate import measure

    errors = {}
    for name, each in (("float32", saved.convert_to_float32(network)), ("float16", packed)):
        found = measure(each, data, flip)
        errors[name] = {what: values["all"].to_dict() for what, values in found.items()}
    both = [errors[name]["plain"]["error_percent"] for name in ("float32", "float16")]
    if abs(both[0] - both[1]) > max(0.5, 100 / len(data.test.labels)):
        raise InputError(f"the packed network has {both[1]} % error, the run's {both[0]} %: nothing was written")
    return errors


def ship(options):
    run = history.read_run(options.run)
    recipe = saved.read_recipe(run.folder / "recipe.json")
    name = choose_name(recipe, options.name)
    target = weights.FOLDER / name
    if target.exists() and not options.replace:
        raise InputError(f"{format_path(target)} exists: give --replace, or another --name")
    path = saved.find(options.run, options.best)
    if path.suffix != ".keras":
        raise InputError(f"{format_path(options.run)} is not a run's folder")
    start_keras()
    from Training.tools.evaluate import refuse_other_data

    network = saved.load(path)
    class_names = saved.read_classes(path, network.output_shape[1])
    if class_names is None:
        raise InputError(f"{format_path(options.run)} has no classes.json")
    data_dir = recipe.data_dir if options.data_dir is None else options.data_dir
    data = load_for_recipe(dataclasses.replace(recipe, data_dir=data_dir, cache="", eval_samples=0))
    refuse_other_data(network, class_names, data, recipe.dataset)
    weights.FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=weights.FOLDER, prefix=".ship-") as place:
        folder = Path(place) / name
        folder.mkdir()
        with data.reading():
            averaged = average(network, path, options.average, data, recipe) if options.average else []
            about = pack(network, run, recipe, class_names, folder)
            if averaged:
                about["averaged_with"] = averaged
            packed = saved.load(folder / weights.FILE)
            about["test_errors"] = measure_both(network, packed, data, find_dataset(recipe.dataset).mirrored)
        run_folder.write_json(folder, weights.ABOUT, about)
        with hold_signals():  # a signal between the two would lose both versions
            if target.exists():
                target.rename(Path(place) / "replaced")
            folder.rename(target)
    report(target, about)


def report(folder, about):
    """Print size, SHA-256 and test errors of packed weights."""
    size = (folder / weights.FILE).stat().st_size
    print(f"{folder}: {about['parameters']:,} parameters, {size / 1e6:.1f} MB, SHA-256 {about['sha256']}")
    for name, errors in about["test_errors"].items():
        texts = [f"{error['error_percent']:.2f} % ({what})" for what, error in errors.items()]
        print(f"  test error with {name} weights: {', '.join(texts)}")


@entry_point(PROGRAM)
def main(arguments=None):
    options = parse(arguments)
    try:
        ship(options)
    except OSError as error:
        raise InputError(format_os_error(error, weights.FOLDER)) from None


if __name__ == "__main__":
    run_program(main)
