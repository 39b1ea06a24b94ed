"""Saves the whole state of a run in a callback, and restores it into a model."""

import os
import re
import signal

import keras
import numpy as np

from Training.console import SIGNALS
from Training.devices import ONE, should_stop
from Training.errors import Interrupted, RunError, format_os_error
from Training.files import read_text
from Training.runs.checkpoint import list_checkpoints, write
from Training.runs.run_folder import sync_event_files


class Checkpoints(keras.callbacks.Callback):
    """Saves the whole state of a run at the end of epochs, every `every` steps, and when a signal asks to stop.

    It must be the last callback, so that the state includes the work of all others.

    Args:
        folder: path of the run's folder.
        recipe: dictionary, the recipe, which is compared on resuming.
        steps_per_epoch: int, steps of a whole epoch.
        remembered: `{name: (object, attributes)}`, objects with numeric attributes that are part of the state.
        every: int, steps between checkpoints within an epoch; 0 saves only at the end of epochs.
        due: numbers of finished epochs at which to save, or None for all.
        state: state of the checkpoint to resume from, or None; later that of the newest saved checkpoint or finished
            epoch.
        devices: `devices.Devices`; every process stops at the same step, and only the first writes.
    """

    def __init__(self, folder, recipe, steps_per_epoch, remembered, every=0, due=None, state=None, devices=ONE):
        super().__init__()
        self.folder = folder
        self.recipe = recipe
        self.steps_per_epoch = steps_per_epoch
        self.remembered = remembered
        self.every = every
        self.due = due
        self.state = state
        self.devices = devices
        self.first_step = state["step"] if state else 0
        self.seen = self.first_step
        self.asked = None
        self.before = {}

    def on_train_begin(self, logs=None):
        for name, values in (self.state["callbacks"] if self.state else {}).items():
            owner, attributes = self.remembered.get(name, (None, ()))
            for attribute, value in values.items():
                if attribute not in attributes:
                    raise RunError(f"the checkpoint has a value {name}.{attribute}, which this run does not know")
                setattr(owner, attribute, value)
        numbers, handler = SIGNALS, self._ask
        if self.devices.processes > 1:  # JAX handles SIGTERM in each process, and all agree on a step
            numbers = [number for number in SIGNALS if number != signal.SIGTERM]
            handler = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        caught = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # as by nohup
        self.before = {number: signal.signal(number, handler) for number in caught}

    def on_train_end(self, logs=None):
        self.release_signals()
        self._stop_if_asked()  # a signal may have come after the last epoch was saved

    def release_signals(self):
        """Restore the handlers of signals; also called if training ends with an exception."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _ask(self, number, _frame):
        self.asked = number
        for each in self.before:  # a second signal ends the process at once
            signal.signal(each, signal.SIG_DFL)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        self.seen_before = self.state["metrics"] if self.first_step else []

    def on_train_batch_end(self, batch, logs=None):
        # If a call has several steps, Keras counts the full number for the last call of an epoch, which may have fewer.
        before, self.seen = self.seen, min(self.first_step + batch + 1, self.steps_per_epoch)
        self._refuse_non_finite(logs["loss"])
        self._complete_metrics()
        if should_stop(self.devices, self.epoch * self.steps_per_epoch + self.seen):
            self.asked = signal.SIGTERM
        due = self.every and self.seen // self.every > before // self.every
        if self.seen < self.steps_per_epoch and (self.asked or due):  # the epoch's end saves in any case
            self._save(self.epoch, self.seen)
            self._stop_if_asked()

    def _complete_metrics(self):
        """Add the sums and counts of the metrics from the part of the epoch before the run was resumed.

        This is done after the first step, in which Keras creates their variables.
        """
        if not self.seen_before:
            return
        self._sync()
        own = self.model.metrics_variables
        values = [np.asarray(value, variable.dtype) for variable, value in zip(own, self.seen_before)]
        if [value.shape for value in values] != [tuple(v.shape) for v in own] or len(own) != len(self.seen_before):
            raise RunError("the metrics of the checkpoint do not match those of this run")
        for variable, value in zip(own, values):
            variable.assign(variable + value)
        self.seen_before = []

    def _sync(self):
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()  # on JAX, the state is outside the model during an epoch

    def on_epoch_end(self, epoch, logs=None):
        self.first_step = self.seen = 0
        if self.asked or self.model.stop_training or self.due is None or epoch + 1 in self.due:
            self._save(epoch + 1, 0)
        else:
            self._remember(epoch + 1, 0)  # another call of `fit` may continue from here
        self._stop_if_asked()

    def _stop_if_asked(self):
        if self.asked:
            raise Interrupted(self.asked)

    def _refuse_non_finite(self, loss):
        if not np.isfinite(loss):
            self._sync()
            raise RunError(
                f"the loss is {float(loss)} at step {self.seen} of epoch {self.epoch + 1}, learning rate "
                f"{float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)):g}: {self._name_last()}"
            )

    def _name_last(self):
        paths = list_checkpoints(self.folder)
        return f"the last good checkpoint is {paths[0]}" if paths else "there is no checkpoint yet"

    def _save(self, epoch, step):
        """Save the state after `epoch` whole epochs and `step` steps of the next one."""
        self._sync()
        arrays = name_arrays(self.model)
        broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
        if broken:
            when = f"step {step} of epoch {epoch + 1}" if step else f"epoch {epoch}"
            raise RunError(f"{broken[0]} is not finite after {when}: {self._name_last()}")
        self._remember(epoch, step)
        if self.devices.first:
            self._write(epoch * self.steps_per_epoch + step, arrays)

    def _remember(self, epoch, step):
        self.state = {
            "epoch": epoch,
            "step": step,
            "stopped": bool(self.model.stop_training),
            "recipe": self.recipe,
            "callbacks": {name: _read_numbers(*each) for name, each in self.remembered.items()},
            "metrics": [keras.ops.convert_to_numpy(v).tolist() for v in self.model.metrics_variables] if step else [],
        }

    def _write(self, steps, arrays):
        history = self.folder / "history.csv"
        try:
            self.state["history"] = read_text(history) if history.exists() else None
            self.state["events"] = sync_event_files(self.folder)
            write(self.folder, steps, self.state, arrays)
        except OSError as error:
            reason = format_os_error(error, self.folder / "backup")
            raise RunError(f"no checkpoint can be written ({reason}): {self._name_last()}") from None


def _read_numbers(owner, attributes):
    """Return the values of attributes as plain numbers, without those that are None."""
    values = {name: getattr(owner, name, None) for name in attributes}
    return {name: float(value) for name, value in values.items() if value is not None}


def list_variables(model):
    """Return the variables of a training model that a step changes, except metrics: weights, random states, optimizer.

    Images on the device, the only variables of bytes, are left out: they are data.
    """
    return [v for v in (*model.variables, *model.optimizer.variables) if v.dtype != "uint8"]


UNNAMED = {"seed_generator", "variable"}  # names that Keras gives to variables and their owners by default


def name_variables(model):
    """Return the names of `list_variables` in a form that is the same in every process and for every Keras model.

    Keras numbers objects without an explicit name in the order in which a process creates them, as in `sgd_1` or
    `seed_generator_2`, and variables too: Nadam's product of momenta is `variable_3`. Those numbers are removed.
    Variables that then have the same name get #2, #3 and so on.
    """
    kinds = {_snake_case(type(each).__name__) for each in (*_flatten(model), *_list_optimizers(model.optimizer))}
    numbered = re.compile(rf"(?:^|(?<=/))({'|'.join(sorted(kinds | UNNAMED))})_\d+(?=[/_]|$)")
    # In the name of an optimizer's variable, the path of a weight is joined: adam/dense_1_kernel_momentum.
    joined = {
        v.path.replace("/", "_"): numbered.sub(r"\1", v.path).replace("/", "_") for v in model.trainable_variables
    }
    names, counts = [], {}
    for variable in list_variables(model):
        name = _replace_start(numbered.sub(r"\1", variable.path), joined)
        counts[name] = counts.get(name, 0) + 1
        names.append(name if counts[name] == 1 else f"{name}#{counts[name]}")
    return names


def _replace_start(name, joined):
    """Return an optimizer variable's name with the joined path of its weight replaced; other names are not changed."""
    owner, _, slot = name.rpartition("/")
    for parts in range(1, 4):  # the name of a slot has up to three parts
        path, *kind = slot.rsplit("_", parts)
        if path in joined:
            return "/".join([owner, "_".join([joined[path], *kind])])
    return name


