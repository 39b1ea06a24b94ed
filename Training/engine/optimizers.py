"""Learning rate schedules, optimizers and weight decay."""

import math

import keras
import numpy as np

from Module.replicas import replicas
from Training.recipe import OPTIMIZERS, parse_shares
from Training.recipe.choices import load_object

NOT_DECAYED = ("gamma", "beta", "bias")


class SGD(keras.optimizers.SGD):
    """`m = momentum * m - rate * g`, then `w = w + m`, or with Nesterov `w = w + momentum * m - rate * g`.

    Keras' optimizer with the same state. Keras composes the update from eleven operations. TensorFlow has a single one,
    which saves ten operations for each of the 324 variables of Attention-56.
    """

    def __init__(self, learning_rate=0.01, momentum=0.0, nesterov=None, **kwargs):
        super().__init__(learning_rate, momentum, momentum > 0 if nesterov is None else nesterov, **kwargs)

    def update_step(self, gradient, variable, learning_rate):
        if keras.backend.backend() != "tensorflow" or not self.momentum or replicas() > 1:
            super().update_step(gradient, variable, learning_rate)
            return
        import tensorflow as tf  # not at the top: the module must be importable without TensorFlow

        tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.handle,
            accum=self.momentums[self._get_variable_index(variable)].value.handle,
            lr=tf.cast(learning_rate, variable.dtype),
            grad=tf.cast(gradient, variable.dtype),
            momentum=self.momentum,
            use_nesterov=self.nesterov,
        )


class Muon(keras.optimizers.Muon):
    """Momentum whose update of each convolution is replaced by the nearest orthogonal matrix; AdamW for the rest.

    Keras' optimizer applies Muon to matrices only. Here kernels of convolutions, `(rows, columns, in, out)`, are
    flattened to matrices `(rows * columns * in, out)`, as in the original implementation; the classifier, gamma, beta
    and biases are updated by AdamW. Source: Jordan 2024, https://github.com/KellerJordan/Muon. Updates are scaled as in
    Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.2, so that learning rates of AdamW can be used.
    """

    def __init__(self, learning_rate=0.001, weight_decay=None, **kwargs):
        super().__init__(learning_rate, weight_decay=weight_decay, adam_weight_decay=weight_decay, **kwargs)

    def _should_use_adamw(self, variable):
        return len(variable.shape) != 4

    def zeropower_via_newtonschulz5(self, x, steps):
        matrix = keras.ops.reshape(x, (-1, x.shape[-1]))
        return keras.ops.reshape(super().zeropower_via_newtonschulz5(matrix, steps), x.shape)

    def lr_adjust(self, x):
        return x * (self.rms_rate * math.sqrt(max(math.prod(x.shape[:-1]), x.shape[-1])))


@keras.saving.register_keras_serializable(package="ResidualAttention")
class LinearDecay(keras.optimizers.schedules.LearningRateSchedule):
    """`rate * min(step / warmup, (steps - step) / (steps - warmup))`, at least 0: up from 0, then down to 0.

    Args:
        rate: float, the highest rate.
        warmup: int, steps of the rise; 0 starts at `rate`.
        steps: int, steps of the whole run.
    """

    def __init__(self, rate, warmup, steps):
        super().__init__()
        self.rate = rate
        self.warmup = warmup
        self.steps = steps

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        rising = step / max(self.warmup, 1) if self.warmup else 1.0
        falling = (self.steps - step) / max(self.steps - self.warmup, 1)
        return self.rate * keras.ops.clip(keras.ops.minimum(rising, falling), 0.0, 1.0)

    def get_config(self):
        return {"rate": self.rate, "warmup": self.warmup, "steps": self.steps}


