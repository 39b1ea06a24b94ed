"""Print the layers and the cost of a network: `python -m Model attention_92 --geometry paper`.

This command needs only `Model` and `Module`.
"""

import argparse
import json
import os

from Model.console import catch_signals, guard_streams, hold_signals, import_keras, run_program, warn
from Model.geometries import ATTENTION, GEOMETRIES, LEARNING, MASKS, NETWORKS, parse_name

PROGRAM = "python -m Model"
BACKENDS = ("tensorflow", "jax")
LARGEST = {"classes": 1_000_000, "size": 10_000}  # larger maps need gigabytes of interpolation matrices


class Parser(argparse.ArgumentParser):
    """argparse that reports every error in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(arguments):
    parser = Parser(prog=PROGRAM, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join(NETWORKS)}, or another depth 36 m + 20")
    parser.add_argument("--geometry", choices=tuple(GEOMETRIES), default="compact", help="(default: compact)")
    parser.add_argument("--learning", choices=LEARNING, default="arl", help="(default: arl)")
    parser.add_argument("--attention", choices=ATTENTION, default="mixed", help="(default: mixed)")
    parser.add_argument("--mask", choices=MASKS, default="encoder_decoder", help="(default: encoder_decoder)")
    parser.add_argument("--classes", type=int, help="(default: 10, with imagenet 1000)")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="height and width (default: 32, with imagenet 224)")
    parser.add_argument("--json", action="store_true", help="only the counts, as one line of JSON per network")
    parser.add_argument(
        "--markdown", action="store_true", help="only the counts, as one row of a Markdown table per network"
    )
    options = parser.parse_args(arguments)
    for name, largest in LARGEST.items():
        value = getattr(options, name)
        if value is not None and not 1 <= value <= largest:
            parser.error(f"--{name} must be from 1 to {largest:,}, received {value}")
    try:
        for name in options.names:
            parse_name(name)
    except ValueError as error:
        parser.error(str(error))
    return parser, options


def build(name, options):
    import keras

    from Model import network

    size = options.size and (options.size, options.size, 3)
    with keras.StatelessScope(initialize_variables=False):  # building is fast without values; the counts need none
        return network(
            name,
            geometry=options.geometry,
            learning=options.learning,
            attention=options.attention,
            mask=options.mask,
            classes=options.classes,
            input_shape=size or None,
        )


def format_table(model, counts):
    """Return the network as a table like the paper's: one row per layer, with its output size, then the counts."""
    lines = [f"{'layer':<24} {'kind':<20} {'output':<14} parameters"]
    for layer in model.layers[1:]:
        output = "x".join(map(str, layer.output.shape[1:]))
        lines.append(f"{layer.name:<24} {type(layer).__name__:<20} {output:<14} {layer.count_params():,}")
    return "\n".join([*lines, "", *(f"{key:<14} {value:>15,}" for key, value in counts.items())])


def main(arguments=None):
    """Print what the arguments ask for; a signal, or an output that cannot be written, ends the process in one line."""
    with guard_streams(PROGRAM, output_needed=True), catch_signals():
        try:
            print_networks(arguments)
        except KeyboardInterrupt as signal:
            warn("Stopped.")
            raise SystemExit(getattr(signal, "exit_code", 130)) from None


def print_networks(arguments):
    parser, options = parse(arguments)
    backend = os.environ["KERAS_BACKEND"] = os.environ.get("KERAS_BACKEND") or BACKENDS[0]
    if backend not in BACKENDS:
        parser.error(f"KERAS_BACKEND must be one of {', '.join(BACKENDS)}, received {backend!r:.80}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        with hold_signals():
            keras = import_keras()
            from Model.count import count
    except ImportError as error:
        parser.error(f"{error}: install requirements.txt, or requirements-jax.txt for KERAS_BACKEND=jax")
    except ValueError as error:
        parser.error(str(error))

    keras.config.set_floatx("float32")  # the user's keras.json may say otherwise
    for name in options.names:
        try:
            model = build(name, options)
        except ValueError as error:
            parser.error(str(error))
        counts = count(model)
        if options.json:
            print(json.dumps(counts))
        elif options.markdown:
            print(f"| {name} | {options.geometry} | {' | '.join(f'{value:,}' for value in counts.values())} |")
        else:
            print(format_table(model, counts))


if __name__ == "__main__":
    run_program(main)
