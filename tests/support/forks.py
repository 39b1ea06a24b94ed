"""Processes that start with TensorFlow already imported, which saves each of them about 3 s."""

import io
import multiprocessing
import os
import sys
import threading
from multiprocessing.reduction import DupFd

SERVER = multiprocessing.get_context("forkserver")  # it imports these modules once, and forks before they run anything
SERVER.set_forkserver_preload(["tensorflow", "keras", "sklearn.datasets", "training_cifar10"])


def _run(script, arguments, environment, streams):
    """Run a script like `python -u -c SCRIPT ARGUMENTS...`."""
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream.detach(), number)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(i, "w", closefd=False), write_through=True) for i in (1, 2))
    sys.argv[:] = ["-c", *arguments]
    os.environ.update(environment)
    exec(script, {"__name__": "__main__"})


class Fork:
    """A process of `start`, with what the tests use of `subprocess.Popen`."""

    def __init__(self, script, arguments, environment):
        pairs = [os.pipe() for _ in range(2)]
        streams = [DupFd(write) for _, write in pairs]
        self._process = SERVER.Process(target=_run, args=(script, arguments, environment, streams))
        self._process.start()
        for _, write in pairs:
            os.close(write)
        self.pid = self._process.pid
        self.stdout, self.stderr = (os.fdopen(read) for read, _ in pairs)

    @property
    def returncode(self):
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self._process.join(timeout)
        return self.returncode

    def communicate(self, timeout=None):
        """Read both streams to their ends, and wait for the process."""
        found = {}
        readers = [
            threading.Thread(target=lambda name=name: found.update({name: getattr(self, name).read()}), daemon=True)
            for name in ("stdout", "stderr")
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(timeout)
        self.wait(timeout)
        assert self.returncode is not None, f"process {self.pid} still runs after {timeout} s"
        return found["stdout"], found["stderr"]


def start(*arguments, script, **environment):
    """Start a script with these arguments and environment variables, like `benchmarks.kill.start`, on TensorFlow."""
    return Fork(script, arguments, environment)
