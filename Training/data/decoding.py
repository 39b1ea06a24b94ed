"""Decodes picture files to RGB pixels, in every format that Pillow supports. Threads may call it concurrently.

Decoding takes up to `BYTES_A_PIXEL` bytes of memory for each pixel of the file. All threads together decode at most
`LARGEST_PIXELS` pixels at a time, which limits the memory to 2.2 GB for any pictures.
"""

import contextlib
import io
import os
import threading
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from Training.errors import InputError, format_path, shorten
from Training.files import LARGEST_PICTURE, open_file

LARGEST_PIXELS = 90_000_000  # of a picture, and of all pictures that are decoded at the same time
BYTES_A_PIXEL = 24  # measured: 6 to 14 for most formats, 19 for JPEG 2000, 22 for WebP
DRAFT = 2  # a JPEG is decoded to at least this multiple of the requested size
NOT_READ = ("EPS",)  # Pillow would run Ghostscript on the file
BLOCK = 2**20  # pixels whose values are stretched at a time
LARGEST_NUMBER = float(np.finfo("float32").max)

# Pillow's warnings are about files that it can read. The filter is set globally: `catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Budget:
    """An amount that threads share: `with budget.take(n)` waits until `n` are free."""

    def __init__(self, total):
        self.total = total
        self.used = 0
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, amount):
        with self.changed:
            self.changed.wait_for(lambda: self.used + amount <= self.total)
            self.used += amount
        try:
            yield
        finally:
            with self.changed:
                self.used -= amount
                self.changed.notify_all()


_PIXELS = Budget(LARGEST_PIXELS)


def read(path, size=None, raw=None):
    """Decode the first frame of a picture file as RGB, rotated as its EXIF data says.

    Grey, palette and CMYK pictures are converted; transparent ones are blended over white. Channels of 16 bits are
    scaled to 8. Values without a fixed range (32-bit integers, floats) are stretched from their lowest to their
    highest.

    Args:
        path: a file of any format that Pillow decodes, except EPS.
        size: `(height, width)` in pixels, or None to keep the size. A picture of another size is scaled until it just
            covers this one (bicubic, antialiased), and its center is cropped. One of this size is not changed.
        raw: bytes of the file if it is part of another file; `path` is then only its name.

    Returns:
        uint8 `(height, width, 3)`.

    Raises:
        InputError: the file does not exist, is not a picture, is truncated, or has more than `LARGEST_PIXELS` pixels.
    """
    try:
        with open_file(path, LARGEST_PICTURE) if raw is None else io.BytesIO(raw) as file:
            if not file.seek(0, os.SEEK_END):
                raise InputError(f"{format_path(path)} is empty")
            file.seek(0)
            # `closing` frees the decoded pixels before others may decode; the end of Pillow's own context does not.
            with Image.open(file) as image, _PIXELS.take(_count_pixels(image, size)), contextlib.closing(image):
                return np.asarray(_decode(image, size))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{format_path(path)} does not exist") from None
    except UnidentifiedImageError:
        raise InputError(f"{format_path(path)} is not a readable picture") from None
    # A damaged file can raise nearly anything; the user must not see a traceback.
    except Exception as error:
        reason = getattr(error, "strerror", None) or shorten(error)
        raise InputError(f"{format_path(path)} cannot be read: {reason}") from None


def _count_pixels(image, size):
    """Return the number of pixels to reserve memory for, and ask for decoding at a reduced size if possible.

    A progressive JPEG decoded at a reduced size still has all its coefficients in memory, a quarter of the bytes.
    """
    pixels, before = image.width * image.height, image.size
    if pixels > LARGEST_PIXELS:
        raise ValueError(f"{image.width}x{image.height} is more than {LARGEST_PIXELS:,} pixels")
    if image.format in NOT_READ:
        raise ValueError(f"{image.format} is not supported")
    if size:
        side = DRAFT * max(size)  # the EXIF orientation may swap the sides
        image.draft(None, (side, side))
    return pixels if image.size == before else pixels // 2


def _decode(image, size):
    image.load()
    # Pillow returns the 16 bits of a PPM as 32.
    sixteen = image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I")
    image = _convert_to_eight_bits(_orient(image), sixteen)
    if size:
        image = ImageOps.fit(image, size[::-1])
    return _blend_over_white(image)


def _orient(image):
    with contextlib.suppress(Exception):  # the pixels are fine even if the EXIF data is damaged
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _convert_to_eight_bits(image, sixteen):
    """Return a picture of mode RGB or RGBA; `sixteen` is True if the values of a grey picture have 16 bits."""
    if image.mode[0] in "IF":  # I, F, I;16, I;16B
        values = np.asarray(image)
        grey = (values >> 8).astype("uint8") if sixteen else _stretch(values)
        return Image.fromarray(grey).convert("RGB")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _stretch(values):
    """Return grey values stretched to uint8, computed in blocks to save memory."""

    def finite(block):
        return np.nan_to_num(block.astype("float64"), posinf=LARGEST_NUMBER, neginf=-LARGEST_NUMBER)

    blocks = np.array_split(values.reshape(-1), -(-values.size // BLOCK))
    low, high = min(finite(block).min() for block in blocks), max(finite(block).max() for block in blocks)
    scale = 255 / max(high - low, 1e-30)
    stretched = [((finite(block) - low) * scale).round().astype("uint8") for block in blocks]
    return np.concatenate(stretched).reshape(values.shape)


def _blend_over_white(image):
    if image.mode == "RGB":
        return image
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def find_pictures(folder):
    """Return the sorted picture files in and below a folder: those with a file extension that Pillow knows.

    Hidden files and folders are left out.

    Raises:
        InputError: a folder cannot be read.
    """

    def refuse(error):
        raise InputError(f"{format_path(error.filename)} cannot be read: {error.strerror}")

    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = []
    for where, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [Path(where, name) for name in files if name[0] != "."]
    return sorted(path for path in found if path.suffix.lower() in endings)
