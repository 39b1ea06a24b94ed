"""Kill a run repeatedly, resume it until it finishes, and compare it with an undisturbed run.

    python -m benchmarks.kill --kills 50        # a line for each kill and a summary; exit code 1 if a run differs
    python -m benchmarks.kill --signals 10      # SIGHUP, SIGTERM and SIGINT at 10 moments each, as a table

Runs are those of `training_cifar10.py` on the digits, with a network of a few thousand weights. SIGKILL is sent at a
random moment, during a save (as soon as an unfinished file appears), or at the end of an epoch. Weights, optimizer and
random states must be equal bit for bit, and so must the history and every TensorBoard point, except times and rates.

With `--signals`, the moments are spread evenly over a whole run, from the start of the process to its last line. The
table shows the exit code, the last message, and the state of the folder. Then each run is resumed and compared.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from Training.console import entry_point, run_program

ROOT = Path(__file__).resolve().parent.parent
UNCOMPARED = ("recipe", "result")  # tags of texts that contain the folder's name or times
TIMES = ("seconds", "first_step_seconds", "images_per_second")
SCRIPT = "import training_cifar10; from tests.support import tiny; training_cifar10.main(build=tiny.tiny_build)"
# The same as a program, including what happens before and after `main`.
PROGRAM = """
from Training.console import run_program
import training_cifar10
def build(*given):
    from tests.support import tiny
    return tiny.tiny_build(*given)
