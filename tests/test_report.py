"""Tables of runs with published errors, experiments and figures; no network is trained here."""

import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from tests.support import arithmetic
from tests.support.tiny import tiny_network
from Training.errors import InputError
from Training.flags import parse
from Training.recipe import OPTIMIZERS, Recipe
from Training.runs import history
from Training.tools import experiments, figures, report
from Training.visual.published import PUBLISHED, find_published

ROOT = Path(__file__).resolve().parent.parent


def write_run(folder, error=10.0, finished=True, seconds=60.0, **fields):
    """Write the files of a run that the report reads."""
    folder.mkdir(parents=True)
    recipe = Recipe(**fields)
    (folder / "recipe.json").write_text(recipe.to_json())
    (folder / "history.csv").write_text("epoch,loss,accuracy,val_accuracy\n0,2.0,0.3,0.2\n1,1.0,0.6,0.5\n")
    result = {
        "test_error_percent": error, "validation_error_percent": error + 1, "train_error_percent": None,
        "running_time_s": seconds, "parameters": 1_045_242, "images_per_s": 100.4,
    }  # fmt: skip
    if finished:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def read_csv(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_seeds_are_one_row_with_mean_and_spread(tmp_path, capsys):
    for seed, error in enumerate((5.0, 6.0, 7.0)):
        write_run(tmp_path / f"a{seed}", error, seed=seed)
    write_run(tmp_path / "b", 9.0, learning="nal")
    report.main([str(tmp_path), "--format", "csv", "--curves", str(tmp_path / "curves.png")])
    arl, nal = read_csv(capsys.readouterr().out)
    assert (arl["learning"], arl["runs"], arl["test error %"]) == ("ARL", "3", "6.00 ± 1.00")
    assert (nal["learning"], nal["runs"], nal["test error %"]) == ("NAL", "1", "9.00")
    assert arl["validation error %"] == "7.00 ± 1.00" and arl["train error %"] == "-"
    assert arl["time"] == "60 s" and arl["parameters"] == "1,045,242"
    assert "5.52 (paper)" in arl["published"] and "9.03 (reference)" in nal["published"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_columns_show_the_values_of_a_field_side_by_side(tmp_path, capsys):
    for model in ("attention_56", "attention_92"):
        for learning, error in (("arl", 5.0), ("nal", 6.5)):
            write_run(tmp_path / model / learning, error, model=model, learning=learning)
    report.main([str(tmp_path), "--columns", "learning", "--format", "markdown"])
    text = capsys.readouterr().out
    assert "| Attention-56 | 5.00 | 6.50 | 5.52 (paper), 5.28 (reference) | 5.89 (paper), 9.03 (reference) |" in text
    assert "arXiv 1704.06904" in text


def test_a_repeat_of_a_seed_is_not_a_sample(tmp_path, capsys):
    for name, seed, error in (("a", 0, 5.0), ("b", 0, 5.0), ("c", 1, 7.0), ("d", 1, 7.4)):
        write_run(tmp_path / name, error, seed=seed)
    report.main([str(tmp_path), "--format", "csv"])
    (row,) = read_csv(capsys.readouterr().out)
    assert (row["runs"], row["test error %"]) == ("2 (+2 repeats)", "6.10 ± 1.56")
    report.main([str(tmp_path / "a"), str(tmp_path / "b"), "--format", "csv"])
    (row,) = read_csv(capsys.readouterr().out)
    assert (row["runs"], row["test error %"], row["images/s"]) == ("1 (+1 repeat)", "5.00", "100")


def test_columns_of_a_field_without_differences_print_the_table_and_a_note(tmp_path, capsys):
    write_run(tmp_path / "a")
    curves = tmp_path / "curves.png"
    arguments = ["--columns", "learning", "--format", "markdown", "--curves", str(curves)]
    report.main([str(tmp_path), *arguments])
    out, err = capsys.readouterr()
    assert "| Attention-56 | ARL | 1 | 10.00 |" in out and curves.exists()
    assert err.splitlines() == [
        f"{report.PROGRAM}: --columns learning: the runs do not differ in it; this is the table of runs",
        f"{report.PROGRAM}: {curves} written",
    ]


HOSTILE = "a|b\n\x1b[2J<script>alert(1)</script>"


@pytest.mark.parametrize("name", [HOSTILE, "=cmd|' /C calc'!A0", "@SUM(1+1)", "x" * 5000, "翘头剪", ["a", 1], {"b": 2}])
def test_names_from_outside_are_escaped_in_every_format(tmp_path, capsys, name):
    """A recipe may have been edited: values that the report does not refuse stay in one cell of one line."""
    run = write_run(tmp_path / "run")
    fields = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({**fields, "model": name, "dataset": name}))
    for form in report.FORMATS:
        curves = ["--curves", str(tmp_path / "curves.png")] if form == "markdown" else []  # the same in every format
        try:
            report.main([str(tmp_path), "--format", form, *curves])
        except SystemExit as stop:
            assert stop.code == 2 and capsys.readouterr().err.count("\n") == 1
            continue
        out = capsys.readouterr().out
        assert out.count("\n") == (3 if form == "markdown" else 2)
        assert (
            all(line.isprintable() for line in out.splitlines())
            and "<script>" not in out.replace('"', "")
            or form != "markdown"
        )
        if form == "markdown":
            assert {line.count("|") for line in out.splitlines()} == {12}
        if form == "csv":
            (row,) = csv.DictReader(io.StringIO(out))
            assert row["dataset"][0] not in "=+-@"
        else:
            assert max(map(len, out.splitlines())) < 600


def wrong_results():
    good = {"test_error_percent": 5.0, "running_time_s": 60.0, "parameters": 1000}
    for value in ([1, 2], "5", True, float("nan"), float("inf"), -1.0, 10**400, {"a": 1}):
        for name in good:
            yield {**good, name: value}
    yield from ([], "text", 5, None)


@pytest.mark.parametrize("result", list(wrong_results()), ids=lambda result: f"{result!s:.60}")
def test_an_invalid_result_is_refused_in_one_line(tmp_path, capsys, result):
    broken(tmp_path / "run", json.dumps(result))
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path)])
    out, error = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and error.count("\n") == 1 and len(error) < 500


