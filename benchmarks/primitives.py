"""Sum the oneDNN primitives of a training step on a CPU: python -m benchmarks.primitives [--before DIR]

Prints a Markdown table: for each kind of primitive, the number in a step, the milliseconds and, where the work is
known, GFLOP/s, from oneDNN's own log (`ONEDNN_VERBOSE=1`) of 40 training steps. Times of primitives that run at the
same time add up. Two operations count for each multiply-add.
"""

import argparse
import collections
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks import subjects
from Training.console import entry_point, report_errors, run_program
from Training.errors import InputError

STEPS = 40
WARM_UP = 3
MARK = "the measured steps begin"
NAMES = {
    "forward_training": "forward", "forward_inference": "forward", "backward_data": "backward, data",
    "backward_weights": "backward, weights", "undef": "",
}  # fmt: skip
SCRIPT = f"""
import json, sys
from types import SimpleNamespace
from benchmarks import subjects
name, options = json.loads(sys.argv[1])
subjects.begin(name, SimpleNamespace(**options))
subjects.subject.time_steps({WARM_UP})
print({MARK!r}, flush=True)
subjects.subject.time_steps({STEPS})
"""


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="attention_56", help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step (default: %(default)s)")
    parser.add_argument("--precision", default="mixed_bfloat16", choices=("mixed_bfloat16", "float32"))
    parser.add_argument("--before", metavar="DIR", help="an earlier checkout of this project, measured too")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise InputError(f"--batch-size must be 1 or more, received {options.batch_size}")
    if options.before and not (Path(options.before) / "Training").is_dir():
        raise InputError(f"--before must be a checkout of this project, received {options.before}")
    return options


def count_operations(kind, problem):
    """Return the floating-point operations of a primitive, or None for a kind that is bound by memory.

    Args:
        kind: str, oneDNN's name.
        problem: str, oneDNN's description, such as `mb8_ic3oc32_ih32oh32kh5sh1dh0ph2_iw32ow32kw5sw1dw0pw2` of a
            convolution or `1x4x2:8x2x256` of a product.
    """
    if kind == "matmul":
        one, other = ([int(size) for size in matrix.split("x")] for matrix in problem.split(":"))
        batch = math.prod(map(max, one[:-2], other[:-2]))
        return 2 * batch * one[-2] * one[-1] * other[-1]
    if kind in ("convolution", "inner_product"):
        sizes = {name: int(size) for name, size in re.findall(r"([a-z]+)(\d+)", problem)}
        named = ("mb", "ic", "oc", "oh", "ow", "kh", "kw")
        return 2 * math.prod(sizes.get(name, 1) for name in named) // sizes.get("g", 1)
    return None


def sum_primitives(lines):
    """Sum the lines of oneDNN's log; return `{name: [number, milliseconds, operations]}`."""
    found = collections.defaultdict(lambda: [0, 0.0, 0])
    for line in lines:
        fields = line.split(",")
        if fields[:4] != ["onednn_verbose", "v1", "primitive", "exec"]:
            continue
        kind, direction, problem, spent = fields[5], fields[7], fields[-2], float(fields[-1])
        end = NAMES.get(direction, direction)
        total = found[kind.replace("_", " ") + (f", {end}" if end else "")]
        total[0] += 1
        total[1] += spent
        total[2] += count_operations(kind, problem) or 0
    return dict(found)


def measure(name, options):
    """Train in a process of its own, and return the sums of its primitives per step."""
    before = options.before if name == subjects.BEFORE else ""
    given = {"network": options.network, "geometry": "compact", "batch_size": options.batch_size,
             "before": before, "before_precision": options.precision}  # fmt: skip
    said = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([name, given])],
        env={**os.environ, "ONEDNN_VERBOSE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if said.returncode:
        raise InputError(f"the measured process failed: {(said.stderr.strip().splitlines() or ['no message'])[-1]}")
    log = said.stdout.splitlines()
    found = sum_primitives(log[log.index(MARK) :])
    if not found:
        raise InputError("TensorFlow did not use oneDNN: its log is empty")
    return {kind: [value / STEPS for value in values] for kind, values in found.items()}


def make_rows(measured):
    """Return the lines of a Markdown table, the slowest primitive of the first column first."""
    lines = ["| primitive | " + " | ".join(f"{name}: a step | ms | GFLOP/s" for name in measured) + " |"]
    lines.append("|---" * (3 * len(measured) + 1) + "|")
    first = next(iter(measured.values()))
    kinds = sorted(set().union(*measured.values()), key=lambda kind: -first.get(kind, (0, 0))[1])
    for kind in [*kinds, "all"]:
        cells = []
        for sums in measured.values():
            number, spent, work = map(sum, zip(*sums.values())) if kind == "all" else sums.get(kind, (0, 0, 0))
            rate = f"{work / spent / 1e6:.0f}" if work and kind != "all" else ""
            cells += [f"{number:.0f}", f"{spent:.1f}", rate] if number else ["", "", ""]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


@entry_point("python -m benchmarks.primitives")
def main(arguments=None):
    with report_errors():
        options = parse(arguments)
        ours = "tensorflow, bfloat16" if options.precision == "mixed_bfloat16" else "tensorflow"
        measured = {"now": measure(ours, options)}
        if options.before:
            measured["before"] = measure(subjects.BEFORE, options)
        print("\n".join(make_rows(measured)))


if __name__ == "__main__":
    run_program(main)
