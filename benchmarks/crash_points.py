"""Fail every file operation of a run in turn, resume the run, and compare it with an undisturbed run.

    python -m benchmarks.crash_points            # a summary; exit code 1 if a resumed run differs or loses something

A run is one of `training_cifar10.py` on the digits with a tiny network. Every write, fsync, rename, truncate, unlink,
mkdir and creation of a file below its logs folder is numbered, and those of a second run that resumes the first one
after its first checkpoint within an epoch. For each number N of both:

- `before`, `after`: the process dies just before or just after operation N;
- `EIO`, `ENOSPC`: operation N fails with this error; `full`: it fails with ENOSPC, and so does every later operation
  that needs space;
- `power`: the power fails just after operation N, so only what an fsync made durable is left: the content of a file
  after an fsync of the file, its name after an fsync of its directory. Two mixed states are tried too: all names with
  the durable contents, and the durable names with all contents.

Then the run is resumed. It must end with the same weights, optimizer, history and TensorBoard points as the undisturbed
one, or be refused in one line with nothing lost.

Deaths are replayed: the operations up to N of a recorded run are applied to an empty folder. Failures are not
replayed: the run is trained until operation N fails. The clock of these runs only counts, so that equal runs write the
same bytes. Each of these kinds runs in a process of its own; in it, folders
that are equal byte for byte are resumed only once.

Python's own calls are intercepted. A run writes all its files through them.
"""

import argparse
import builtins
import contextlib
import datetime
import errno
import gc
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np

from benchmarks import kill
from Training.console import entry_point, run_program

ARGUMENTS = ["--dataset=digits", "--samples=32", "--eval-samples=40", "--batch-size=16", "--epochs=2",
             "--warmup-epochs=1", "--masks-every=0", "--checkpoint-steps=1", "--augmentation=none"]  # fmt: skip
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "full": errno.ENOSPC}
PARTS = ("die", *ERRORS)  # "die": before and after an operation, and when the power fails
NEED_SPACE = ("create", "write", "mkdir")  # operations that a full disk refuses
RIGHT = ("equal", "refused", "no run yet")  # verdicts
START = 1.7e9  # seconds since 1970 at which the clock of a recorded run starts
TICK = 1e-4  # seconds by which each call advances the clock


