"""Runs with the smallest network, which is traced and compiled quickly."""

MAIN = "import training_cifar10; from tests.support import small; training_cifar10.main(build=small.build)"


def build(recipe, data):
    """Stand in for `training_cifar10.build`. Keras is imported here, so that the script starts it as usual."""
    from tests.support import plain

    return plain.build(recipe, data)
