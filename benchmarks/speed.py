"""Compare the project's speed with a matrix product and with PyTorch: python -m benchmarks.speed [--peer]

Every subject (TensorFlow, with and without augmentation and XLA, JAX, PyTorch, an earlier checkout) trains in its own
process. First, each in turn takes its first step. Then they take turns, so that other load on the machine affects all
of them alike. Ratios are computed within a round, and their median is reported: they are more reliable than the
absolute figures.

A step counts as 6 floating-point operations for each multiply-add of `Model.count` and image: 2 per multiply-add, with
the backward pass as twice the forward pass. Writes `speed.json` and `speed.md` to `benchmarks/results/<name>`.
"""

import argparse
import json
import os
import statistics
import subprocess
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from pathlib import Path

from benchmarks import subjects
from Model.geometries import GEOMETRIES
from Training.console import entry_point, report_errors, run_program
from Training.errors import InputError

RESULTS = Path(__file__).resolve().parent / "results"
PARTS = ("import", "build", "first step")  # of the time to the first step
TUNABLES = "GLIBC_TUNABLES"  # glibc reads it when a process starts
FLOP = 6  # operations of a step for each multiply-add and image


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="attention_56", help="(default: %(default)s)")
    parser.add_argument("--geometry", default="compact", choices=tuple(GEOMETRIES), help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64], help="images per step (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each subject (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="duration of a measurement (default: %(default)s)")
    parser.add_argument("--subjects", nargs="+", choices=tuple(subjects.SUBJECTS), default=list(subjects.DEFAULT))
    parser.add_argument(
        "--peer", nargs="*", choices=tuple(subjects.PEERS), metavar="PEER",
        help=f"PyTorch, which must be installed: {', '.join(subjects.PEERS)} (default: the first two)",
    )  # fmt: skip
    parser.add_argument("--before", metavar="DIR", help="an earlier checkout of this project, measured too")
    parser.add_argument("--before-precision", default="", help="precision of the earlier checkout (default: float32)")
    parser.add_argument("--name", default="speed", help="folder in benchmarks/results (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.peer is not None:
        options.peer = options.peer or list(subjects.PEERS)[:2]
    if min(*options.batch_size, options.rounds) < 1:
        raise InputError("--batch-size and --rounds must be 1 or more")
    if options.before and not (Path(options.before) / "Training").is_dir():
        raise InputError(f"--before must be a checkout of this project, received {options.before}")
    return options


def read_commit(checkout):
    """Return the commit of a checkout, or None for no checkout."""
    if not checkout:
        return None
    asked = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


@contextmanager
def default_allocator():
    """Start processes inside this context without `GLIBC_TUNABLES`."""
    kept = os.environ.pop(TUNABLES, None)
    try:
        yield
    finally:
        if kept is not None:
            os.environ[TUNABLES] = kept


def start_process():
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def measure_rounds(running, options):
    """Measure step and matrix product of each subject in every round; return `{name: [(seconds, GFLOP/s), ...]}`."""
    found = {name: [] for name in running}
    for turn in range(options.rounds):
        for name, pool in running.items():
            rate = pool.submit(subjects.ask, "matrix", options.seconds / 4).result()
            found[name].append((pool.submit(subjects.ask, "steps", options.seconds).result(), rate))
            print(
                f"round {turn + 1}, {name}: {found[name][-1][0]:.3f} s a step, product {rate:.0f} GFLOP/s", flush=True
            )
    return found


def measure_once(pool, name, options):
    """Measure the figures that need no rounds; return `{figure: value}`."""
    each = options.seconds / 2
    wanted = ["memory", "evaluation", "latency"]
    figures = {what: pool.submit(subjects.ask, what, *[each] * (what != "memory")).result() for what in wanted}
    if name in options.subjects:
        figures["pipeline"] = pool.submit(subjects.ask, "pipeline", each).result()
        for kind in ("affine", "crop"):
            figures[kind] = pool.submit(subjects.ask, "augmentation", kind, each).result()
    return figures


def measure(options):
    """Measure all subjects; return the results as plain data."""
    names = [*options.subjects, *[subjects.BEFORE] * bool(options.before), *(options.peer or ())]
    running = {name: start_process() for name in names}
    try:
        result = {"options": {**vars(options), "before": read_commit(options.before)}, "first": {}}
        result["tunables"] = os.environ.get(TUNABLES)
        for name, pool in running.items():
            with default_allocator() if name == subjects.BEFORE else nullcontext():
                result["first"][name] = pool.submit(subjects.begin, name, options).result()
            print(f"{name}: {format_first(result['first'][name])}", flush=True)
        result["environment"] = running[names[0]].submit(subjects.ask, "environment").result()
        result["rounds"] = measure_rounds(running, options)
        result["once"] = {name: measure_once(pool, name, options) for name, pool in running.items()}
    finally:
        for pool in running.values():
            pool.shutdown(cancel_futures=True)
    if options.peer:
        with start_process() as pool:
            result["same_network"] = pool.submit(subjects.check_same_network, options).result()
    return result


def format_first(parts):
    return ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts.items())


