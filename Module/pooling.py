"""Max pooling as Caffe does it."""

from keras import layers


def pooled_size(size):
    """Pixels left of `size` by a 3/2 max pooling in ceil mode."""
    return size // 2


def ceil_pooling(height, width, name, dtype=None):
    """Layers that pool a `height` x `width` map 3/2 in ceil mode without padding, as the authors' graph does.

    On an even side that is Keras' "same", on an odd one "valid"; where only one side is odd it takes two layers,
    one for rows and one for columns.
    """
    rows, columns = ("valid" if side % 2 else "same" for side in (height, width))
    if rows == columns:
        return [layers.MaxPooling2D(3, 2, rows, name=name, dtype=dtype)]
    return [
        layers.MaxPooling2D((3, 1), (2, 1), rows, name=f"{name}_rows", dtype=dtype),
        layers.MaxPooling2D((1, 3), (1, 2), columns, name=f"{name}_columns", dtype=dtype),
    ]
