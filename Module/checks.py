"""Refuses arguments of layers and builders that are out of their range."""

import numbers


def check_choice(name, value, choices):
    """Raise `ValueError` unless the value of the argument `name` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, received {value!r}")


def check_count(name, value):
    """Raise `ValueError` unless the value of the argument `name` is a whole number of 1 or more."""
    if not _is_count(value):
        raise ValueError(f"{name} must be a whole number of 1 or more, received {value!r}")


def check_image_shape(name, shape):
    """Raise `ValueError` unless the value of the argument `name` is `(height, width, channels)`, all known."""
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    if len(sizes) != 3 or not all(map(_is_count, sizes)):
        raise ValueError(
            f"{name} must be (height, width, channels), three whole numbers of 1 or more, received {shape!r}"
        )


def _is_count(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 1
