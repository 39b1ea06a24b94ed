"""Print the layers and the cost of a network: `python -m Model attention_92 --geometry paper`.

Needs `Model` and `Module` only.
"""

import argparse
import json
import os

from Model.geometries import ATTENTION, GEOMETRIES, LEARNING, MASKS, NETWORKS, parse_name

BACKENDS = ("tensorflow", "jax")


class Parser(argparse.ArgumentParser):
    """argparse that reports every error in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(arguments):
    parser = Parser(prog="python -m Model", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join(NETWORKS)}, or another depth 36 m + 20")
    parser.add_argument("--geometry", choices=tuple(GEOMETRIES), default="compact", help="(default: compact)")
    parser.add_argument("--learning", choices=LEARNING, default="arl", help="(default: arl)")
    parser.add_argument("--attention", choices=ATTENTION, default="mixed", help="(default: mixed)")
    parser.add_argument("--mask", choices=MASKS, default="encoder_decoder", help="(default: encoder_decoder)")
    parser.add_argument("--classes", type=int, help="(default: 10, with imagenet 1000)")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="height and width (default: 32, with imagenet 224)")
    parser.add_argument("--json", action="store_true", help="the counts alone, as one line of JSON a network")
    parser.add_argument("--markdown", action="store_true", help="the counts alone, as one row of a table a network")
    words = parser.parse_args(arguments)
    for name in ("classes", "size"):
        value = getattr(words, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be 1 or more, received {value}")
    try:
        for name in words.names:
            parse_name(name)
    except ValueError as error:
        parser.error(str(error))
    return parser, words


def build(name, words):
    from Model import network

    size = words.size and (words.size, words.size, 3)
    return network(
        name,
        geometry=words.geometry,
        learning=words.learning,
        attention=words.attention,
        mask=words.mask,
        classes=words.classes,
        input_shape=size or None,
    )


def rows(model, counts):
    """The network as the paper's tables have it: a row a layer, with its output size."""
    lines = [f"{'layer':<24} {'kind':<20} {'output':<14} parameters"]
    for layer in model.layers[1:]:
        output = "x".join(map(str, layer.output.shape[1:]))
        lines.append(f"{layer.name:<24} {type(layer).__name__:<20} {output:<14} {layer.count_params():,}")
    return "\n".join([*lines, "", *(f"{key:<14} {value:>15,}" for key, value in counts.items())])


def main(arguments=None):
    parser, words = parse(arguments)
    backend = os.environ.setdefault("KERAS_BACKEND", BACKENDS[0])
    if backend not in BACKENDS:
        parser.error(f"KERAS_BACKEND must be one of {', '.join(BACKENDS)}, received {backend!r:.80}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        from Model.count import count
    except ImportError as error:
        parser.error(f"{error}: install requirements.txt, or requirements-jax.txt for KERAS_BACKEND=jax")

    for name in words.names:
        try:
            model = build(name, words)
        except ValueError as error:
            parser.error(str(error))
        counts = count(model)
        if words.json:
            print(json.dumps(counts))
        elif words.markdown:
            print(f"| {name} | {words.geometry} | {' | '.join(f'{value:,}' for value in counts.values())} |")
        else:
            print(rows(model, counts))


if __name__ == "__main__":
    main()
