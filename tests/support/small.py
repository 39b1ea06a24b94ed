"""Runs with the smallest network, whose time is not spent on tracing and compiling."""

MAIN = "import training_cifar10; from tests.support import small; training_cifar10.main(build=small.build)"


def build(recipe, data):
    """Stand in for `training_cifar10.build`. Keras is imported here, so that the script starts it as ever."""
    from tests.support import plain

    return plain.build(recipe, data)