def _flatten(model):
    """Return a model and all layers in it, at any depth."""
    return [model, *(inner for layer in getattr(model, "layers", ()) for inner in _flatten(layer))]


def _list_optimizers(optimizer):
    """Return an optimizer and, if it scales the loss, the one inside it."""
    inner = getattr(optimizer, "inner_optimizer", None)
    return [optimizer] if inner is None else [optimizer, inner]


def _snake_case(name):
    """Return the name of a class as in Keras' names of objects: `BatchNormalization` becomes `batch_normalization`."""
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def name_arrays(model):
    """Return the values of `list_variables` as a dictionary by name."""
    values = [keras.ops.convert_to_numpy(variable) for variable in list_variables(model)]
    return dict(zip(name_variables(model), values, strict=True))


def restore(model, arrays):
    """Assign the arrays of a checkpoint to a compiled training model.

    They are assigned by name; those of earlier versions, which have no names, by position.

    Args:
        model: a compiled training model.
        arrays: dictionary of arrays by name or by position, see `checkpoint.unpack`.

    Raises:
        RunError: they belong to another model; the message names the first difference.
    """
    own = list_variables(model)
    positional = all(isinstance(name, int) for name in arrays)
    names = list(range(len(own))) if positional else name_variables(model)
    if not positional:  # earlier versions kept the number of variables without a name
        arrays = {re.sub(r"^variable_\d+$", "variable", name): array for name, array in arrays.items()}
    _refuse_other_variables(dict(zip(names, own)), arrays)
    for name, variable in zip(names, own):
        variable.assign(arrays[name])


def _refuse_other_variables(own, arrays):
    """Raise `RunError` unless the names and shapes of the arrays are those of a model's variables."""
    for name in [*own, *arrays]:
        if name not in arrays:
            raise RunError(f"the checkpoint belongs to another network: it lacks {name}")
        if name not in own:
            raise RunError(f"the checkpoint belongs to another network: it has {name}, which this network lacks")
        there, here = arrays[name].shape, tuple(own[name].shape)
        if there != here:
            raise RunError(f"the checkpoint belongs to another network: {name} has the shape {there}, here {here}")
