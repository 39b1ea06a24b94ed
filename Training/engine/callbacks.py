"""Callbacks of a run, and the order in which they see the logs of an epoch."""

import dataclasses
import math
import sys
import time

import keras

from Training.console import format_count, format_duration
from Training.devices import ask_first_process, find_accelerator
from Training.engine.checkpointing import Checkpoints
from Training.engine.optimizers import copy_values, finish_average, restore_values
from Training.errors import RunError
from Training.runs.run_folder import save_model

PLATEAU_EPOCHS = 10
LONGEST = 1e9  # epochs of a run that --minutes can decide on


class EpochMeter(keras.callbacks.Callback):
    """Adds learning rate, seconds, images/s and the seconds of a process' first step to the logs of each epoch.

    The seconds of an epoch are counted from the end of the previous one, and include the time for writing files.
    Images/s counts only training steps: from the start of an epoch, or from the end of the process' first step (which
    compiles), to the end of the last step. If Keras runs several steps in a call, the first step is the first call.
    `spent`, the seconds of an epoch so far, and `compiling`, those of the first step of a process among them, are part
    of a checkpoint, so that the times of a resumed run add up.
    """

    def __init__(self, batches):
        super().__init__()
        self.batches = batches
        self.spent = 0.0
        self.compiling = 0.0
        self.compiled = False

    def on_train_begin(self, logs=None):
        self.clock = time.perf_counter()

    def on_epoch_begin(self, epoch, logs=None):
        now = self.tick()
        self.first = (-1, now) if self.compiled else None

    def tick(self):
        now = time.perf_counter()
        self.spent, self.clock = self.spent + now - self.clock, now
        return now

    def on_train_batch_end(self, batch, logs=None):
        began = self.clock
        # Keras waits for the loss before this call. The last call of an epoch counts as many steps as the others.
        self.last = (min(batch, len(self.batches) - 1), self.tick())
        self.first = self.first or self.last
        if not self.compiled:
            self.compiling, self.compiled = self.compiling + self.clock - began, True

    def on_epoch_end(self, epoch, logs=None):
        self.tick()
        steps, seconds = (b - a for a, b in zip(self.first, self.last))
        logs["learning_rate"] = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        logs["seconds"] = self.spent
        logs["first_step_seconds"] = self.compiling
        logs["images_per_second"] = steps * self.batches.batch_size / seconds if steps else float("nan")
        self.spent = self.compiling = 0.0