def test_a_legend_names_the_differences_or_the_row(tmp_path):
    write_run(tmp_path / "a", optimizer="adam", learning_rate=0.1, dropout=0.1)
    write_run(tmp_path / "b", optimizer="sgd", dropout=0.2)
    assert sorted(report.label_groups(report.group_runs(history.find([tmp_path])[0]))) == [
        "Attention-56, dropout=0.1, optimizer=adam",
        "Attention-56, dropout=0.2, optimizer=sgd",
    ]
    write_run(tmp_path / "c", batch_size=32, epochs=7)
    assert report.label_groups(report.group_runs(history.find([tmp_path])[0])) == ["row 1", "row 2", "row 3"]


def test_only_compared_fields_are_shown(tmp_path):
    write_run(tmp_path / "a", optimizer="adam", logs="x", seed=1)
    write_run(tmp_path / "b", optimizer="sgd", logs="y", seed=2)
    header = report.make_run_table(report.group_runs(history.find([tmp_path])[0]))[0]
    assert "optimizer" in header and not {"logs", "seed", "epochs"} & set(header)


def test_unfinished_runs_are_named_and_give_an_exit_code(tmp_path, capsys):
    write_run(tmp_path / "a")
    write_run(tmp_path / "late", finished=False)
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path)])
    assert stopped.value.code == 1
    out, error = capsys.readouterr()
    assert "Attention-56" in out and "late" in error and error.count("\n") == 1