def compute_ratio(result, name, other):
    """Return the time of a step of `other` divided by that of `name`, the median over the rounds."""
    pairs = zip(result["rounds"][name], result["rounds"][other])
    return statistics.median(theirs[0] / ours[0] for ours, theirs in pairs)


def compare(result, name):
    """Format the speed of a subject's step relative to the fastest peer of its precision; "-" without one."""
    half = "bfloat16" in name or (name == subjects.BEFORE and "bfloat16" in result["options"]["before_precision"])
    peers = [peer for peer in result["options"]["peer"] or () if ("bfloat16" in peer) == half]
    return f"{min(compute_ratio(result, name, peer) for peer in peers):.2f}" if peers else "-"


def make_rows(result):
    """Return the lines of a Markdown table: one row per figure, one column per subject."""
    names, batch = list(result["rounds"]), result["options"]["batch_size"]
    work = FLOP * result["environment"]["multiply_adds"] * batch / 1e9  # GFLOP of a step
    first, once = result["first"], result["once"]
    step = {name: statistics.median(s for s, _ in result["rounds"][name]) for name in names}
    product = {name: statistics.median(work / s / rate for s, rate in result["rounds"][name]) for name in names}

    def share(kind):
        return lambda n: f"{100 * once[n][kind] / step[n]:.2f} %, {batch / once[n][kind]:,.0f}"

    table = {
        "import, s": lambda n: f"{first[n]['import']:.1f}",
        "build, s": lambda n: f"{first[n]['build']:.1f}",
        "first step: trace and compile, s": lambda n: f"{max(first[n]['first step'] - step[n], 0):.1f}",
        "first step: run, s": lambda n: f"{step[n]:.2f}",
        "first step from the start, s": lambda n: f"{sum(first[n][part] for part in PARTS):.1f}",
        "first step: processor time of the main thread, s": lambda n: f"{first[n]['main thread']:.1f}",
        "steps/s": lambda n: f"{1 / step[n]:.2f}",
        "images/s": lambda n: f"{batch / step[n]:.0f}",
        "GFLOP/s": lambda n: f"{work / step[n]:.0f}",
        "share of the matrix product's rate": lambda n: f"{100 * product[n]:.0f} %",
        "speed of a step, the fastest PyTorch of this precision = 1": lambda n: compare(result, n),
        "evaluation, images/s": lambda n: f"{once[n]['evaluation']:.0f}",
        "one image, ms": lambda n: f"{1000 * once[n]['latency']:.0f}",
        "affine alone: share of a step, images/s": share("affine"),
        "crop alone: share of a step, images/s": share("crop"),
        "host pipeline alone: share of a step, images/s": share("pipeline"),
        "largest memory while training, MB": lambda n: f"{once[n]['memory']:,.0f}",
    }
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for text, cell in table.items():
        cells = [cell(n) if "pipeline" in once[n] or "alone" not in text else "-" for n in names]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    return lines


def report(result):
    options, machine = result["options"], result["environment"]
    packages = ", ".join(f"{key} {value}" for key, value in machine["packages"].items() if value)
    lines = [
        f"# Speed of {options['network']}, {options['geometry']}, batches of {options['batch_size']}",
        "",
        f"{machine['device']}; Python {machine['python']}, {packages}; commit {machine['git_commit']}.",
        f"Medians of {options['rounds']} rounds in which the subjects take turns; from `python -m benchmarks.speed`.",
        *[f"All but `{subjects.BEFORE}` with {TUNABLES}={result['tunables']}."] * bool(result["tunables"]),
        *[f"The column `{subjects.BEFORE}` is commit {options['before']} of this project."] * bool(options["before"]),
        "",
        *make_rows(result),
    ]
    if "same_network" in result:
        same = result["same_network"]
        counts = ", ".join(f"{key.replace('_', '-')} {a:,} and {b:,}" for key, (a, b) in list(same.items())[:3])
        lines += [
            "",
            f"Ours and PyTorch's network: {counts}; with the same weights the largest difference of a logit is",
            f"{same['logit_difference']:.0e} of the largest logit.",
        ]
    return "\n".join(lines) + "\n"


@entry_point("python -m benchmarks.speed")
def main(arguments=None):
    with report_errors():
        options = parse(arguments)
        sizes, found = options.batch_size, []
        folder = RESULTS / options.name
        folder.mkdir(parents=True, exist_ok=True)
        for options.batch_size in sizes:
            found.append(measure(options))
            text = "\n".join(map(report, found))
            (folder / "speed.json").write_text(json.dumps(found, indent=1) + "\n")
            (folder / "speed.md").write_text(text)
        print(f"\n{text}\nwritten into {folder}")


if __name__ == "__main__":
    run_program(main)