class EpochOrder(keras.callbacks.Callback):
    """Sets the order of the images in each epoch."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.set_epoch(epoch, self.batches.first_step)

    def on_epoch_end(self, epoch, logs=None):
        self.batches.first_step = 0


class RunProgress(keras.callbacks.Callback):
    """Prints one line per epoch: number, errors, losses, images/s, and the time left for the whole run.

    In a terminal, the line is also updated during the epoch, with the share of the epoch that is done.

    Args:
        find_epochs: function that returns the number of epochs of the run, or None as long as it is not decided.
        run_steps: int, steps of a whole epoch.
        live: bool, whether to update the line during an epoch; by default, only in a terminal.
    """

    REFRESH = 0.5  # least number of seconds between two updates of the line

    def __init__(self, find_epochs, run_steps, live=None):
        super().__init__()
        self.find_epochs = find_epochs
        self.run_steps = run_steps
        self.live = sys.stdout.isatty() if live is None else live
        self.first_end = None
        self.left = None
        self.shown = 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        steps = self.params["steps"]
        done = self.epoch * self.run_steps + self.run_steps - steps + min(batch + 1, steps)
        self.first_end = self.first_end or (now, done)  # the first step compiles, so it is not counted
        spent, counted = now - self.first_end[0], done - self.first_end[1]
        epochs = self.find_epochs()
        if counted and epochs:
            self.left = spent / counted * (epochs * self.run_steps - done)
        if self.live and logs and now - self.shown >= self.REFRESH:
            share = min(done - self.epoch * self.run_steps, self.run_steps) / self.run_steps
            sys.stdout.write("\r" + format_progress(self.epoch, epochs, logs, self.left, share) + CLEAR_LINE)
            sys.stdout.flush()
            self.shown = now

    def on_epoch_end(self, epoch, logs=None):
        epochs = self.find_epochs()
        left = self.left if epochs and epoch + 1 < epochs else None
        line = format_progress(epoch, epochs, logs or {}, left)
        print(f"\r{line}{CLEAR_LINE}" if self.live else line, flush=True)


CLEAR_LINE = "\x1b[K"  # from the cursor to the end of the line


def format_progress(epoch, epochs, logs, left, share=None):
    """Return the progress of a run as one line, without fields that have no value.

    Args:
        epoch: int, counted from 0.
        epochs: int, number of epochs of the run, or None if it is not decided.
        logs: dictionary of Keras' logs: accuracies in [0, 1] and losses.
        left: float, seconds that the run has left, or None.
        share: float, share of the epoch that is done, or None at its end.
    """
    parts = [f"epoch {epoch + 1:>{len(str(epochs))}} of {epochs}" if epochs else f"epoch {epoch + 1}"]
    if share is not None:
        parts.append(f"{100 * share:3.0f} %")
    for prefix, title in (("", "train"), ("val_", "validation")):
        accuracy, loss = logs.get(f"{prefix}accuracy"), logs.get(f"{prefix}loss")
        if accuracy is not None and loss is not None:
            parts.append(f"{title} error {100 * (1 - accuracy):.2f} %, loss {loss:.4f}")
    rate = logs.get("images_per_second")
    if rate is not None and math.isfinite(rate):
        parts.append(f"{rate:.0f} images/s")
    if left is not None:
        parts.append(f"about {format_duration(left)} left")
    return "   ".join(parts)


class TimeBudget(keras.callbacks.Callback):
    """Decides after the first epoch how many epochs fit into the minutes of a run. Checkpoints contain the decision.

    All later epochs are assumed to take as long as the first without compilation. Only training and validation count,
    not reading the data before and the final evaluation afterwards.

    Args:
        recipe: `recipe.Recipe`; without `minutes`, the run has `recipe.epochs`.
        devices: `devices.Devices`; the first process decides for all.
        say: function that reports a line to the user.
    """

    def __init__(self, recipe, devices, say):
        super().__init__()
        self.recipe = recipe
        self.devices = devices
        self.say = say
        self.decided = not recipe.minutes
        self.epochs = recipe.epochs

    @property
    def length(self):
        """Number of epochs of the run, as an int (checkpoints restore numbers as floats)."""
        return int(self.epochs)

    def restore(self, state):
        """Restore the decision from the state of a checkpoint, if there is one."""
        kept = state["callbacks"].get("budget", {})
        if kept.get("decided"):
            epochs = kept.get("epochs", 0)
            if not 1 <= epochs <= LONGEST or epochs != int(epochs):
                raise RunError(f"the checkpoint has decided on {epochs:g} epochs: it belongs to another run")
            self.decided, self.epochs = True, epochs

    def on_epoch_end(self, epoch, logs=None):
        if self.decided:
            return
        each = self._estimate_epoch(logs)
        fitting = 1 + max(0, int((60 * self.recipe.minutes - logs["seconds"]) // each))
        self.epochs = int(ask_first_process(self.devices, lambda: str(fitting)))
        self.decided = True
        total = format_count(self.epochs, "epoch")
        self.say(f"--minutes {self.recipe.minutes:g}: {total} in total, {format_duration(each)} each")

    def _estimate_epoch(self, logs):
        """Return the seconds of an epoch without compilation, from the logs of the first epoch."""
        first_call = self.recipe.steps_per_execution * self.recipe.batch_size / logs["images_per_second"]
        if not math.isfinite(first_call):  # the whole epoch was one call: the time of compilation is unknown
            return logs["seconds"]
        return logs["seconds"] - logs["first_step_seconds"] + first_call


class EstimateDuration(keras.callbacks.Callback):
    """Prints once how long a run on a processor will take, if that is more than an hour.

    The estimate is made after the first `MEASURED` seconds of training, without the first step, which compiles.

    Args:
        steps: int, steps that the run has left.
        say: function that prints a line.
    """

    MEASURED = 20.0
    WORTH_SAYING = 3600.0

    def __init__(self, steps, say=print):
        super().__init__()
        self.steps = steps
        self.say = say
        self.first_end = None
        self.done = self.before = 0  # steps, and those of earlier epochs
        self.said = False

    def on_epoch_begin(self, epoch, logs=None):
        self.before = self.done

    def on_train_batch_end(self, batch, logs=None):
        now, self.done = time.perf_counter(), self.before + batch + 1  # a call may be several steps
        self.first_end = self.first_end or (now, self.done)
        spent, counted = now - self.first_end[0], self.done - self.first_end[1]
        if not self.said and counted and spent >= self.MEASURED:
            left = spent / counted * (self.steps - self.done)
            self.said = True
            if left > self.WORTH_SAYING:
                self.say(
                    f"\nthis run will take about {format_duration(left)} on this processor, without validation: "
                    "use a GPU, fewer --epochs or fewer --samples to save time",
                    flush=True,
                )


class KeepBest(keras.callbacks.Callback):
    """Saves the network, not the training model around it, whenever the validation accuracy improves.

    Keras' `ModelCheckpoint` overwrites its file in place: a kill during a save would lose the best network.
    """

    def __init__(self, path, network):
        super().__init__()
        self.path = path
        self.network = network
        self.best = -1.0

    def on_epoch_end(self, epoch, logs=None):
        if logs["val_accuracy"] > self.best:
            self.best = logs["val_accuracy"]
            save_model(self.network, self.path)


class EvaluatedNetwork(keras.callbacks.Callback):
    """Validates the network as a finished run would save it, and then restores the network for training.

    Before each validation, the weights are replaced by their average, if there is one, and the statistics of the
    normalizations are recomputed. At the end of the epoch, after `KeepBest`, weights and statistics are restored bit
    for bit.

    Args:
        network: the network that is trained.
        statistics: `statistics.Statistics` of the network.
        averaged: bool, whether the optimizer keeps an average of the weights.
    """

    def __init__(self, network, statistics, averaged):
        super().__init__()
        self.network = network
        self.statistics = statistics
        self.averaged = averaged
        self.kept = None

    def on_test_begin(self, logs=None):
        self.kept = copy_values(self.network.variables)
        if self.averaged:
            finish_average(self.model)
        self.statistics.recompute()

    def on_epoch_end(self, epoch, logs=None):
        if self.kept:
            restore_values(self.network.variables, self.kept)
            self.kept = None


WRITERS = (KeepBest, RunProgress, EstimateDuration, keras.callbacks.CSVLogger)


def make_callbacks(recipe, folder, network, batches, events, state, validated, budget, statistics=None):
    """Make the callbacks of a run, in the order in which they must see the logs; the checkpoints are last.

    With several processes, only the first gets callbacks that write. All get those that affect training.

    Args:
        recipe: `recipe.Recipe`.
        folder: path of the run's folder.
        network: the network whose best weights are saved, without the training model around it.
        batches: `batches.Batches`.
        events: callbacks that see the complete logs of each epoch.
        state: state of the checkpoint to resume from, or None.
        validated: bool, whether there is a validation set.
        budget: `TimeBudget`.
        statistics: `statistics.Statistics` to recompute before each validation, or None.
    """
    meter = EpochMeter(batches)
    chosen = [EpochOrder(batches), meter]
    remembered = {"meter": (meter, ("spent", "compiling"))}
    if validated:
        best = KeepBest(folder / "best.keras", network)
        chosen.append(best)
        remembered["best"] = (best, ("best",))
        if statistics:
            chosen.append(EvaluatedNetwork(network, statistics, bool(recipe.ema)))
    if recipe.schedule == "plateau":
        plateau = keras.callbacks.ReduceLROnPlateau(factor=0.1, patience=PLATEAU_EPOCHS)
        chosen.append(plateau)
        remembered["plateau"] = (plateau, ("best", "wait", "cooldown_counter"))
    if recipe.patience:
        stopping = keras.callbacks.EarlyStopping(patience=recipe.patience)
        chosen.append(stopping)
        remembered["stopping"] = (stopping, ("best", "wait"))
    if recipe.minutes:
        chosen.append(budget)
        remembered["budget"] = (budget, ("decided", "epochs"))
    length = budget.length if budget.decided else 1
    chosen += [keras.callbacks.CSVLogger(folder / "history.csv", append=True), *events]
    chosen.append(RunProgress(lambda: budget.length if budget.decided else None, batches.steps_per_epoch))
    # The rest of an interrupted epoch is a call of its own, and --minutes has said how long the run takes.
    if find_accelerator() is None and not batches.first_step and not recipe.minutes:
        chosen.append(EstimateDuration((length - (state["epoch"] if state else 0)) * batches.steps_per_epoch))
    if not batches.devices.first:
        chosen = [each for each in chosen if not isinstance(each, WRITERS)]
    checkpoints = Checkpoints(
        folder,
        dataclasses.asdict(recipe),
        batches.steps_per_epoch,
        remembered,
        every=recipe.checkpoint_steps,
        due=[*range(0, length, recipe.checkpoint_epochs), length],
        state=state,
        devices=batches.devices,
    )
    return [*chosen, checkpoints]