class Recorder:
    """Numbers the file operations below a folder, and makes one of them fail.

    Args:
        root: path of the folder.
        fail: number of the operation that fails, counted from 1, or 0 for none.
        error: key of `ERRORS`, the failure.
    """

    def __init__(self, root, fail=0, error="EIO"):
        self.root = os.path.realpath(root)
        self.fail = fail
        self.error = error
        self.operations = []
        self.descriptors = {}  # descriptor of an open file or directory: (kind, number of the file or path)
        # Number of the file that a path names; negative for files that are there from the start.
        there = [path for path, content in read_tree(root).items() if content is not None]
        self.files = {path: -number for number, path in enumerate(there, start=1)}
        self.count = 0
        self.ticks = 0
        self.objects = {}
        self.failed = None
        self.kept = {}

    def relative(self, path):
        """Return a path relative to the root, or None if it is outside; a link at its end is not followed."""
        path = os.path.abspath(os.fsdecode(path))
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        return os.path.relpath(path, self.root) if f"{path}/".startswith(f"{self.root}/") else None

    def do(self, kind, *what, path=None):
        """Record an operation, or raise `OSError` if it is the one that fails."""
        self.count += 1
        again = self.failed and self.error == "full" and kind in NEED_SPACE
        if self.count == self.fail or again:
            self.failed = self.failed or f"{kind} {path or what[0]}"
            raise OSError(ERRORS[self.error], os.strerror(ERRORS[self.error]), path)
        self.operations.append((kind, *what))

    def register(self, descriptor, path, flags):
        """Remember which file or directory a descriptor belongs to."""
        name = self.relative(path)
        if name is None:
            return
        if os.path.isdir(path):
            self.descriptors[descriptor] = ("directory", name)
            return
        self.descriptors[descriptor] = ("file", self.files.get(name))

    def create(self, name, path):
        number = len(self.operations) + 1
        self.do("create", name, number, path=path)
        self.files[name] = number

    # The methods below replace Python's own calls.

    def open_descriptor(self, path, flags, mode=0o777, **kwargs):
        name = self.relative(path) if isinstance(path, str | bytes | os.PathLike) else None
        if name is not None and flags & (os.O_WRONLY | os.O_RDWR):
            if not os.path.lexists(path):
                if flags & os.O_CREAT:
                    self.create(name, path)
            elif flags & os.O_TRUNC:
                self.do("truncate", self.files[name], 0, path=path)
        descriptor = self.kept["open"](path, flags, mode, **kwargs)
        self.register(descriptor, path, flags)
        return descriptor

    def close_descriptor(self, descriptor):
        self.descriptors.pop(descriptor, None)
        return self.kept["close"](descriptor)

    def sync(self, descriptor):
        descriptor = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        kind, what = self.descriptors.get(descriptor, (None, None))
        if kind:
            self.do(f"sync {kind}", what)
        return self.kept["fsync"](descriptor)

    def replace(self, source, target, **kwargs):
        names = self.relative(source), self.relative(target)
        if None not in names:
            self.do("rename", *names, path=target)
            self.files[names[1]] = self.files.pop(names[0])
        return self.kept["replace"](source, target, **kwargs)

    def unlink(self, path, **kwargs):
        name = self.relative(path)
        if name is not None and os.path.lexists(path):
            self.do("unlink", name, path=path)
            self.files.pop(name, None)
        return self.kept["unlink"](path, **kwargs)

    def mkdir(self, path, *args, **kwargs):
        name = self.relative(path)
        if name is not None and not os.path.lexists(path):
            self.do("mkdir", name, path=path)
        return self.kept["mkdir"](path, *args, **kwargs)

    def open_file(
        self, file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None
    ):
        """Stand in for `open`, with a raw file below the buffer that records what is written."""
        inside = file in self.descriptors if isinstance(file, int) else (
            isinstance(file, str | bytes | os.PathLike) and self.relative(file) is not None and not os.path.isdir(file)
        )  # fmt: skip
        if opener or not inside or not set(mode) & set("wax+"):
            return self.kept["io"](file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = RecordedFile(self, file, mode.replace("t", "").replace("b", ""), closefd)
        if buffering == 0:
            return raw
        kind = io.BufferedRandom if "+" in mode else io.BufferedWriter
        buffered = kind(raw)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline, line_buffering=buffering == 1)
        text.mode = mode
        return text

    def look_at_clock(self):
        """Replace the clocks: each call returns a later time than the one before."""
        if threading.current_thread() is threading.main_thread():  # other threads would make it unrepeatable
            self.ticks += 1
        return START + TICK * self.ticks

    def number_object(self, thing):
        """Replace `id` for the objects whose numbers Keras writes into its files."""
        return self.objects.setdefault(id(thing), (10**14 + len(self.objects), thing))[0]  # kept, so that ids stay

    @contextlib.contextmanager
    def intercept(self):
        """Intercept Python's calls within this context."""
        saving = sys.modules.get("keras.src.saving.serialization_lib", SimpleNamespace())  # if Keras was imported
        strftime, dates = time.strftime, datetime.datetime

        class Dates(dates):
            """`datetime.datetime` with a counted clock, for the time that Keras writes into its files."""

            @classmethod
            def now(cls, tz=None):
                return dates.fromtimestamp(self.look_at_clock(), tz)

        own = {
            (datetime, "datetime"): Dates,
            (time, "time"): self.look_at_clock, (time, "perf_counter"): self.look_at_clock,
            (time, "strftime"): lambda form, at=None: strftime(form, at or time.gmtime(self.look_at_clock())),
            (os, "open"): self.open_descriptor, (os, "close"): self.close_descriptor, (os, "fsync"): self.sync,
            (os, "replace"): self.replace, (os, "rename"): self.replace, (os, "unlink"): self.unlink,
            (os, "remove"): self.unlink, (os, "mkdir"): self.mkdir,
            (io, "open"): self.open_file, (builtins, "open"): self.open_file,
        }  # fmt: skip
        before = {place: getattr(*place) for place in own}
        self.kept = {name: function for (_, name), function in before.items() if name != "open"}
        self.kept |= {"open": before[os, "open"], "io": before[io, "open"]}
        for (module, name), function in own.items():
            setattr(module, name, function)
        try:
            with mock.patch.object(saving, "id", self.number_object, create=True):
                yield self
        finally:
            for (module, name), function in before.items():
                setattr(module, name, function)


