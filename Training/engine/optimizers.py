"""How weights are updated: learning rate schedules, optimizers, weight decay."""

import keras

from Module.replicas import replicas
from Training.recipe import OPTIMIZERS, parse_shares
from Training.recipe.choices import load_object

NOT_DECAYED = ("gamma", "beta", "bias")


class SGD(keras.optimizers.SGD):
    """`m = momentum * m - rate * g`, then `w = w + m`, or with Nesterov `w = w + momentum * m - rate * g`.

    Keras' optimizer, state and all. Where Keras composes an update of eleven operations, TensorFlow has one that does
    the same: for each of the 324 variables of Attention-56 ten fewer to trace, to optimize and to schedule.
    """

    def __init__(self, learning_rate=0.01, momentum=0.0, nesterov=None, **kwargs):
        super().__init__(learning_rate, momentum, momentum > 0 if nesterov is None else nesterov, **kwargs)

    def update_step(self, gradient, variable, learning_rate):
        if keras.backend.backend() != "tensorflow" or not self.momentum or replicas() > 1:
            super().update_step(gradient, variable, learning_rate)
            return
        import tensorflow as tf  # only here: the module must import where TensorFlow is not installed

        tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.handle,
            accum=self.momentums[self._get_variable_index(variable)].value.handle,
            lr=tf.cast(learning_rate, variable.dtype),
            grad=tf.cast(gradient, variable.dtype),
            momentum=self.momentum,
            use_nesterov=self.nesterov,
        )


@keras.saving.register_keras_serializable(package="ResidualAttention")
class LinearDecay(keras.optimizers.schedules.LearningRateSchedule):
    """`rate * min(step / warmup, (steps - step) / (steps - warmup))`, never below 0: up from 0, then down to 0.

    Args:
        rate: float, the highest rate.
        warmup: int, steps of the rise; 0 begins at `rate`.
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


def make_schedule(recipe, steps_per_epoch):
    """The recipe's learning rate: a Keras schedule, or a number for the constant rate and for the plateau's first.

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
    """The Keras optimizer with L2 as the paper has it: `decay * weight` joins the gradient, before momentum.

    Keras' own `weight_decay` is decoupled, and its regularizers would put a term for each weight into the loss. An
    average of the weights (`use_ema`) becomes the weights when `finish_average` is called, not at the end of each
    `fit`, so that training can go on.
    """

    class WithL2(optimizer_class):
        def __init__(self, *args, l2=0.0, exempt=(), **kwargs):
            super().__init__(*args, **kwargs)
            self.l2 = l2
            self.exempt = exempt

        def update_step(self, gradient, variable, learning_rate):
            name = variable.name.split(":")[0]  # TensorFlow's own variables are called gamma:0
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
    if recipe.ema:
        extra |= {"use_ema": True, "ema_momentum": recipe.ema}
    exempt = () if recipe.decay_all else NOT_DECAYED
    decoupled = recipe.weight_decay_kind == "decoupled"
    if decoupled:
        extra["weight_decay"] = recipe.weight_decay
    kind = add_l2(load_object(row.kind))
    rate = make_schedule(recipe, steps_per_epoch)
    made = kind(rate, l2=0.0 if decoupled else recipe.weight_decay, exempt=exempt, **extra)
    if decoupled:
        made.exclude_from_weight_decay(var_names=list(exempt))
    return made
