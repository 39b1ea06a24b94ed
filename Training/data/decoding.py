"""Picture files of every format that Pillow decodes, as RGB pixels; may be called from several threads.

Decoding takes up to `BYTES_A_PIXEL` of memory for each pixel of the file. All threads together decode at most
`LARGEST_PIXELS` at a time, so that the whole process takes no more than 2.2 GB for it, whatever the pictures are.
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

LARGEST_PIXELS = 90_000_000  # of a picture, and of all pictures that are decoded at a time
BYTES_A_PIXEL = 24  # measured: 6 to 14 for most formats, 19 for JPEG 2000, 22 for WebP
DRAFT = 2  # a JPEG is decoded to at least this multiple of the size that is asked for
NOT_READ = ("EPS",)  # Pillow would run Ghostscript, a program, on the file
BLOCK = 2**20  # pixels of a picture whose numbers are stretched at a time
LARGEST_NUMBER = float(np.finfo("float32").max)

# Once for the process, since `catch_warnings` is not made for threads: what Pillow only warns of, it reads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Budget:
    """An amount that threads share: `with budget.take(n)` waits until `n` of it are free."""

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
    """The first frame of a picture file, upright (EXIF), as RGB.

    Grey, palette and CMYK are converted; transparency lies over white. 16 bits a channel are scaled to 8; numbers
    without a fixed range (32-bit, floating point) are stretched between their lowest and highest.

    Args:
        path: a file of any format that Pillow decodes, except EPS.
        size: `(height, width)` in pixels, or None for the picture's own. A picture of another size is scaled until it
            just covers this one (bicubic, antialiased), and its middle is taken; one of this size stays bit for bit.
        raw: the file's bytes where they lie in another file; `path` then only names them.

    Returns:
        uint8 `(height, width, 3)`.

    Raises:
        InputError: in one line that names the file: it is not there, no picture, truncated, or has more than
            `LARGEST_PIXELS`.
    """
    try:
        with open_file(path, LARGEST_PICTURE) if raw is None else io.BytesIO(raw) as file:
            if not file.seek(0, os.SEEK_END):
                raise InputError(f"{format_path(path)} is empty")
            file.seek(0)
            with Image.open(file) as image, _PIXELS.take(_count_pixels(image, size)):
                return np.asarray(_decode(image, size))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{format_path(path)} does not exist") from None
    except UnidentifiedImageError:
        raise InputError(f"{format_path(path)} is not a picture that can be read") from None
    # A broken file can raise nearly anything; none of it may reach the user as a traceback.
    except Exception as error:
        reason = getattr(error, "strerror", None) or shorten(error)
        raise InputError(f"{format_path(path)} cannot be read: {reason}") from None


def _count_pixels(image, size):
    """The pixels that decoding to a size takes memory for; the picture is set to be decoded small where it can.

    A progressive JPEG that is decoded small still has all its coefficients in memory, a quarter of the bytes.
    """
    pixels, before = image.width * image.height, image.size
    if pixels > LARGEST_PIXELS:
        raise ValueError(f"{image.width}x{image.height} are more than {LARGEST_PIXELS:,} pixels")
    if image.format in NOT_READ:
        raise ValueError(f"{image.format} is not supported")
    if size:
        side = DRAFT * max(size)  # the EXIF orientation may swap the sides
        image.draft(None, (side, side))
    return pixels if image.size == before else pixels // 2


def _decode(image, size):
    image.load()
    # PPM, whose 16 bits Pillow gives as 32
    sixteen = image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I")
    image = _convert_to_eight_bits(_orient(image), sixteen)
    if size:
        image = ImageOps.fit(image, size[::-1])
    return _blend_over_white(image)


def _orient(image):
    with contextlib.suppress(Exception):  # broken EXIF says nothing of the pixels
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _convert_to_eight_bits(image, sixteen):
    """As mode RGB or RGBA; `sixteen` says that the numbers of a grey picture are of 16 bits."""
    if image.mode[0] in "IF":  # I, F, I;16, I;16B
        values = np.asarray(image)
        grey = (values >> 8).astype("uint8") if sixteen else _stretch(values)
        return Image.fromarray(grey).convert("RGB")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _stretch(values):
    """Grey values as uint8: 0 the lowest, 255 the highest; in blocks, since the arithmetic takes 8 bytes a number."""

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
    """Picture files in a folder and below it, sorted: those whose ending is one of Pillow's.

    Hidden files, and all that lies in hidden folders below this one, are left out.

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
    return sorted(path for path in found if path.suffix.lower() in endings and path.is_file())
