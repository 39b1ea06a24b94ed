"""The recipe: all hyper-parameters, and one line for every impossible value."""

import dataclasses
import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import convolutions, networks, operations, primitives
from benchmarks.throughput import make_recipe as make_throughput_recipe
from Training import devices
from Training.errors import InputError
from Training.flags import parse
from Training.recipe import AUGMENTATIONS, OPTIMIZERS, RECIPES, Recipe
from Training.tools import figures

ROOT = Path(__file__).parent.parent


def expect_refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        parse(list(arguments), "")
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_defaults_train_attention_56_on_cifar10():
    recipe, resume = parse([], "")
    assert (recipe.dataset, recipe.model, recipe.learning) == ("cifar10", "attention_56", "arl")
    assert (recipe.augmentation, recipe.validation_split, resume) == ("affine", 0.1, None)


def test_every_field_has_a_flag_a_help_and_a_reader(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], "")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    sources = [ROOT / "training_cifar10.py", *(ROOT / "Training").rglob("*.py")]
    readers = "\n".join(path.read_text() for path in sources if path.name != "recipe.py")
    by_table = {name for row in (*OPTIMIZERS.values(), *AUGMENTATIONS.values()) for name in row.fields}
    for item in dataclasses.fields(Recipe):
        assert "--" + item.name.replace("_", "-") in text
        assert item.metadata["help"]
        read = item.name in by_table or re.search(rf"recipe\.{item.name}\b", readers)
        assert read, f"nothing reads {item.name}"


def test_flags_override_a_named_recipe_in_any_order():
    assert parse(["--recipe", "paper"], "")[0] == Recipe(**RECIPES["paper"])
    for arguments in (["--recipe", "paper", "--epochs", "7"], ["--epochs", "7", "--recipe", "paper"]):
        recipe, _ = parse(arguments, "")
        assert recipe.epochs == 7 and recipe.schedule == "step"
    assert parse(["--jit"], "")[0].jit is True
    assert parse(["--flip", "false"], "")[0].flip is False


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_are_possible_and_round_trip(name):
    recipe = Recipe(**RECIPES[name])
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_a_default_warmup_is_shortened_to_fit():
    for arguments, warmup in (
        (["--epochs", "1"], 0.5),
        (["--epochs", "6"], 5.0),
        (["--recipe", "race", "--epochs", "3"], 1.5),
        (["--recipe", "quick", "--epochs", "1"], 0.5),
        (["--schedule", "step"], 0.0),
        (["--recipe", "paper", "--epochs", "1"], 0.0),
    ):
        assert parse(arguments, "")[0].warmup_epochs == warmup


def test_a_given_warmup_is_never_changed(capsys):
    for arguments in (["--epochs", "1", "--warmup-epochs", "1"], ["--epochs", "3", "--warmup-epochs", "5"]):
        assert "warmup_epochs must be less than epochs" in expect_refusal(capsys, *arguments)


def test_a_home_directory_is_expanded_after_an_equals_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe, resume = parse(["--data-dir=~/data", "--logs=~", "--weights", "a~b"], "")
    assert (recipe.data_dir, recipe.logs, recipe.weights) == (f"{tmp_path}/data", str(tmp_path), "a~b")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(Recipe().to_json())
    assert parse(["--resume=~/run"], "") == (Recipe(), f"{tmp_path}/run")
    assert figures.parse(["masks", "cifar10", "--output=~/m.png"]).output == f"{tmp_path}/m.png"


def test_folders_may_change_on_resuming_and_hyper_parameters_may_not(capsys, tmp_path):
    (tmp_path / "recipe.json").write_text(Recipe(dataset="folder", data_dir="here").to_json())
    moved = ["--data-dir", "there", "--cache", "fast", "--workers", "3", "--logs", "elsewhere"]
    recipe, _ = parse(["--resume", str(tmp_path), *moved], "")
    assert (recipe.data_dir, recipe.cache, recipe.workers, recipe.logs) == ("there", "fast", 3, "elsewhere")
    for change in (["--seed", "1"], ["--image-size", "9"], ["--broken", "refuse"], ["--shards-at-once", "2"]):
        assert "--resume uses the recipe of the run" in expect_refusal(capsys, "--resume", str(tmp_path), *change)


