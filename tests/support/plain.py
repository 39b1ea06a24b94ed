"""The smallest network with all kinds of state that devices must agree on: one attention block of minimal units."""

import keras
from keras import layers

from Model.preprocessing import mean_subtraction
from Module import AttentionBlock, BatchNormalization, Dropout, Unit
from Module.residual_unit import build_chain, convolution, norm_relu, run_chain


@keras.saving.register_keras_serializable(package="tests")
class Plain(Unit):
    """`y = x + conv1x1(act(x))`."""

    def build(self, input_shape):
        self.branch = [*norm_relu("1", self.dtype_policy), convolution(self.filters, 1, name="convolve")]
        build_chain(self.branch, input_shape)

    def call(self, inputs):
        return inputs + run_chain(self.branch, inputs)

    @property
    def paths(self):
        return [self.branch]


def build(recipe, data):
    """Stand in for `training_cifar10.build`."""
    preprocessing = mean_subtraction(*data.mean_and_std(recipe.mean))
    return plain_network(data.train.images.shape[1:], len(data.classes), recipe.dropout, preprocessing, recipe.learning)


def plain_network(input_shape=(32, 32, 3), classes=10, dropout=0.0, preprocessing=None, learning="arl"):
    """Return a network with about 3,000 weights, from images to class probabilities."""
    inputs = keras.Input(input_shape, name="images")
    x = preprocessing(inputs) if preprocessing else inputs
    x = convolution(4, 3, 4, padding="same", name="stem_convolve")(x)
    x = AttentionBlock(4, mask_depth=1, unit=Plain, learning=learning, name="stage_1_attention_1")(x)
    x = layers.Flatten(name="flatten")(BatchNormalization(name="norm_tail")(x))
    x = Dropout(dropout, name="dropout")(x)
    x = layers.Dense(classes, dtype="float32", name="logits")(x)
    return keras.Model(inputs, layers.Softmax(name="probabilities")(x), name="plain")