class RecordedFile(io.FileIO):
    """A file below `open`'s buffers: each write that reaches the system is an operation."""

    def __init__(self, recorder, file, mode, closefd):
        self.recorder = recorder
        if isinstance(file, int):
            super().__init__(file, mode, closefd)
            self.number = recorder.descriptors[file][1]
            return
        name = recorder.relative(file)
        if not os.path.lexists(file):
            if "r" not in mode:
                recorder.create(name, file)
        elif "w" in mode:
            recorder.do("truncate", recorder.files[name], 0, path=file)
        self.number = recorder.files.get(name)
        super().__init__(file, mode)
        recorder.descriptors[self.fileno()] = ("file", self.number)

    def write(self, data):
        data = bytes(data)
        at = os.fstat(self.fileno()).st_size if "a" in self.mode else self.tell()
        self.recorder.do("write", self.number, at, data)
        return super().write(data)

    def truncate(self, size=None):
        size = self.tell() if size is None else size
        self.recorder.do("truncate", self.number, size)
        return super().truncate(size)

    def close(self):
        if not self.closed:
            self.recorder.descriptors.pop(self.fileno(), None)
        super().close()


class Disk:
    """What a file system holds: the files' contents, and the names in its directories.

    Args:
        tree: what is there from the start, see `read_tree`; all of it is durable.
    """

    def __init__(self, tree):
        files = [path for path, content in tree.items() if content is not None]
        numbers = {path: -number for number, path in enumerate(files, start=1)}  # as in `Recorder`
        self.contents = {numbers[path]: tree[path] for path in files}  # number of a file: its bytes
        self.names = {path: numbers.get(path) for path in tree}  # path: number of a file, or None for a directory
        self.durable = dict(self.contents)
        self.durable_names = dict(self.names)

    def apply(self, operation):
        kind, *what = operation
        getattr(self, "_" + kind.replace(" ", "_"))(*what)

    def _create(self, path, number):
        self.names[path] = number
        self.contents[number] = b""

    def _write(self, number, at, data):
        old = self.contents[number].ljust(at, b"\0")
        self.contents[number] = old[:at] + data + old[at + len(data) :]

    def _truncate(self, number, size):
        self.contents[number] = self.contents[number][:size].ljust(size, b"\0")

    def _rename(self, source, target):
        self.names[target] = self.names.pop(source)

    def _unlink(self, path):
        self.names.pop(path)

    def _mkdir(self, path):
        self.names[path] = None

    def _sync_file(self, number):
        self.durable[number] = self.contents[number]

    def _sync_directory(self, path):
        inside = lambda name: (os.path.dirname(name) or ".") == path  # noqa: E731
        kept = {name: number for name, number in self.durable_names.items() if not inside(name)}
        self.durable_names = {**kept, **{name: number for name, number in self.names.items() if inside(name)}}

    def list_states(self, power):
        """Return the trees that a crash can leave, `{path: bytes, or None for a directory}`."""
        if not power:
            return [self._tree(self.names, self.contents)]
        return [
            self._tree(self.durable_names, self.durable),
            self._tree(self.names, self.durable),
            self._tree(self.durable_names, self.contents),
        ]

    @staticmethod
    def _tree(names, contents):
        tree = {}
        for path in sorted(names):  # if the name of a directory is lost, so are the names in it
            parent = os.path.dirname(path)
            if not parent or parent in tree:
                tree[path] = None if names[path] is None else contents.get(names[path], b"")
        return tree


def write_tree(tree, root):
    """Write the files and directories of a tree below a folder."""
    for path, content in tree.items():
        target = Path(root) / path
        if content is None:
            target.mkdir(parents=True)
        else:
            target.write_bytes(content)


def read_tree(root):
    """Return the files and directories below a folder, as `write_tree` takes them."""
    root = Path(root)
    return {path.relative_to(root).as_posix(): None if path.is_dir() else path.read_bytes()
            for path in sorted(root.rglob("*"))}  # fmt: skip


def build(recipe, data):
    """Return a network of one layer: the files of a run do not depend on its network."""
    import keras

    from Model.preprocessing import mean_subtraction

    inputs = keras.Input(data.train.images.shape[1:], name="images")
    x = mean_subtraction(*data.mean_and_std(recipe.mean))(inputs)
    x = keras.layers.Flatten(name="flatten")(keras.layers.AveragePooling2D(8, name="pool")(x))
    x = keras.layers.Dense(len(data.classes), dtype="float32", name="logits")(x)
    return keras.Model(inputs, keras.layers.Softmax(name="probabilities")(x), name="line")


def train(*arguments, recorder=None):
    """Train in this process; return the exit code and the text on standard error."""
    import keras

    import training_cifar10

    # Not in between, where it may run in a thread of TensorFlow that then waits for another one.
    gc.disable()
    keras.utils.clear_session(free_memory=True)
    error = io.StringIO()
    intercepted = recorder.intercept() if recorder else contextlib.nullcontext()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error), intercepted:
        try:
            training_cifar10.main(list(arguments), build)
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            gc.enable()
    return code, error.getvalue()