@pytest.mark.parametrize("augmentation", ["crop", "none"])
def test_recipe_of_the_throughput_benchmark_is_possible(augmentation):
    recipe = make_throughput_recipe(256, "float32", augmentation, 100)
    assert (recipe.batch_size, recipe.precision, recipe.augmentation) == (256, "float32", augmentation)
    assert recipe.steps_per_execution == 100
    assert bool(recipe.cutout) == (augmentation == "crop")


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), True, "0.1", [0.1], {}, None, float("nan"), float("-inf"), 2**53]
)
@pytest.mark.parametrize("name", ["learning_rate", "epochs", "seed"])
def test_a_number_that_others_wrote_is_of_its_type_and_in_its_range(name, value):
    """A whole number for a float is taken, up to where floats are exact."""
    text = json.dumps({**json.loads(Recipe().to_json()), name: value})
    with pytest.raises(InputError, match=f"{name} must be") as refusal:
        Recipe.from_json(text)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 200
    assert Recipe.from_json(json.dumps({**json.loads(Recipe().to_json()), "learning_rate": 1})).learning_rate == 1


def test_paper_recipe_is_the_paper_s():
    recipe = Recipe(**RECIPES["paper"])
    assert (recipe.optimizer, recipe.momentum, recipe.learning_rate, recipe.batch_size) == ("sgd", 0.9, 0.1, 64)
    assert (recipe.weight_decay, recipe.weight_decay_kind, recipe.decay_all) == (1e-4, "l2", True)
    assert (recipe.schedule, recipe.augmentation, recipe.validation_split) == ("step", "crop", 0.0)
    assert recipe.epochs == round(160_000 * 64 / 50_000)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--learning-rat", "1"], "unknown argument '--learning-rat', did you mean --learning-rate?"),
        (["--epoch", "3"], "did you mean --epochs?"),
        (["extra"], "unknown argument 'extra'"),
        (["--epochs", "0"], "epochs must be 1 or more, received 0"),
        (["--epochs", "ten"], "invalid int value: 'ten'"),
        (["--learning-rate", "nan"], "learning_rate must be finite, received nan"),
        (["--dropout", "1"], "dropout must be 0.99 or less, received 1.0"),
        (["--validation-split", "-0.1"], "validation_split must be 0.0 or more"),
        (["--optimizer", "newton"], "invalid choice: 'newton'"),
        (["--flip", "maybe"], "must be true or false, received 'maybe'"),
        (["--alternate-flip", "--flip", "false"], "give --flip true and --augmentation affine or crop"),
        (["--alternate-flip", "--dataset", "folder"], "alternate_flip is for images held in memory"),
        (["--optimizer", "adamw", "--weight-decay-kind", "l2"], "give --weight-decay-kind decoupled"),
        (["--accumulate", "2", "--distribute", "mirrored"], "accumulate=2 cannot be combined with distribute=mirrored"),
        (["--mix-until", "0.5"], "mix_until=0.5 needs --mix mixup or cutmix"),
        (["--schedule", "step", "--warmup-epochs", "5"], "give --warmup-epochs 0"),
        (["--warmup-epochs", "200"], "warmup_epochs must be less than epochs=200"),
        (
            ["--schedule", "plateau", "--warmup-epochs", "0", "--validation-split", "0"],
            "schedule=plateau and patience need a validation loss",
        ),
        (["--recipe", "fast"], "invalid choice: 'fast'"),
        (["--resume", ""], "--resume needs a run's folder, received ''"),
        (["--resume", "nowhere"], "nowhere/recipe.json cannot be read: No such file or directory"),
    ],
)
def test_impossible_arguments_are_refused_in_one_line(capsys, arguments, said):
    assert said in expect_refusal(capsys, *arguments)


def test_resume_takes_the_folder_s_recipe(capsys, tmp_path):
    recipe = Recipe(epochs=9, seed=4)
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert parse(["--resume", str(tmp_path)], "") == (recipe, str(tmp_path))
    longer, _ = parse(["--resume", str(tmp_path), "--epochs", "12"], "")
    assert longer == dataclasses.replace(recipe, epochs=12)
    assert "can only add epochs" in expect_refusal(capsys, "--resume", str(tmp_path), "--epochs", "8")
    assert parse(["--resume", str(tmp_path), "--seed", "4"], "")[0] == recipe
    message = expect_refusal(capsys, "--resume", str(tmp_path), "--batch-size", "8", "--seed", "5")
    assert "differs in seed (run: 4, given: 5)" in message or "batch_size (run: 64, given: 8)" in message
    assert "rotation (run: 15.0, given: 5.0)" in expect_refusal(capsys, "--resume", str(tmp_path), "--recipe", "quick")