run_program(lambda: training_cifar10.main(build=build))
"""
SIGNALS = ("SIGHUP", "SIGTERM", "SIGINT")
ARGUMENTS = ["--dataset=digits", "--samples=128", "--batch-size=16", "--epochs=8", "--warmup-epochs=1",
             "--masks-every=1", "--dropout=0.3", "--patience=7", "--checkpoint-steps=3"]  # fmt: skip


def stop_ignoring_signals():
    """Let new processes receive SIGHUP and SIGINT: under nohup, they would inherit that these are ignored."""
    handlers = {signal.SIGHUP: lambda *_: None, signal.SIGINT: signal.default_int_handler}  # these are not inherited
    for number, handler in handlers.items():
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


def start(*arguments, script=SCRIPT, **environment):
    """Start a process of the script with these arguments and additional environment variables."""
    ours = {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, "-u", "-c", script, *arguments],
        cwd=ROOT, env={**os.environ, **ours}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(run):
    out, err = run.communicate(timeout=600)
    if run.returncode:
        raise SystemExit(f"a run ended with {run.returncode}: {err[-2000:]}")
    return out


def find_run(logs):
    (folder,) = Path(logs).iterdir()
    return folder


def kill(run, folder_of, kind, wait):
    """Send SIGKILL `wait` seconds into training, during a save, or at an epoch's end; return whether the run died."""
    started = threading.Event()
    epochs = []

    def read():
        for line in run.stdout:
            if " training image" in line:
                started.set()
            if line.startswith("epoch "):
                epochs.append(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while not started.wait(0.01) and run.poll() is None:
        pass
    begun = time.monotonic()
    while run.poll() is None:
        saving = kind == "save" and any((folder_of() / "backup").glob("*.new"))
        late = time.monotonic() - begun > wait
        if late and (kind == "moment" or saving or (kind == "epoch" and epochs)):
            run.send_signal(signal.SIGKILL)
            break
        time.sleep(0.0005)
    run.wait()
    reader.join()
    run.stderr.close()
    return run.returncode == -signal.SIGKILL


def read_history(folder):
    with open(folder / "history.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def read_points(folder):
    """Return every point of the event files as `{(part, tag): [(step, value), ...]}`, in the order written.

    Left out are times, the recipe, which contains the folder's name, and the table of results, which contains times.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = {}
    for path in sorted(folder.rglob("events.out.tfevents*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if (
                    not value.tag.endswith(TIMES)
                    and value.tag not in ("recipe", "result")
                    and "hparams" not in value.tag
                ):
                    key = (str(path.parent.relative_to(folder)), value.tag)
                    found.setdefault(key, []).append((event.step, value.tensor.SerializeToString()))
    return found


def find_differences(one, two):
    """Return the differences between two finished runs as texts."""
    from Training.runs.checkpoint import list_checkpoints, unpack

    found = []
    (_, a), (_, b) = (unpack(list_checkpoints(folder)[0].read_bytes()) for folder in (one, two))
    unequal = sum(not np.array_equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))
    if unequal:
        found.append(f"{unequal} of {len(a)} arrays")
    if read_history(one) != read_history(two):
        found.append("history.csv")
    first, second = read_points(one), read_points(two)
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            steps = [[step for step, _ in each.get(key, [])] for each in (first, second)]
            found.append(f"event {key}, steps {steps[0]} against {steps[1]}")
    return found


def kill_and_resume(logs, kills, length, chance, arguments=ARGUMENTS, script=SCRIPT, start=start):
    """Kill one run up to `kills` times, then let it finish; return the kinds of the kills that ended it.

    `start` is a function with the arguments of this module's `start`.
    """
    kinds = []
    run = start(*arguments, f"--logs={logs}", script=script)
    while len(kinds) < kills:
        kind = chance.choice(["moment", "moment", "save", "epoch"])
        if not kill(run, lambda: find_run(logs), kind, chance.uniform(0, length)):
            if run.returncode:
                raise SystemExit(f"a run ended by itself with {run.returncode}")
            break
        kinds.append(kind)
        print(f"  killed ({kind})", flush=True)
        run = start("--resume", str(find_run(logs)), script=script)
    else:
        finish(run)
    return kinds


def stop(logs, name, wait, arguments=ARGUMENTS):
    """Send a signal `wait` seconds after the start of a run; return its exit code, its last line and its seconds."""
    begun = time.monotonic()
    run = start(*arguments, f"--logs={logs}", script=PROGRAM)
    try:
        run.wait(wait)
    except subprocess.TimeoutExpired:
        run.send_signal(getattr(signal, name))
    out, error = run.communicate(timeout=600)
    lines = error.strip().splitlines()
    said = lines[-1] if lines else "the result" if "run folder" in out else ""
    wrong = "Traceback" in error or len(lines) > 1
    return run.returncode, f"{len(lines)} lines: {error[-300:]!r}" if wrong else said, time.monotonic() - begun


def describe_state(logs):
    """Return a short text about how far the run in a logs folder has got."""
    from Training.runs.checkpoint import load_newest

    folders = list(Path(logs).iterdir()) if Path(logs).exists() else []
    if not folders:
        return "no folder"
    if (folders[0] / "result.json").exists():
        return "result"
    found = load_newest(folders[0], lambda line: None)
    return f"epoch {found[0]['epoch']}, step {found[0]['step']}" if found else "no checkpoint"


def try_signals(place, whole, length, moments):
    """Send each signal at evenly spread moments of a run, resume and compare it; return the number of wrong runs."""
    wrong = 0
    print("| signal | after, s | exit code | message | saved | resumed |\n|---|---|---|---|---|---|")
    for i in range(moments * len(SIGNALS)):
        name, wait = SIGNALS[i % len(SIGNALS)], length * 1.05 * (i + 1) / (moments * len(SIGNALS))
        logs = f"{place}/{name}-{i}"
        code, said, _ = stop(logs, name, wait)
        state, end = describe_state(logs), "-"
        right = (code == 0 and state == "result") or abs(code) in (getattr(signal, name), 128 + getattr(signal, name))
        if state != "no folder" and (find_run(logs) / "recipe.json").exists():
            finish(start("--resume", str(find_run(logs))))
            end = ", ".join(find_differences(whole, find_run(logs))) or "equal"
        wrong += not right or end not in ("-", "equal") or "lines:" in said
        print(f"| {name} | {wait:.1f} | {code} | {said.split(' Resume with')[0]} | {state} | {end} |", flush=True)
    return wrong


@entry_point("python -m benchmarks.kill")
def main(arguments=None):
    stop_ignoring_signals()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--kills-a-run", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", type=int, metavar="N", help="send each signal at N moments instead of killing")
    options = parser.parse_args(arguments)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        begun = time.monotonic()
        finish(start(*ARGUMENTS, f"--logs={place}/whole"))
        length = time.monotonic() - begun
        if options.signals:
            wrong = try_signals(place, find_run(f"{place}/whole"), length, options.signals)
            print(f"{options.signals * len(SIGNALS)} runs, {wrong} wrong")
            return 1 if wrong else 0
        length /= 2  # roughly the part after the imports
        total, runs, wrong = 0, 0, 0
        while total < options.kills:
            runs += 1
            logs = f"{place}/{runs}"
            kinds = kill_and_resume(logs, min(options.kills_a_run, options.kills - total), length, chance)
            total += len(kinds)
            found = find_differences(find_run(f"{place}/whole"), find_run(logs))
            wrong += bool(found)
            print(f"run {runs}: {len(kinds)} kills, {', '.join(found) or 'equal'}", flush=True)
    print(f"{total} kills in {runs} runs, {wrong} runs differ from the undisturbed run")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_program(main)
