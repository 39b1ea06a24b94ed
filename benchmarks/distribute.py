"""Compare runs on two devices and in two processes with a run on one device, also after a process was killed.

    python -m benchmarks.distribute               # prints a line for each run; exit code 1 if one differs
    python -m benchmarks.distribute --ema=0.9     # with additional flags for each run, and without kills

Runs are those of `training_cifar10.py` on the digits, with a network of a few thousand weights, 20 epochs of one step,
augmentation and dropout. The devices are parts of one CPU; the processes connect at 127.0.0.1.
"""

import csv
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import kill
from Training.console import entry_point, run_program

ROOT = Path(__file__).resolve().parent.parent
# Splits TensorFlow's CPU into two devices; runs without --distribute use one of them.
TWO = (
    "import tensorflow as tf; tf.config.set_logical_device_configuration("
    "tf.config.list_physical_devices('CPU')[0], [tf.config.LogicalDeviceConfiguration()] * 2); "
)
ARGUMENTS = ["--dataset=digits", "--samples=64", "--batch-size=64", "--epochs=20", "--masks-every=10", "--dropout=0.3",
         "--warmup-epochs=2", "--learning-rate=0.001"]  # fmt: skip
TOLERANCE = 1e-3


def start(backend, *arguments, script=kill.SCRIPT, **environment):
    return kill.start(*arguments, script=script, KERAS_BACKEND=backend, **environment)


def start_processes(*arguments, script=kill.SCRIPT, **environment):
    """Start two processes of one run on JAX; return them in order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    named = {"KERAS_DISTRIBUTION_JOB_ADDRESSES": address, "KERAS_DISTRIBUTION_NUM_PROCESSES": "2", **environment}
    return [
        start("jax", "--distribute=data", *arguments, script=script, KERAS_DISTRIBUTION_PROCESS_ID=str(i), **named)
        for i in range(2)
    ]


def resume_processes(folder, script=kill.SCRIPT, **environment):
    return start_processes("--resume", str(folder), script=script, **environment)


def end_one(run, which, number=signal.SIGKILL, after="epoch  8 of 20 "):
    """Send a signal to one of two processes; return exit codes, the last line of the other, and its seconds to exit."""
    for line in run[0].stdout:
        if line.startswith(after):
            run[which].send_signal(number)
            break
    begun = time.monotonic()
    _, err = run[1 - which].communicate(timeout=300)
    waited = time.monotonic() - begun
    run[which].communicate(timeout=300)
    return [process.returncode for process in run], err.strip().splitlines()[-1:], waited


def read_losses(logs):
    """Return the training and validation losses of all epochs; an epoch is one step."""
    with open(kill.find_run(logs) / "history.csv", newline="") as file:
        return [float(row[key]) for row in csv.DictReader(file) for key in ("loss", "val_loss")]


def find_largest_difference(one, other):
    """Return the largest relative difference between the losses of two runs."""
    return max(abs(a / b - 1) for a, b in zip(read_losses(one), read_losses(other), strict=True))


def compare(place, arguments):
    """Train on one device and on two, and compare the losses; return the number of runs that differ."""
    for backend in ("tensorflow", "jax"):
        kill.finish(start(backend, *arguments, f"--logs={place}/{backend}"))
    kill.finish(
        start("tensorflow", *arguments, "--distribute=mirrored", f"--logs={place}/mirrored", script=TWO + kill.SCRIPT)
    )
    kill.finish(start("jax", *arguments, "--distribute=data", f"--logs={place}/data", JAX_NUM_CPU_DEVICES="2"))
    for run in start_processes(*arguments, f"--logs={place}/processes"):
        kill.finish(run)
    wrong = 0
    for one, name in (("tensorflow", "mirrored"), ("jax", "data"), ("jax", "processes")):
        largest = find_largest_difference(f"{place}/{one}", f"{place}/{name}")
        wrong += largest > TOLERANCE
        print(f"{name}: losses within {largest:.1e} of the run on one device ({one})", flush=True)
    return wrong


def end_and_resume(place):
    """End one of two processes, and resume the run; return the number of runs that differ from that of `compare`."""
    wrong = 0
    for which, number in ((1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGTERM)):
        logs = f"{place}/{number.name}-{which}"
        codes, said, waited = end_one(start_processes(*ARGUMENTS, f"--logs={logs}"), which, number)
        for run in resume_processes(kill.find_run(logs)):
            kill.finish(run)
        found = kill.find_differences(kill.find_run(f"{place}/processes"), kill.find_run(logs))
        wrong += bool(found)
        print(f"{number.name} to process {which}: exit codes {codes}, the other ended after {waited:.1f} s: {said}")
        print(f"  resumed: {', '.join(found) or 'equal'}", flush=True)
    return wrong


@entry_point("python -m benchmarks.distribute")
def main():
    more = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        differing = compare(folder, [*ARGUMENTS, *more])
        return 1 if differing + (0 if more else end_and_resume(folder)) else 0


if __name__ == "__main__":
    run_program(main)