def read_end(folder):
    """Return the parts of a finished run that must be equal in all runs."""
    import keras

    from Training.runs.checkpoint import list_checkpoints, unpack

    state, arrays = unpack(list_checkpoints(folder)[0].read_bytes())
    result = json.loads((folder / "result.json").read_text())
    networks = {name: [w.tobytes() for w in keras.models.load_model(folder / name, compile=False).get_weights()]
                for name in ("last.keras", "best.keras")}  # fmt: skip
    return {
        "position": (state["epoch"], state["step"]),
        "arrays": {name: np.asarray(array).tobytes() for name, array in arrays.items()},
        "history": kill.read_history(folder),
        "points": kill.read_points(folder),
        "predictions": (folder / "predictions.csv").read_bytes(),
        "result": {k: v for k, v in result.items() if not k.endswith(("_s", "_per_s"))},
        **networks,
    }


def resume(logs, expected):
    """Resume the run in a logs folder; return a verdict, of which "equal" and "refused" are right."""
    from Training.runs.checkpoint import load_newest

    folders = list(Path(logs).iterdir())
    if not folders:
        return "no run yet"
    before = read_tree(logs)
    code, error = train("--resume", str(folders[0]))
    if code == 0:
        found = read_end(folders[0])
        wrong = [name for name in expected if found[name] != expected[name]]
        left = [path.name for path in folders[0].rglob("*") if ".new" in path.name]
        return f"differs in {', '.join(wrong)}" if wrong else f"left {left}" if left else "equal"
    lines = error.strip().splitlines()
    if code != 2 or len(lines) != 1 or "Traceback" in error:
        return f"ended with {code}: {error[-300:]}"
    after = {path: content for path, content in read_tree(logs).items() if Path(path).name != "lock"}
    if any(after.get(path, b"") != content for path, content in before.items() if Path(path).name != "lock"):
        return f"refused, and changed the folder: {lines[0]}"
    ends = [f"{folders[0].name}/{name}" for name in ("result.json", "last.keras")]
    if load_newest(folders[0], lambda _: None) or any(map(before.get, ends)):
        return f"refused, although it could be resumed: {lines[0]}"
    return "refused"


def hash_tree(tree):
    return hashlib.sha256(repr(sorted(tree.items())).encode()).digest()


class Trial:
    """A run whose operations fail in turn.

    Args:
        place: path of a folder for temporary files.
        expected: what `read_end` gives for the undisturbed run.
        tree: what the run starts from, see `read_tree`; an empty one for a new run.
        every: int, tries every such operation only.
        report: function that gets the place, the verdict and the operation of each run that was resumed.
        known: dictionary of verdicts by hash of a tree; trees in it are not resumed again.
    """

    def __init__(self, place, expected, tree, every, report, known):
        self.place = Path(place)
        self.expected = expected
        self.tree = tree
        self.every = every
        self.report = report
        self.known = known
        self.verdicts = Counter()
        recorder = Recorder(self._make_logs())
        code, error, _ = self._train(recorder)
        if code:
            raise SystemExit(f"the undisturbed run ended with {code}: {error}")
        self.operations = recorder.operations

    def _make_logs(self):
        logs = self.place / "logs"
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir()
        write_tree(self.tree, logs)
        return logs

    def _train(self, recorder):
        """Train, and return exit code, standard error and what is left."""
        resumed = [f"--resume={recorder.root}/{next(iter(self.tree))}"] if self.tree else ARGUMENTS
        code, error = train(*resumed, f"--logs={recorder.root}", recorder=recorder)
        return code, error, read_tree(recorder.root)

    def _resume(self, tree, where, operation):
        """Return the verdict on a tree, which is resumed if that was not done before."""
        key = hash_tree(tree)
        if key not in self.known:
            logs = self.place / "resumed"
            logs.mkdir()
            write_tree(tree, logs)
            self.known[key] = resume(logs, self.expected)
            shutil.rmtree(logs)
            self.report(where, self.known[key], operation)
        return self.known[key]

    def crash(self):
        """Resume from every state that a crash can leave."""
        disk, last = Disk(self.tree), len(self.operations)
        for number in range(last + 1):
            if number:
                disk.apply(self.operations[number - 1])
            if number % self.every:
                continue
            operation = self.operations[max(number - 1, 0)]
            for power in (False, True):
                for tree in disk.list_states(power):
                    verdict = self._resume(tree, f"{'power' if power else 'dies'} after {number}", operation)
                    # Dying after N is dying before N + 1: both are counted, from one resumption.
                    kinds = ["power"] if power else ["after"] * (number > 0) + ["before"] * (number < last)
                    self.verdicts.update((kind, verdict) for kind in kinds)

    def fail(self, name):
        """Let each operation fail with an error of `ERRORS`, and resume."""
        for number in range(1, len(self.operations) + 1, self.every):
            recorder = Recorder(self._make_logs(), number, name)
            ended, error, tree = self._train(recorder)
            if ended == 0:
                found = read_end(kill.find_run(recorder.root))
                verdict = "equal" if found == self.expected else "the failure was not noticed"
            elif len(error.strip().splitlines()) != 1 or "Traceback" in error:
                verdict = f"ended with {ended}: {error[-300:]}"
            else:
                verdict = self._resume(tree, f"{name} in {number}", (recorder.failed,))
            if verdict not in RIGHT:
                self.report(f"{name} in {number}", verdict, (recorder.failed,))
            self.verdicts[name, verdict] += 1


