"""The callback that saves the whole state of a run, and what gives that state back to a model."""

import os
import signal

import keras
import numpy as np

from Training.devices import ONE, should_stop
from Training.errors import Interrupted, RunError
from Training.files import read_text
from Training.runs.checkpoint import list_checkpoints, write
from Training.runs.run_folder import sync_event_files


class Checkpoints(keras.callbacks.Callback):
    """Saves the whole state of a run at the end of epochs, every `every` steps, and when a signal asks to stop.

    It stands last among the callbacks, so that what it saves is all that the others did.

    Args:
        folder: path of the run's folder.
        recipe: dictionary of the recipe, to compare with on resuming.
        steps_per_epoch: int, steps of a whole epoch.
        remembered: dictionary of `{name: (object, attributes)}` whose numbers are part of the state.
        every: int, steps between checkpoints within an epoch; 0 saves at the epochs' ends alone.
        due: numbers of finished epochs at which to save, or None for all.
        state: of the checkpoint to go on from, or None; later that of the newest one saved.
        devices: `devices.Devices`; every process stops at the same step, and the first alone writes.
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
            for attribute, value in values.items():
                setattr(self.remembered[name][0], attribute, value)
        if self.devices.processes == 1:
            handlers = {signal.SIGINT: self._ask, signal.SIGTERM: self._ask}
        else:  # JAX itself hears SIGTERM, in each process, and agrees with the others on a step
            handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        self.before = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def on_train_end(self, logs=None):
        self.release_signals()

    def release_signals(self):
        """Give the signals back to whom they belonged to; also where training ended by an error."""
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
        # Where a call has several steps, Keras counts as many in the last of an epoch, which may have fewer.
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
        """Add what the epoch's metrics had seen before the run was resumed: they are sums and counts.

        Only behind the first step, since Keras makes their variables in it.
        """
        if self.seen_before:
            self._sync()
            for variable, value in zip(self.model.metrics_variables, self.seen_before, strict=True):
                variable.assign(variable + np.asarray(value, variable.dtype))
            self.seen_before = []

    def _sync(self):
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()  # on JAX the state lives outside the model within an epoch

    def on_epoch_end(self, epoch, logs=None):
        self.first_step = self.seen = 0
        if self.asked or self.model.stop_training or self.due is None or epoch + 1 in self.due:
            self._save(epoch + 1, 0)
        self._stop_if_asked()

    def _stop_if_asked(self):
        if self.asked:
            raise Interrupted(self.asked)

    def _refuse_non_finite(self, loss):
        if not np.isfinite(loss):
            self._sync()
            raise RunError(
                f"the loss is {float(loss)} at step {self.seen} of epoch {self.epoch + 1}, learning rate "
                f"{float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)):g}: {self._left()}"
            )

    def _left(self):
        paths = list_checkpoints(self.folder)
        return f"the last good checkpoint is {paths[0]}" if paths else "there is no checkpoint yet"

    def _save(self, epoch, step):
        self._sync()
        arrays = [keras.ops.convert_to_numpy(variable) for variable in variables(self.model)]
        if not all(np.isfinite(array).all() for array in arrays):
            raise RunError(f"a weight is not finite after step {self.seen} of epoch {self.epoch + 1}: {self._left()}")
        self.state = {
            "epoch": epoch,
            "step": step,
            "stopped": bool(self.model.stop_training),
            "recipe": self.recipe,
            "callbacks": {name: _numbers(*each) for name, each in self.remembered.items()},
            "metrics": [keras.ops.convert_to_numpy(v).tolist() for v in self.model.metrics_variables] if step else [],
        }
        if self.devices.first:
            self._write(epoch * self.steps_per_epoch + step, arrays)

    def _write(self, steps, arrays):
        history = self.folder / "history.csv"
        self.state["history"] = read_text(history) if history.exists() else None
        self.state["events"] = sync_event_files(self.folder)
        try:
            write(self.folder, steps, self.state, arrays)
        except OSError as error:
            raise RunError(f"no checkpoint can be written ({error.strerror or error}): {self._left()}") from None


def _numbers(owner, attributes):
    """The named attributes as plain numbers; what is not set yet is left out."""
    values = {name: getattr(owner, name, None) for name in attributes}
    return {name: float(value) for name, value in values.items() if value is not None}


def variables(model):
    """Everything of a training model that a step changes but the metrics: weights, random states, optimizer.

    Images kept on the device are variables, too, but data: no weight is made of bytes.
    """
    return [v for v in (*model.variables, *model.optimizer.variables) if v.dtype != "uint8"]


def restore(model, arrays):
    """Give a compiled training model the arrays of a checkpoint.

    Raises:
        RunError: they are another model's.
    """
    own = variables(model)
    if [tuple(v.shape) for v in own] != [array.shape for array in arrays]:
        raise RunError("the checkpoint is another network's: its weights have other shapes")
    for variable, array in zip(own, arrays):
        variable.assign(array)