@keras.saving.register_keras_serializable(package="ResidualAttention")
class Stretched(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that another one follows at a different pace: `schedule(first + (step - first) * pace)`.

    Args:
        schedule: a Keras schedule.
        first: int, steps at the original pace.
        pace: float, or a scalar variable that may change between steps.
    """

    def __init__(self, schedule, first, pace=1.0):
        super().__init__()
        self.schedule = schedule
        self.first = first
        self.pace = pace

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        later = keras.ops.maximum(step - self.first, 0.0)
        return self.schedule(step - later + later * keras.ops.cast(self.pace, "float32"))

    def get_config(self):
        schedule = keras.saving.serialize_keras_object(self.schedule)
        return {"schedule": schedule, "first": self.first, "pace": float(keras.ops.convert_to_numpy(self.pace))}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "schedule": keras.saving.deserialize_keras_object(config["schedule"])})


def make_schedule(recipe, steps_per_epoch):
    """Make the recipe's learning rate: a Keras schedule, or a number if the schedule is "constant" or "plateau".

    Args:
        recipe: `recipe.Recipe`.
        steps_per_epoch: int.
    """
    rate, steps = recipe.learning_rate, recipe.epochs * steps_per_epoch
    if recipe.schedule == "step":
        at = [round(share * steps) for share in parse_shares(recipe.step_at)]
        return keras.optimizers.schedules.PiecewiseConstantDecay(at, [rate / 10**i for i in range(len(at) + 1)])
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if recipe.schedule == "linear":
        return LinearDecay(rate, warmup, steps)
    if recipe.schedule == "cosine":
        ramp = dict(initial_learning_rate=0.0, warmup_target=rate, warmup_steps=warmup) if warmup else {}
        return keras.optimizers.schedules.CosineDecay(
            **{"initial_learning_rate": rate, "decay_steps": max(steps - warmup, 1), **ramp}
        )
    return rate


def add_l2(optimizer_class):
    """Return a subclass with the paper's L2: `decay * weight` is added to the gradient, before momentum.

    Keras' own `weight_decay` is decoupled, and its regularizers would add a term to the loss for each weight. An
    average of the weights (`use_ema`) replaces the weights when `finish_average` is called, not at the end of each
    `fit`, so that training can continue.
    """

    class WithL2(optimizer_class):
        def __init__(self, *args, l2=0.0, exempt=(), **kwargs):
            super().__init__(*args, **kwargs)
            self.l2 = l2
            self.exempt = exempt

        def update_step(self, gradient, variable, learning_rate):
            name = variable.name.split(":")[0].split("/")[-1]  # TensorFlow's own variables: stem/norm/gamma:0
            if self.l2 and name not in self.exempt:
                gradient = gradient + self.l2 * keras.ops.cast(variable, gradient.dtype)
            super().update_step(gradient, variable, learning_rate)

        def finalize_variable_values(self, var_list):
            pass

        def finish_average(self, variables):
            super().finalize_variable_values(variables)

    WithL2.__name__ = optimizer_class.__name__
    return WithL2


def make_optimizer(recipe, steps_per_epoch):
    """Make the recipe's optimizer, with its schedule and its kind of weight decay.

    Args:
        recipe: `recipe.Recipe`.
        steps_per_epoch: int.

    Returns:
        A Keras optimizer with `l2`, see `add_l2`.
    """
    row = OPTIMIZERS[recipe.optimizer]
    extra = {name: getattr(recipe, name) for name in row.fields}
    if recipe.accumulate > 1:
        extra["gradient_accumulation_steps"] = recipe.accumulate
    if recipe.clip_norm:
        extra["global_clipnorm"] = recipe.clip_norm
    if recipe.ema:
        extra |= {"use_ema": True, "ema_momentum": recipe.ema}
    exempt = () if recipe.decay_all else NOT_DECAYED
    decoupled = recipe.weight_decay_kind == "decoupled"
    if decoupled:
        extra["weight_decay"] = recipe.weight_decay
    kind = add_l2(load_object(row.kind))
    rate = make_schedule(recipe, steps_per_epoch)
    if recipe.minutes and callable(rate):
        rate = Stretched(rate, steps_per_epoch)
    made = kind(rate, l2=0.0 if decoupled else recipe.weight_decay, exempt=exempt, **extra)
    if decoupled:
        made.exclude_from_weight_decay(var_names=list(exempt))
    if isinstance(rate, Stretched):  # a variable of the optimizer: part of compiled steps and of checkpoints
        rate.pace = made.add_variable((), "ones", "float32", aggregation="only_first_replica", name="pace")
        made.stretched = rate
    return made


def set_run_length(optimizer, recipe, epochs):
    """Stretch a schedule that was made for `recipe.epochs` so that it ends after `epochs`, except its first epoch.

    Args:
        optimizer: an optimizer from `make_optimizer`, or a `LossScaleOptimizer` around it.
        recipe: `recipe.Recipe`.
        epochs: int.
    """
    stretched = getattr(getattr(optimizer, "inner_optimizer", optimizer), "stretched", None)
    if stretched is not None:
        stretched.pace.assign((recipe.epochs - 1) / max(epochs - 1, 1))


def finish_average(model):
    """Replace the weights of a compiled training model by their average, see `--ema`."""
    scaled = model.optimizer  # with mixed_float16, Keras wraps the optimizer in a LossScaleOptimizer
    getattr(scaled, "inner_optimizer", scaled).finish_average(model.trainable_variables)
    # On JAX, weights and average now share their arrays, and evaluating the model would free them.
    restore_values(model.trainable_variables, copy_values(model.trainable_variables))


def copy_values(variables):
    """Return copies of the values of variables."""
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def restore_values(variables, values):
    """Assign values from `copy_values` to their variables."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