def broken(folder, result="{}"):
    write_run(folder)
    (folder / "result.json").write_text(result)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda folder: None, "is not a directory"),
        (lambda folder: folder.mkdir(), "contains no run"),
        (lambda folder: write_run(folder, finished=False), "no finished run"),
        (broken, "is not a finished run"),
        (lambda folder: broken(folder, '{"test_error_percent": 5}'), "is not a finished run: "),
    ],
)
def test_folders_that_are_not_runs_are_refused_in_one_line(tmp_path, capsys, make, said):
    make(tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1


def test_published_errors_are_for_networks_that_exist():
    for each in PUBLISHED:
        recipe = Recipe(**{name: getattr(each, name) for name in each._fields if name not in ("source", "error")})
        assert each in find_published(json.loads(recipe.to_json()))


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_the_runs_of_every_experiment_are_valid_and_different(name):
    for quick in (False, True):
        planned = experiments.plan_recipes(name, quick, seeds=2)
        assert len(set(planned)) == len(planned) >= 4
        compared = {json.dumps(recipe.to_json()) for recipe in planned if recipe.seed == 0}
        assert len(compared) == len(planned) / 2


def test_architectures_are_trained_with_equal_multiply_adds():
    for quick in (False, True):
        planned = experiments.plan_recipes("architectures", quick)
        spent = [recipe.epochs * experiments.COSTS[recipe.model, recipe.geometry] for recipe in planned]
        least = min(recipe.epochs for recipe in planned)
        assert len({(recipe.model, recipe.geometry) for recipe in planned}) == len(planned) >= 5
        assert max(spent) / min(spent) < 1 + 2 / least  # epochs are whole numbers


def test_costs_are_the_multiply_adds_of_the_networks():
    for (name, geometry), millions in experiments.COSTS.items():
        assert millions == round(arithmetic.count(name, geometry)["multiply_adds"] / 1e6, 1)


def test_every_optimizer_is_compared():
    assert {recipe.optimizer for recipe in experiments.plan_recipes("optimizers", True)} == set(OPTIMIZERS)


def test_commands_reproduce_the_recipe():
    from Training.flags import parse

    for name in experiments.EXPERIMENTS:
        for recipe in experiments.plan_recipes(name, quick=True, logs="somewhere", data_dir="here"):
            assert parse(experiments.make_command(recipe)[2:], "")[0] == recipe


def test_experiments_skip_finished_runs_resume_others_and_report(tmp_path, monkeypatch, capsys):
    """Processes are replaced by functions that write their files."""
    ran = []

    def trained(command):
        ran.append(command)
        resumed = "--resume" in command
        recipe = experiments.plan_recipes("mask", True, logs=str(logs), epochs=2)[len(ran) == 3]
        fields = json.loads(recipe.to_json())
        if not resumed:
            write_run(logs / f"run{len(ran)}", finished=len(ran) != 1, **fields)
        else:
            other = write_run(tmp_path / "finished", **fields)
            (logs / "run1" / "result.json").write_bytes((other / "result.json").read_bytes())
        return 130 if len(ran) == 1 else 0

    logs = tmp_path / "mask-quick"
    monkeypatch.setattr(experiments, "run_command", trained)
    arguments = ["mask", "--quick", "--epochs", "2", "--logs", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        experiments.main(arguments)
    assert stopped.value.code == 130 and "the same command continues" in capsys.readouterr().err
    experiments.main(arguments)
    assert ran[1][-2:] == ["--resume", str(logs / "run1")] and len(ran) == 3
    experiments.main(arguments)
    assert len(ran) == 3
    assert "Attention-56" in capsys.readouterr().out
    assert {"report.md", "report.csv", "curves.png"} <= {path.name for path in logs.iterdir()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_experiment_waits_until_its_run_has_saved_itself(tmp_path, number):
    """The run takes a second to save itself. As with Ctrl-C, both processes receive SIGINT."""
    run = """
import pathlib, signal, sys, time
def save(number, _):
    time.sleep(1)
    pathlib.Path("saved").touch()
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, save)
print("ready", flush=True)
while True:  # a signal just before a long sleep does not interrupt it
    time.sleep(0.05)
"""
    arguments = ["mask", "--quick", "--logs", str(tmp_path)]
    script = (
        "import sys; from Training.tools import experiments; "
        f"experiments.make_command = lambda *_: [sys.executable, '-c', {run!r}]; experiments.main({arguments!r})"
    )
    experiment = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert any(line == "ready\n" for line in experiment.stdout)
    (os.killpg if number == signal.SIGINT else os.kill)(experiment.pid, number)
    _, err = experiment.communicate(timeout=30)
    assert experiment.returncode == 128 + number and (tmp_path / "saved").exists()
    assert err.count("\n") == 1 and "the same command continues there" in err


def test_the_table_says_what_its_time_leaves_out(tmp_path):
    write_run(tmp_path / "run")
    rows = report.make_run_table(report.group_runs([history.read_run(tmp_path / "run")]))
    for text in (report.format_console(rows), report.format_markdown(rows)):
        assert text.count("starting, reading the data and the final test are left out") == 1
    assert "left out" not in report.format_csv(rows) + report.format_markdown([["field"], ["epochs"]])


def test_a_finished_run_of_an_older_recipe_is_not_trained_again(tmp_path):
    recipe = experiments.plan_recipes("mask", True, logs=str(tmp_path))[0]
    run = write_run(tmp_path / "old", **json.loads(recipe.to_json()))
    older = {name: value for name, value in json.loads(recipe.to_json()).items() if name != "alternate_flip"}
    (run / "recipe.json").write_text(json.dumps(older))
    assert experiments.find_run(tmp_path, recipe) == run


def test_an_experiment_resumes_its_run_where_the_data_is_now(tmp_path):
    planned = experiments.plan_recipes("mask", True, logs=str(tmp_path), data_dir="old")[0]
    run = write_run(tmp_path / "run", finished=False, **json.loads(planned.to_json()))
    moved = dataclasses.replace(planned, data_dir="--new", mistakes=3)
    assert experiments.find_run(tmp_path, moved) == run
    words = experiments.make_command(moved, run)[2:]
    assert words == ["--resume", str(run), "--data-dir=--new", "--mistakes=3"]
    assert parse(words, "") == (moved, str(run))
    assert experiments.find_run(tmp_path, dataclasses.replace(planned, epochs=7)) is None


def test_confusion_figure_of_a_run(tmp_path, capsys):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "predictions.csv").write_text("index,label,predicted\n0,0,0\n1,1,0\n")
    (tmp_path / "run" / "classes.json").write_text('["cat", "dog", "fox"]')  # the last never occurs
    figures.main(["confusion", str(tmp_path / "run"), "--output", str(tmp_path / "c.png")])
    assert (tmp_path / "c.png").exists() and "written" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [10**9, 2000, 10**4000])
def test_a_class_beyond_the_limit_is_refused_before_memory_is_allocated(tmp_path, capsys, wrong):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "predictions.csv").write_text(f"index,label,predicted\n0,0,{wrong}\n")
    with pytest.raises(SystemExit) as stopped:
        figures.main(["confusion", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "a confusion matrix has at most 2,000" in error and error.count("\n") == 1


def test_figures_stay_in_the_run_s_folder_and_overwrite_nothing_silently(tmp_path, monkeypatch, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run = write_run(tmp_path / "run")
    (run / "predictions.csv").write_text("index,label,predicted\n0,0,0\n1,1,0\n")
    for name in ("confusion.png", "confusion-2.png"):
        figures.main(["confusion", str(run)])
        assert capsys.readouterr().out == f"{run / name} written\n"
    figures.main(["confusion", str(run), "--output", str(run / "confusion.png")])
    assert capsys.readouterr().out == f"{run / 'confusion.png'} replaced\n"
    assert list(elsewhere.iterdir()) == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs for which no figure can be drawn."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("run", "empty", "header", "negative", "linear", "latin"):
        write_run(folder / name)
    (folder / "empty" / "predictions.csv").touch()
    (folder / "header" / "predictions.csv").write_text("index,label,predicted\n")
    (folder / "negative" / "predictions.csv").write_text("index,label,predicted\n0,-1,-1\n")
    images = keras.Input((8, 8, 3))
    outputs = keras.layers.Dense(3, "softmax")(keras.layers.Flatten()(images))
    keras.Model(images, outputs).save(folder / "linear" / "last.keras")
    tiny_network().save(folder / "latin" / "last.keras")
    (folder / "latin" / "recipe.json").write_bytes(b'{"data_dir": "caf\xe9"}')
    return folder


def test_responses_of_runs_with_equal_names_are_different_lines(tmp_path):
    networks = []
    for place in ("a", "b"):
        networks.append([SimpleNamespace(learning="arl")])
        run = write_run(tmp_path / place / "run")
        (run / "last.keras").touch()
    one, two = (tmp_path / place / "run" for place in "ab")
    (tmp_path / "c").mkdir()
    for name in ("recipe.json", "last.keras"):
        (tmp_path / "c" / name).write_bytes((one / name).read_bytes())
    assert figures.label_runs([one, two], networks) == [
        f"Attention-56, ARL, run, {path / 'last.keras'}" for path in (one, two)
    ]
    assert figures.label_runs([one, tmp_path / "c"], networks) == ["Attention-56, ARL, run", "Attention-56, ARL, c"]
    with pytest.raises(InputError, match="each run must be given once"):
        figures.label_runs([one, one], networks)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["confusion", "nowhere"], "does not exist: the folder of a finished run is needed"),
        (["confusion", "run"], "does not exist: the run is finished, but has no such file"),
        (["confusion", "empty"], "must have a row with label and predicted for each image"),
        (["confusion", "negative"], "must have a row with label and predicted for each image"),
        (["confusion", "header"], "must have a row with label and predicted for each image"),
        (["masks", "linear"], "last.keras has no attention blocks"),
        (["channels", "linear"], "last.keras has no attention blocks"),
        (["masks", "latin"], "recipe.json must be UTF-8 text"),
        (["masks", "nowhere"], "does not exist"),
        (["masks", "nowhere", "--count", "0"], "--count must be"),
        (["nothing"], "invalid choice"),
    ],
)
def test_figures_refuse_in_one_line(runs, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(runs)
    with pytest.raises(SystemExit) as stopped:
        figures.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_histories_are_read_as_numbers(tmp_path):
    folder = write_run(tmp_path / "run")
    np.testing.assert_array_equal(history.read_history(folder / "history.csv")["loss"], [2.0, 1.0])
