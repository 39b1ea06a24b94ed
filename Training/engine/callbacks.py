"""What watches a run: meter, progress, best network, and the order in which they see an epoch's logs."""

import dataclasses
import time

import keras

from Training.console import format_duration
from Training.engine.checkpointing import Checkpoints
from Training.runs.run_folder import save_model

PLATEAU_EPOCHS = 10


class EpochMeter(keras.callbacks.Callback):
    """Adds learning rate, seconds and images/s to each epoch's logs, and the seconds of a process' first step.

    The seconds of an epoch count from the end of the one before, what is written between them included. Images/s
    counts training steps alone, from an epoch's begin, or from the end of the process' first step (which compiles), to
    the end of the last. Where Keras runs several steps in a call, the first step is the first call. `spent` and
    `compiling`, the seconds of an epoch so far and those of them in the first step of a process, are part of a
    checkpoint, so that the time of a resumed run adds up.
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
        # Keras waits for the loss before it calls; the last call of an epoch counts as many steps as every other.
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
    """Gives each epoch its order of images."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.set_epoch(epoch, self.batches.first_step)

    def on_epoch_end(self, epoch, logs=None):
        self.batches.first_step = 0


class RunProgress(keras.callbacks.ProgbarLogger):
    """Keras' progress bar, with the minutes left of the whole run; one line an epoch where there is no terminal.

    Args:
        run_epochs: int, epochs of the run.
        run_steps: int, steps of a whole epoch.
    """

    def __init__(self, run_epochs, run_steps):
        super().__init__()
        self.run_epochs = run_epochs
        self.run_steps = run_steps
        self.first_end = None
        self.left = None

    def set_params(self, params):
        super().set_params({**params, "epochs": self.run_epochs})

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        done = self.epoch * self.run_steps + self.run_steps - self.target + min(batch + 1, self.target)
        self.first_end = self.first_end or (now, done)  # the first step compiles: it says nothing of the others
        spent, steps = now - self.first_end[0], done - self.first_end[1]
        if steps:
            self.left = spent / steps * (self.run_epochs * self.run_steps - done)
            logs = {**(logs or {}), "minutes_left": self.left / 60}
        super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if epoch + 1 < self.run_epochs and self.left is not None:
            print(
                f"{epoch + 1} of {self.run_epochs} epochs, about {format_duration(self.left)} left of the run",
                flush=True,
            )


class KeepBest(keras.callbacks.Callback):
    """Saves the network, not the training model around it, at each better validation accuracy.

    Keras' `ModelCheckpoint` overwrites its file in place: a kill within a save would lose the best network.
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


WRITERS = (KeepBest, RunProgress, keras.callbacks.CSVLogger)


def make_callbacks(recipe, folder, network, batches, events, state, validated):
    """All that watches a run, in the order in which it must see the logs; the checkpoints stand last.

    Of several processes the first alone writes; what changes the training is in each.

    Args:
        recipe: `recipe.Recipe`.
        folder: path of the run's folder.
        network: the model of which the best is kept, without what is around it in training.
        batches: `batches.Batches`.
        events: callbacks that see each epoch's complete logs.
        state: of the checkpoint to go on from, or None.
        validated: bool, whether there is a validation set.
    """
    meter = EpochMeter(batches)
    chosen = [EpochOrder(batches), meter]
    remembered = {"meter": (meter, ("spent", "compiling"))}
    if validated:
        best = KeepBest(folder / "best.keras", network)
        chosen.append(best)
        remembered["best"] = (best, ("best",))
    if recipe.schedule == "plateau":
        plateau = keras.callbacks.ReduceLROnPlateau(factor=0.1, patience=PLATEAU_EPOCHS)
        chosen.append(plateau)
        remembered["plateau"] = (plateau, ("best", "wait", "cooldown_counter"))
    if recipe.patience:
        stopping = keras.callbacks.EarlyStopping(patience=recipe.patience)
        chosen.append(stopping)
        remembered["stopping"] = (stopping, ("best", "wait"))
    chosen += [keras.callbacks.CSVLogger(folder / "history.csv", append=True), *events]
    chosen.append(RunProgress(recipe.epochs, batches.steps_per_epoch))
    if not batches.devices.first:
        chosen = [each for each in chosen if not isinstance(each, WRITERS)]
    checkpoints = Checkpoints(
        folder,
        dataclasses.asdict(recipe),
        batches.steps_per_epoch,
        remembered,
        every=recipe.checkpoint_steps,
        due=[*range(0, recipe.epochs, recipe.checkpoint_epochs), recipe.epochs],
        state=state,
        devices=batches.devices,
    )
    return [*chosen, checkpoints]