@pytest.mark.parametrize(
    "command",
    [
        "--recipe quick --epochs 1",
        "--precision auto --epochs 3",
        "--recipe race --distribute mirrored",
        "--recipe paper --schedule constant",
    ],
)
def test_resume_accepts_the_command_of_the_run(command, tmp_path):
    """What `recipe.json` has was resolved when the run began: a shortened warm-up, the precision, options left out."""
    recipe = devices.drop_unsupported(parse(command.split(), "")[0], lambda *_: None)
    recipe = dataclasses.replace(recipe, precision="mixed_bfloat16" if recipe.precision == "auto" else recipe.precision)
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert parse([*command.split(), "--resume", str(tmp_path)], "") == (recipe, str(tmp_path))
    longer, _ = parse([*command.split(), "--epochs", "1000", "--resume", str(tmp_path)], "")
    assert longer == dataclasses.replace(recipe, epochs=1000)


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object, received list"),
        ('{"epohs": 3}', "unknown fields: epohs"),
        ('{"epochs": "3"}', "epochs must be of type int, received '3'"),
        ('{"epochs": true}', "epochs must be of type int, received True"),
        ('{"learning_rate": NaN}', "learning_rate must be finite"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_recipe_files_are_refused(text, said):
    with pytest.raises(InputError, match=said):
        Recipe.from_json(text)


def test_json_has_one_field_per_line():
    fields = json.loads(Recipe().to_json())
    assert list(fields) == [item.name for item in dataclasses.fields(Recipe)]


@pytest.mark.parametrize("benchmark", [convolutions, networks, operations])
def test_benchmarks_refuse_in_one_line(benchmark, capsys):
    for argument in ("--nonsense", "attention_57"):
        with pytest.raises(SystemExit) as stop:
            benchmark.main([argument])
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and repr(argument) in err


def test_the_gpu_script_names_its_parts():
    run = subprocess.run(["bash", ROOT / "benchmarks" / "gpu.sh"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == "usage: benchmarks/gpu.sh throughput|race|best|best-92|all [DATA_DIR] [LOGS] [FLAG...]\n"


def test_groups_of_flags_begin_with_fields_in_their_order():
    from Training.flags import GROUPS, OWN_METAVARS

    names = [item.name for item in dataclasses.fields(Recipe)]
    assert [name for name in names if name in GROUPS] == list(GROUPS) and names[0] in GROUPS
    assert set(OWN_METAVARS) <= set(names)


def test_primitives_are_summed_with_their_operations():
    line = "onednn_verbose,v1,primitive,exec,cpu,{},jit,{},src:bf16::blocked:acdb::f0,,alg:any,{},{}"
    conv = "mb8_ic3oc32_ih32oh16kh5sh2dh0ph2_iw32ow16kw5sw2dw0pw2"
    log = [line.format("convolution", "forward_training", conv, 0.5), "a line of the program",
           line.format("convolution", "forward_training", conv, 0.25), line.format("reorder", "undef", "32x3x5x5", 0.1),
           line.format("matmul", "undef", "1x4x2:8x2x256", 1)]  # fmt: skip
    work = 2 * 8 * 3 * 32 * 16 * 16 * 5 * 5
    assert primitives.sum_primitives(log) == {
        "convolution, forward": [2, 0.75, 2 * work], "reorder": [1, 0.1, 0], "matmul": [1, 1.0, 2 * 8 * 4 * 2 * 256],
    }  # fmt: skip
    rows = primitives.make_rows({"now": primitives.sum_primitives(log), "before": {"reorder": [3, 2.0, 0]}})
    assert rows[2] == "| matmul | 1 | 1.0 | 0 |  |  |  |" and rows[4] == "| reorder | 1 | 0.1 |  | 3 | 2.0 |  |"
    with pytest.raises(SystemExit):
        primitives.main(["--batch-size", "0"])
