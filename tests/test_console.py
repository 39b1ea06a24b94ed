"""Standard streams and signals at every entry point: errors are always one line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from Training import console
from Training.console import entry_point, format_duration

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
ENTRY_POINTS = ["training_cifar10", "predict", "Model", *(f"Training.tools.{path.stem}" for path in
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
    if name != "Model":  # argparse hides the error there
        assert "the standard output cannot be written" in done.stderr


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
    process = start("    time.sleep(30)")
    process.send_signal(number)
    out, error = process.communicate(timeout=20)
    assert process.returncode == 128 + number and error == "Stopped early.\n" and out == ""


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_during_the_start_of_a_framework_waits_for_its_end(number):
    body = (
        "    with console.hold_signals():\n        print('held')\n        time.sleep(0.5)\n        print('started')\n"
    )
    process = start(body + "    time.sleep(30)")
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
        assert signal.getsignal(signal.SIGTERM) is console._raise_stopped
        return 3

    assert main("翘") == 3 and main.__name__ == "main" and main.__doc__ == "About it."
    assert ([signal.getsignal(number) for number in NUMBERS], sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "翘\n"


def test_other_handlers_are_left_alone():
    kept = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with console.catch_signals():
            assert signal.getsignal(signal.SIGTERM) is not console._raise_stopped
    finally:
        signal.signal(signal.SIGTERM, kept)


def test_durations_are_formatted():
    assert [format_duration(s) for s in (4.2, 99, 720, 12_000)] == ["4 s", "99 s", "12 min", "3 h 20 min"]
