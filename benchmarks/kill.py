"""Kill a run again and again, resume it to its end, and compare it with a run that nothing disturbed.

    python -m benchmarks.kill --kills 50          # prints a line a kill and a summary; exit code 1 if anything differs

A run is a real one of `training_cifar10.py` on the digits, with a network of a few thousand weights. SIGKILL comes at a
random moment, within a save (as soon as a file that is being written appears), or at an epoch's end. Weights, optimizer
and random states must be equal bit for bit, the history and every TensorBoard point but for times and rates.
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

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("seconds", "first_step_seconds", "images_per_second")
SCRIPT = "import training_cifar10; from tests.support import tiny; training_cifar10.main(build=tiny.tiny_build)"
WORDS = ["--dataset=digits", "--samples=128", "--batch-size=16", "--epochs=8", "--warmup-epochs=1", "--masks-every=1",
         "--dropout=0.3", "--patience=7", "--checkpoint-steps=3"]  # fmt: skip


def start(*words, script=SCRIPT, **environment):
    """A process of the script with these words, in this environment beside its own."""
    ours = {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, "-u", "-c", script, *words],
        cwd=ROOT, env={**os.environ, **ours}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(run):
    out, err = run.communicate(timeout=600)
    if run.returncode:
        raise SystemExit(f"a run ended with {run.returncode}: {err[-2000:]}")
    return out


def only_run(logs):
    (folder,) = Path(logs).iterdir()
    return folder


def kill(run, folder_of, kind, wait):
    """Send SIGKILL: `wait` seconds into the training, within a save, or at an epoch's end. Returns whether it came."""
    started = threading.Event()
    epochs = []

    def read():
        for line in run.stdout:
            if "images to train on" in line:
                started.set()
            if " epochs, about " in line:
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


def history(folder):
    with open(folder / "history.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def points(folder):
    """Every point of the event files as `{(part, tag): [(step, value), ...]}`, in the order written.

    Times are left out, and the recipe, which names the folder.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = {}
    for path in sorted(folder.rglob("events.out.tfevents*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if not value.tag.endswith(TIMES) and value.tag != "recipe" and "hparams" not in value.tag:
                    key = (str(path.parent.relative_to(folder)), value.tag)
                    found.setdefault(key, []).append((event.step, value.tensor.SerializeToString()))
    return found


def differences(one, two):
    """What differs between two finished runs, in words."""
    from Training.runs.checkpoint import list_checkpoints, unpack

    found = []
    (_, a), (_, b) = (unpack(list_checkpoints(folder)[0].read_bytes()) for folder in (one, two))
    unequal = sum(not np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    if unequal:
        found.append(f"{unequal} of {len(a)} arrays")
    if history(one) != history(two):
        found.append("history.csv")
    first, second = points(one), points(two)
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            steps = [[step for step, _ in each.get(key, [])] for each in (first, second)]
            found.append(f"event {key}, steps {steps[0]} against {steps[1]}")
    return found


def disturbed(logs, kills, length, chance, words=WORDS):
    """One run that is killed up to `kills` times and then let go to its end; returns the kinds of kill that came."""
    came = []
    run = start(*words, f"--logs={logs}")
    while len(came) < kills:
        kind = chance.choice(["moment", "moment", "save", "epoch"])
        if not kill(run, lambda: only_run(logs), kind, chance.uniform(0, length)):
            if run.returncode:
                raise SystemExit(f"a run ended by itself with {run.returncode}")
            break
        came.append(kind)
        print(f"  killed ({kind})", flush=True)
        run = start("--resume", str(only_run(logs)))
    else:
        finish(run)
    return came


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--kills-a-run", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args(arguments)
    chance = random.Random(words.seed)
    with tempfile.TemporaryDirectory() as place:
        begun = time.monotonic()
        finish(start(*WORDS, f"--logs={place}/whole"))
        length = (time.monotonic() - begun) / 2  # about the part after the imports
        total, runs, wrong = 0, 0, 0
        while total < words.kills:
            runs += 1
            logs = f"{place}/{runs}"
            came = disturbed(logs, min(words.kills_a_run, words.kills - total), length, chance)
            total += len(came)
            found = differences(only_run(f"{place}/whole"), only_run(logs))
            wrong += bool(found)
            print(f"run {runs}: {len(came)} kills, {', '.join(found) or 'equal'}", flush=True)
    print(f"{total} kills in {runs} runs, {wrong} runs differ from the undisturbed one")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
