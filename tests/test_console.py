"""Standard streams and signals at every entry point: errors are always one line."""

import ast
import errno
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

import Model.console
from Training import console, devices
from Training.console import entry_point, format_count, format_duration
from Training.errors import Interrupted, RunError

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(os.name != "posix", reason="shells and signals are POSIX's")

SCRIPT = """
import sys, time
from Training import console
@console.entry_point("program", "Stopped early.", output_needed={needed})
def main():
{body}
console.run_program(main)
"""
LINES = "    for i in range(20_000): print('line', i)\n    open({path!r}, 'w').write('done')"
ENTRY_POINTS = ["training_cifar10", "predict", "page", "Model", *(f"Training.tools.{path.stem}" for path in
                sorted((ROOT / "Training" / "tools").glob("[a-z]*.py")))]  # fmt: skip


def run_shell(command, *arguments, **environment):
    """Run a bash command; `$PYTHON` is this interpreter, and the arguments are its `$1`, `$2` ..."""
    paths = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}", "bash", *arguments],
        env={**os.environ, **paths, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def make_script(body, needed=True):
    return SCRIPT.format(body=body, needed=needed)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_every_program_survives_streams_that_are_closed_or_full(name):
    """Test each program once; the tests below cover all cases for one program."""
    for arguments, code in (("--help >&- 2>&- <&-", 0), ("--no-such-flag 2>&-", 2), ("--help > /dev/full", None)):
        done = run_shell(f'"$PYTHON" -m {name} {arguments}')
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
        assert done.stderr.count("\n") <= 1 and (code is None or done.returncode == code)
    assert "the standard output cannot be written" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_every_benchmark_is_such_a_program(path):
    """Read, not run: each imports a framework."""
    if "argparse" in path.read_text():
        functions = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert [each.func.id for each in functions["main"].decorator_list] == ["entry_point"]
        assert path.read_text().endswith('if __name__ == "__main__":\n    run_program(main)\n')


@pytest.mark.parametrize("streams, said", [("| head -1", "Broken pipe"), ("> /dev/full", "No space left on device")])
def test_a_program_continues_without_a_reader_if_its_output_is_not_needed(streams, said, tmp_path):
    path = str(tmp_path / "done")
    done = run_shell(f'"$PYTHON" -c "$1" {streams}', make_script(LINES.format(path=path), needed=False))
    assert done.returncode == 0 and Path(path).read_text() == "done"
    assert done.stderr == f"program: the standard output cannot be written ({said}): the run continues without it\n"


@pytest.mark.parametrize(
    "streams, said",
    [
        ("| head -1", ""),
        ("> /dev/full", "program: error: the standard output cannot be written: No space left on device\n"),
    ],
)
def test_a_program_ends_without_a_reader_if_its_output_is_needed(streams, said, tmp_path):
    path = str(tmp_path / "done")
    done = run_shell(f'"$PYTHON" -c "$1" {streams}', make_script(LINES.format(path=path)))
    assert done.returncode == 1 and done.stderr == said and not Path(path).exists()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_stream(closed, tmp_path):
    path = str(tmp_path / "file")
    body = f"    file = open({path!r}, 'w')\n    import os; os.write(2, b'from C')\n    print('text')\n"
    body += "    print('more', file=sys.stderr)\n    file.write(str(file.fileno() > 2))"
    assert run_shell(f'"$PYTHON" -c "$1" {closed}', make_script(body)).returncode == 0
    assert Path(path).read_text() == "True"


@pytest.mark.parametrize("encoding, shown", [("ascii", r"\u7fd8"), ("cp1252", r"\u7fd8"), ("utf-8", "翘")])
def test_characters_outside_the_console_s_encoding_are_escaped(encoding, shown):
    body = "    print('翘')\n    print('翘', '\\udcff', file=sys.stderr)"
    done = run_shell('"$PYTHON" -c "$1"', make_script(body), PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert done.returncode == 0 and done.stdout == f"{shown}\n" and done.stderr.startswith(shown)


def test_a_reader_that_is_slow_loses_nothing():
    """A pipe that another program made non-blocking refuses text while it is full."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = subprocess.Popen(
        [sys.executable, "-c", make_script("    for i in range(30_000): print('line', i)")], stdout=writer,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(writer)
    time.sleep(0.5)
    with open(reader) as output:
        assert output.read().splitlines() == [f"line {i}" for i in range(30_000)]
    assert process.wait(20) == 0 and process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENAMETOOLONG, errno.EROFS, errno.EINTR])
def test_what_the_system_refuses_ends_a_program_in_one_line(number, capsys):
    @entry_point("program")
    def main():
        raise OSError(number, os.strerror(number), "a\nb")

    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err
    assert stop.value.code == 1 and os.strerror(number) in error and error.count("\n") == 1


@pytest.mark.parametrize("place", ["--model", "--csv", "--masks"])
def test_a_name_that_is_too_long_is_refused_in_one_line(place, capsys, tmp_path):
    import predict

    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        predict.main([str(tmp_path / "a.png"), "--model", str(tmp_path), place, "x" * 300])
    error = capsys.readouterr().err
    assert stop.value.code in (1, 2) and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    "content, said",
    [
        ('{"epsilon": 1}', "cannot be used as Keras' configuration"),
        ('{"floatx": "float8"}', "cannot be used as Keras' configuration"),
        ("[1, 2]", "cannot be used as Keras' configuration"),
        (None, "must be a regular file"),
    ],
)
def test_a_configuration_that_keras_cannot_read_is_named(tmp_path, content, said):
    """It is read before the backend is imported, so this is quick."""
    path = tmp_path / "keras.json"
    path.write_text(content) if content else os.mkfifo(path)
    for command in ('"$PYTHON" -m Model attention_56', '"$PYTHON" training_cifar10.py --dataset digits --logs "$1"'):
        done = run_shell(command, str(tmp_path / "logs"), KERAS_HOME=str(tmp_path))
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert str(path) in done.stderr and said in done.stderr


@pytest.mark.parametrize(
    "configured",
    [
        {"KERAS_MAX_EPOCHS": "many"},
        {"KERAS_MAX_STEPS_PER_EPOCH": "1", "KERAS_NNX_ENABLED": "true"},
        {"LC_ALL": "tr_TR.UTF-8"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)
def test_the_user_s_environment_changes_nothing(configured, tmp_path):
    """Of other projects: Keras itself ends in an error, or takes one step an epoch."""
    (tmp_path / "keras").mkdir()
    (tmp_path / "keras" / "__init__.py").write_text(
        "import os\nprint([name for name in os.environ if name.startswith('KERAS_MAX')], flush=True)\n"
        "os._exit(os.environ['KERAS_NNX_ENABLED'] != 'false')\n"
    )
    body = "    from Model.console import import_keras\n    print('I'.lower(), '\\u7fd8')\n    import_keras()"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run_shell('"$PYTHON" -uc "$1"', make_script(body), PYTHONPATH=path, **configured)
    own = [line for line in done.stderr.splitlines() if not line.startswith("bash: warning")]  # no such locale
    assert done.returncode == 0 and own == []
    assert done.stdout in ("i 翘\n[]\n", "i \\u7fd8\n[]\n")


# A signal just before a blocking call does not interrupt it: Python's handler runs after the call.
WAIT = "[time.sleep(0.05) for _ in range(600)]"


def start(body, before="", **environment):
    """Start a process with this `main`, and wait until it has printed its first line."""
    process = subprocess.Popen(
        [*before.split(), sys.executable, "-uc", make_script("    print('ready')\n" + body)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, cwd=ROOT, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_ends_a_program_in_one_line(number):
    process = start(f"    {WAIT}")
    process.send_signal(number)
    out, error = process.communicate(timeout=20)
    assert process.returncode == 128 + number and error == "Stopped early.\n" and out == ""


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_ends_the_table_of_a_network_in_one_line(number):
    """It has no part of `Training`."""
    code = (
        "import time, Model.__main__ as program; from Model.console import run_program; "
        f"program.print_networks = lambda _: (print('ready', flush=True), {WAIT}); run_program(program.main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("", "Stopped.\n") and process.returncode == 128 + number


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_during_the_start_of_a_framework_waits_for_its_end(number):
    body = (
        "    with console.hold_signals():\n        print('held')\n        time.sleep(0.5)\n        print('started')\n"
    )
    process = start(f"{body}    {WAIT}")
    assert process.stdout.readline() == "held\n"
    process.send_signal(number)
    out, error = process.communicate(timeout=20)
    assert process.returncode == 128 + number and error == "Stopped early.\n" and out == "started\n"


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_after_the_last_line_changes_nothing(number):
    body = "    import atexit; atexit.register(lambda: (print('leaving'), time.sleep(0.5)))"
    process = start(body)
    assert process.stdout.readline() == "leaving\n"
    process.send_signal(number)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 0 and error == ""


def test_nohup_stays_ignored():
    process = start("    time.sleep(0.5)\n    print('end')", before="nohup")
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and out == "end\n"


def test_in_a_notebook_streams_and_handlers_are_restored(capsys):
    before = [signal.getsignal(number) for number in NUMBERS], sys.stdout, sys.stderr

    @entry_point("program")
    def main(text):
        """About it."""
        print(text)
        assert signal.getsignal(signal.SIGTERM) is Model.console._raise_stopped
        return 3

    assert main("翘") == 3 and main.__name__ == "main" and main.__doc__ == "About it."
    assert ([signal.getsignal(number) for number in NUMBERS], sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "翘\n"


def test_other_handlers_are_left_alone():
    kept = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with console.catch_signals():
            assert signal.getsignal(signal.SIGTERM) is not Model.console._raise_stopped
    finally:
        signal.signal(signal.SIGTERM, kept)


def test_one_of_a_thing_is_no_plural(monkeypatch):
    texts = [format_count(*each) for each in ((0, "epoch"), (1, "class"), (2, "class"), (1234, "picture"))]
    assert texts == ["0 epochs", "1 class", "2 classes", "1,234 pictures"]
    monkeypatch.setattr(devices, "count_cores", lambda: 1)
    monkeypatch.setattr(devices, "find_accelerator", lambda: None)
    assert devices.device_name().endswith(", 1 core")


def test_durations_are_formatted():
    assert [format_duration(s) for s in (4.2, 99, 720, 12_000)] == ["4 s", "99 s", "12 min", "3 h 20 min"]


def test_nothing_that_an_interrupted_function_holds_outlives_the_message(capsys):
    """TensorFlow prints warnings about iterators that are alive when Python ends."""

    class Iterator:
        pass

    alive = []

    def stop():
        raise Interrupted(signal.SIGTERM)

    def train():
        iterator = Iterator()
        iterator.generator = iterator  # a cycle, as in Keras
        alive.append(weakref.ref(iterator))
        stop()

    def fit():
        """Remove the frame of `train` from the traceback, as Keras does with its own."""
        try:
            train()
        except Interrupted as error:
            raise error.with_traceback(error.__traceback__.tb_next.tb_next) from None

    with pytest.raises(SystemExit) as error, console.report_how_to_resume("Logs/run"):
        fit()
    assert error.value.code == 143 and alive[0]() is None
    assert capsys.readouterr().err.startswith("Stopped by SIGTERM, everything is saved.")


def test_a_signal_in_a_finalizer_is_not_lost():
    """And it interrupts the call that the program waits in, as any signal does."""

    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Model.console.Stopped) as stopped, console.catch_signals():
        Finalized()
        begin = time.monotonic()
        time.sleep(5)
    assert time.monotonic() - begin < 4
    assert stopped.value.exit_code == 143 and sys.unraisablehook is not Model.console._repeat_lost_signal


def test_a_run_that_cannot_continue_is_one_line_in_every_program(capsys):
    @entry_point("tool")
    def main():
        raise RunError("no more pictures of a class can be read")

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert capsys.readouterr().err == "tool: error: no more pictures of a class can be read\n"
