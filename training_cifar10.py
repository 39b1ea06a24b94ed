"""Train a Residual Attention Network: Attention-56 on CIFAR-10 unless a flag says otherwise."""

from Training import recipe as recipes
from Training.console import one_line_errors, start_keras, told_how_to_resume


def build(recipe, data):
    """The recipe's network for this data: raw images in, class probabilities out."""
    from Model import network
    from Training.fit import mean_subtraction

    try:
        return network(
            recipe.model,
            geometry=recipe.geometry,
            learning=recipe.learning,
            attention=recipe.attention,
            mask=recipe.mask,
            p=recipe.p,
            t=recipe.t,
            r=recipe.r,
            classes=len(data.classes),
            input_shape=data.train.images.shape[1:],
            dropout=recipe.dropout,
            classifier_l2=recipe.classifier_l2,
            preprocessing=mean_subtraction(data.mean),
        )
    except ValueError as error:  # a depth that these p and t cannot give, or images too small for the masks
        raise recipes.InputError(str(error)) from None


def train(recipe, resume=None):
    """One run from recipe to result; returns the run's folder and what its `result.json` holds."""
    from Training.data import load

    data = load(recipe.dataset, recipe.data_dir, recipe.validation_split, recipe.samples)
    data.refuse_batch(recipe.batch_size)

    # Only now: wrong flags and missing data are told without the seconds that a framework takes to start.
    keras = start_keras()
    from Training import checkpoint, events, report, run_folder
    from Training.fit import fit

    keras.utils.set_random_seed(recipe.seed)
    keras.config.set_dtype_policy(recipe.precision)
    network = build(recipe, data)

    folder = run_folder.open_again(resume) if resume else run_folder.create(recipe.logs)
    held = checkpoint.lock(folder)  # noqa: F841  until the process ends
    environment = run_folder.environment()
    run_folder.write(folder, "recipe.json", recipe.to_json())
    run_folder.write_json(folder, "environment.json", environment)
    run_folder.write_json(folder, "split.json", {"validation": data.held_out.tolist()})
    print(f"{recipe.model} on {recipe.dataset}: {len(data.train.labels)} images to train on, {folder}", flush=True)

    shown = data.validation if len(data.validation.labels) else data.train
    with told_how_to_resume(folder):
        model = fit(network, data, recipe, folder, lambda again: events.watchers(folder, network, shown, recipe, again))
        figures, predictions = report.evaluate(model, data)
        history = report.read_history(folder / "history.csv")
        result = report.result(figures, recipe, history, network, environment)
        run_folder.write_json(folder, "result.json", result)
        events.finish(folder, recipe, figures, data.test.labels, predictions, data.classes)
    print(report.table(result))
    print(f"  everything in     {folder}")
    return folder, result


def main(arguments=None):
    recipe, resume = recipes.parse(arguments, __doc__)
    with one_line_errors():
        train(recipe, resume)


if __name__ == "__main__":
    main()