def try_all(place, every=1, parts=PARTS, report=lambda *_: None, resumed=(False, True)):
    """Try the operations of a new run, and those of one that resumes it.

    Args:
        place: path of a folder for temporary files.
        every: int, tries every such operation only.
        parts: tuple of `PARTS`.
        report: see `Trial`.
        resumed: tuple of bools: False for the operations of the new run, True for those of the run that resumes it.

    Returns:
        Numbers of operations by kind, numbers of runs by kind of failure and verdict, number of different states.
    """
    logs = Path(place) / "logs"  # as in `Trial`: files name it
    logs.mkdir()
    recorder = Recorder(logs)
    code, error = train(*ARGUMENTS, f"--logs={logs}", recorder=recorder)
    if code:
        raise SystemExit(f"the undisturbed run ended with {code}: {error}")
    expected, known = read_end(kill.find_run(logs)), {}
    first = Trial(place, expected, {}, every, report, known)
    if list(map(repr, first.operations)) != list(map(repr, recorder.operations)):
        raise SystemExit("two equal runs wrote different files: replaying one of them says nothing of the other")
    middle = find_middle(first.operations)
    trials = [Trial(place, expected, middle, every, report, known) if later else first for later in resumed]
    for trial in trials:
        for part in parts:
            trial.crash() if part == "die" else trial.fail(part)
    kinds = Counter(kind for trial in trials for kind, *_ in trial.operations)
    return kinds, sum((trial.verdicts for trial in trials), Counter()), len(known)


def find_middle(operations):
    """Return the tree that is there when the first checkpoint has been written."""
    disk = Disk({})
    for operation in operations:
        disk.apply(operation)
        if operation[0] == "rename" and operation[2].endswith(".checkpoint"):
            break
    return disk.list_states(power=False)[0]


def try_part(later, part, every, verbose):
    """Try one part of one run, and print what is wrong; the function of a process of its own.

    Returns:
        As `try_all`, and the seconds of CPU.
    """

    def report(where, verdict, operation):
        if verdict not in RIGHT or verbose:
            print(f"{where} ({' '.join(map(str, operation[:3]))[:100]}): {verdict}", flush=True)

    with tempfile.TemporaryDirectory() as place:
        return *try_all(place, every, (part,), report, (later,)), time.process_time()


@entry_point("python -m benchmarks.crash_points")
def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="die: before, after and power; or one of the errors")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="try every Kth operation only")
    parser.add_argument("--verbose", action="store_true", help="print a line for each resumed run")
    options = parser.parse_args(arguments)
    begun, verdicts, states, spent = time.monotonic(), Counter(), 0, 0.0
    for later in (False, True):
        for part in (options.only,) if options.only else PARTS:
            # After some 500 trainings in one process, Python's garbage collection no longer ended.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                kinds, found, known, cpu = process.submit(
                    try_part, later, part, options.every, options.verbose
                ).result()
            verdicts, states, spent = verdicts + found, states + known, spent + cpu
        counts = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        print(f"{'resuming' if later else 'new'} run: {sum(kinds.values())} operations: {counts}", flush=True)
    for (kind, verdict), number in sorted(verdicts.items()):
        print(f"{kind:>7} {number:>5} {verdict:.160}")
    wrong = sum(number for (_, verdict), number in verdicts.items() if verdict not in RIGHT)
    print(
        f"{sum(verdicts.values())} runs ended by a failure, {states} folders resumed, {wrong} differences, "
        f"{spent:.0f} s of CPU, {time.monotonic() - begun:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    run_program(main)
