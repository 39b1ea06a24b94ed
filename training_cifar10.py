"""Train a Residual Attention Network: Attention-56 on CIFAR-10 unless a flag says otherwise."""

import os
from pathlib import Path

from Training import devices
from Training.console import (
    PROGRAM,
    entry_point,
    format_count,
    report_errors,
    report_how_to_resume,
    run_program,
    start_keras,
    warn,
)
from Training.errors import InputError, format_os_error, format_path
from Training.flags import parse
from Training.recipe import is_streamed, label_run


def build(recipe, data):
    """Return the recipe's network for this data, from raw images to class probabilities."""
    from Model import network
    from Model.preprocessing import mean_subtraction

    try:
        return network(
            recipe.model,
            geometry=recipe.geometry,
            learning=recipe.learning,
            attention=recipe.attention,
            mask=recipe.mask,
            p=recipe.p or None,  # 0 stands for the default of the depth
            t=recipe.t or None,
            r=recipe.r or None,
            classes=len(data.classes),
            input_shape=data.train.images.shape[1:],
            dropout=recipe.dropout,
            classifier_l2=recipe.classifier_l2,
            preprocessing=mean_subtraction(*data.mean_and_std(recipe.mean)),
        )
    except ValueError as error:  # a depth that is impossible with p and t, or images too small for the masks
        raise InputError(str(error)) from None


def read(recipe):
    """Return the recipe's data, and print notes about streamed pictures."""
    from Training.data.datasets import describe_streams, load_for_recipe

    data = load_for_recipe(recipe)
    if is_streamed(recipe.dataset):
        print("\n".join(describe_streams(data)), flush=True)
    return data


def train(recipe, resume=None, build=build):
    """Train one recipe, from its data to its result.

    Args:
        recipe: `recipe.Recipe`.
        resume: folder of the run to resume, or None for a new run.
        build: function of `(recipe, data)` that returns the network.

    Returns:
        `(folder, result)`: the run's folder and the content of its `result.json`.
    """
    recipe = devices.drop_unsupported(recipe)
    data = read(recipe)
    data.refuse_batch(recipe.batch_size)

    # The framework is started only now, so that wrong flags and missing data are reported without a wait.
    devices.use_compile_cache(recipe.compile_cache, os.environ.get("KERAS_BACKEND") or "tensorflow")
    keras = start_keras(recipe.distribute)
    with (
        devices.distribute(recipe.distribute, recipe.batch_size) as hardware,
        devices.end_at_once(hardware),
        report_errors(),
    ):
        return train_on(hardware, keras, data, recipe, resume, build)


def train_on(hardware, keras, data, recipe, resume, build):
    """Train and test on these devices. With several processes, only the first writes and prints."""
    from Training.engine import evaluation, event_callbacks, final_events
    from Training.engine.fine_tuning import freeze, load_weights
    from Training.engine.fit import fit
    from Training.runs import checkpoint, history, run_folder
    from Training.runs.environment import describe_environment

    say = print if hardware.first else (lambda *_, **__: None)
    slow = "" if resume else devices.describe_slow_options(recipe)
    recipe = devices.resolve_precision(recipe, hardware)
    keras.utils.set_random_seed(recipe.seed)
    keras.config.set_dtype_policy(recipe.precision)
    network = build(recipe, data)
    if recipe.weights and not (resume and checkpoint.load_newest(resume, lambda _: None)):
        say(load_weights(network, recipe.weights, recipe.model))
    if recipe.freeze:
        say(freeze(network, recipe.freeze))

    folder, held = open_folder(hardware, data, recipe, resume)  # `held` keeps the lock until the end
    what = f"{recipe.model} on {recipe.dataset}: {format_count(len(data.train.labels), 'training image')}"
    say(f"{what}, {format_path(folder)}", flush=True)
    where = f"{hardware} ({devices.device_name()})"
    say(f"{recipe.batch_size} images per step on {where}, {describe_rate(recipe)}", flush=True)
    if slow:
        say(slow, flush=True)

    shown = data.validation if len(data.validation.labels) else data.train

    def make_events(again):
        return event_callbacks.make_event_callbacks(folder, network, shown, recipe, again) if hardware.first else []

    with report_how_to_resume(folder), data.reading(), devices.report_lost_peers(hardware):
        fit(network, data, recipe, folder, make_events, say, hardware)
        figures, logits = evaluation.evaluate(network, data, recipe.test_flip, hardware)
        if not hardware.first:
            return folder, None
        history = history.read_history(folder / "history.csv")
        steps = len(data.train.labels) // recipe.batch_size
        result = evaluation.summarize(figures, recipe, history, network, describe_environment(), steps)
        predictions = evaluation.format_predictions(data.test.labels, logits.argmax(axis=-1))
        run_folder.write(folder, "predictions.csv", predictions)
        final_events.write_final_events(folder, network, data, recipe, result, logits)
        run_folder.sync_event_files(folder)
        run_folder.write_json(folder, "result.json", result)  # written last: it marks the run as finished
    print(evaluation.format_result(result))
    if data.broken:
        print(f"  broken pictures   {data.broken}, replaced by others of the same class")
    print(f"  run folder        {format_path(folder)}")
    return folder, result


def describe_rate(recipe):
    """Return the learning rate and its warm-up as a text."""
    warmup = recipe.warmup_epochs
    after = f" after {warmup:g} of {format_count(recipe.epochs, 'epoch')} of warm-up" if warmup else ""
    return f"learning rate {recipe.learning_rate:g}{after}"


def open_folder(hardware, data, recipe, resume):
    """Return the run's folder and its lock. The first process creates and locks the folder; all get its path."""
    from Training.runs import run_folder
    from Training.runs.environment import describe_environment, record_environment

    held = []

    def open_and_lock():
        folder = run_folder.reopen(resume) if resume else run_folder.create(recipe.logs, label_run(recipe))
        held.append(run_folder.lock(folder))
        if resume:
            run_folder.refuse_to_start_over(folder, recipe.checkpoint_epochs)
        run_folder.write(folder, "recipe.json", recipe.to_json())
        parts = {"devices": hardware.count, "processes": hardware.processes}
        changed = record_environment(folder, {**describe_environment(), **parts})
        if changed:
            warn(
                f"{PROGRAM}: resumed with {', '.join(changed)}: the result can differ from that of an uninterrupted run"
            )
        run_folder.write_split(folder, data.held_out, data.identity)
        run_folder.write_json(folder, "classes.json", data.classes)
        return str(folder)

    try:
        return Path(devices.ask_first_process(hardware, open_and_lock)), held
    except OSError as error:
        raise InputError(format_os_error(error, resume or recipe.logs)) from None


@entry_point(PROGRAM, "Stopped before the training began.", output_needed=False)
def main(arguments=None, build=build):
    recipe, resume = parse(arguments, __doc__)
    train(recipe, resume, build)


if __name__ == "__main__":
    run_program(main)
