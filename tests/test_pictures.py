"""Picture files: all kinds become upright 8-bit RGB, and broken ones give one line."""

import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from Training.data import decoding
from Training.errors import InputError

pytestmark = pytest.mark.filterwarnings(r"ignore::Warning:PIL\.")

ROOT = Path(__file__).parent.parent
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def write(path, image, **options):
    image.save(path, **options)
    return path


def write_bomb(path, width=60_000, height=60_000):
    """Write a PNG of a few bytes that claims to be very large."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    return path


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "webp", "ppm", "tga", "ico", "jp2", "qoi"])
def test_pictures_of_the_requested_size_are_not_changed(tmp_path, ending):
    options = {"lossless": True} if ending == "webp" else {}
    path = write(tmp_path / f"a.{ending}", Image.fromarray(PIXELS), **options)
    for size in (None, (32, 32)):
        read = decoding.read(path, size)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, PIXELS)


def test_exif_orientation_is_applied(tmp_path):
    upright = PIXELS[:16]  # (16, 32): a quarter turn swaps the sides
    stored = {  # how a camera stores an upright picture: EXIF 2.32, tag 0x0112
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = write(tmp_path / "a.png", Image.fromarray(np.ascontiguousarray(pixels)), exif=exif)
        np.testing.assert_array_equal(decoding.read(path), upright)
    write(path, Image.fromarray(upright), exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    np.testing.assert_array_equal(decoding.read(path), upright)


def test_transparency_is_blended_over_white(tmp_path):
    clear = Image.fromarray(np.dstack([PIXELS, np.full((32, 32), 255, np.uint8)]))
    clear.putpixel((3, 5), (10, 20, 30, 0))
    clear.putpixel((4, 5), (0, 0, 0, 128))
    expected = PIXELS.copy()
    expected[5, 3], expected[5, 4] = 255, 127
    for ending in ("png", "webp", "tif"):
        options = {"lossless": True, "exact": True} if ending == "webp" else {}
        np.testing.assert_array_equal(decoding.read(write(tmp_path / f"a.{ending}", clear, **options)), expected)
    np.testing.assert_array_equal(decoding.read(tmp_path / "a.png", (32, 32)), expected)
    palette = Image.fromarray(np.eye(4, dtype=np.uint8), "P")
    palette.putpalette([0, 0, 255, 9, 9, 9])
    read = decoding.read(write(tmp_path / "p.gif", palette, transparency=1))
    np.testing.assert_array_equal(read, np.where(np.eye(4)[..., None] == 1, [255, 255, 255], [0, 0, 255]))
    grey = write(tmp_path / "l.png", Image.fromarray(PIXELS[..., 0]), transparency=int(PIXELS[0, 0, 0]))
    assert (decoding.read(grey)[0, 0] == 255).all()


def test_sixteen_bits_and_other_ranges_are_scaled_not_clipped(tmp_path):
    ramp = np.arange(0, 2**16, 64, dtype=np.uint16).reshape(32, 32)
    expected = np.repeat((ramp // 256).astype(np.uint8)[..., None], 3, axis=-1)
    for name in ("a.png", "a.tif", "a.pgm"):
        np.testing.assert_array_equal(decoding.read(write(tmp_path / name, Image.fromarray(ramp))), expected)
    for values in (ramp / 1e5 - 3, (ramp.astype("int32") - 9) * 1000, ramp.astype("int32") // 64):
        image = Image.fromarray(values.astype("float32" if values.dtype.kind == "f" else "int32"))
        for name in ("f.tif", "f.pfm") if image.mode == "F" else ("f.tif",):
            read = decoding.read(write(tmp_path / name, image))
            np.testing.assert_allclose(read[..., 0], ramp / ramp.max() * 255, atol=0.51)


def test_grey_cmyk_and_one_bit_become_rgb(tmp_path):
    grey = Image.fromarray(PIXELS[..., 0])
    np.testing.assert_array_equal(decoding.read(write(tmp_path / "a.png", grey)), np.stack([PIXELS[..., 0]] * 3, -1))
    inks = Image.merge("CMYK", [Image.new("L", (8, 8), ink) for ink in (0, 255, 255, 0)])
    np.testing.assert_allclose(decoding.read(write(tmp_path / "a.jpg", inks)).mean((0, 1)), [255, 0, 0], atol=3)
    bits = decoding.read(write(tmp_path / "b.png", grey.convert("1")))
    assert set(np.unique(bits)) == {0, 255} and bits.shape == (32, 32, 3)


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        options = {"lossless": True} if name == "a.webp" else {}
        path = write(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], **options)
        assert (decoding.read(path) == [255, 0, 0]).all(), name


def test_other_sizes_are_scaled_with_antialiasing_and_center_cropped(tmp_path):
    thirds = np.zeros((32, 96, 3), np.uint8)
    thirds[:, 32:64] = PIXELS
    for pixels in (thirds, thirds.transpose(1, 0, 2)):
        path = write(tmp_path / "a.png", Image.fromarray(np.ascontiguousarray(pixels)))
        middle = PIXELS if pixels is thirds else PIXELS.transpose(1, 0, 2)
        np.testing.assert_array_equal(decoding.read(path, (32, 32)), middle)
    board = np.kron(np.indices((64, 64)).sum(axis=0) % 2, np.ones((4, 4))).astype(np.uint8) * 255
    small = decoding.read(write(tmp_path / "b.png", Image.fromarray(board)), (16, 24))
    assert small.shape == (16, 24, 3) and abs(small[2:-2, 2:-2].astype(int) - 127).max() < 20
    for shape in ((1, 5000), (5000, 1), (1, 1)):
        path = write(tmp_path / "c.png", Image.fromarray(np.full(shape, 77, np.uint8)))
        assert (decoding.read(path, (32, 32)) == 77).all()


def test_large_jpegs_are_decoded_small_and_look_the_same(tmp_path, monkeypatch):
    y, x = np.mgrid[0:900, 0:1200]
    waves = np.stack([np.sin(x / 90), np.cos(y / 70), np.sin((x + y) / 110)], -1) * 100 + 128
    image = Image.fromarray(waves.astype(np.uint8))
    exact = decoding.read(write(tmp_path / "a.png", image), (32, 32)).astype(int)
    fit, decoded = decoding.ImageOps.fit, []
    monkeypatch.setattr(decoding.ImageOps, "fit", lambda image, size: decoded.append(image.size) or fit(image, size))
    drafted = decoding.read(write(tmp_path / "a.jpg", image, quality=95), (32, 32))
    assert decoded == [(150, 113)]
    assert abs(exact - drafted).max() <= 8 and abs(exact - drafted).mean() < 2


def write_broken_files(folder):
    whole = write(folder / "whole.png", Image.fromarray(PIXELS)).read_bytes()
    jpeg = write(folder / "whole.jpg", Image.fromarray(np.kron(PIXELS, np.ones((8, 8, 1), np.uint8)))).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no picture")
    (folder / "vector.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (folder / "two\nlines.png").write_text("no picture")
    os.mkfifo(folder / "pipe.png")
    write_bomb(folder / "bomb.png")
    write_bomb(folder / "large.png", 12_000, 12_000)
    return {
        "cut.png": "cannot be read: ", "cut.jpg": "cannot be read: image file is truncated", "empty.png": "is empty",
        "text.jpg": "is not a readable picture", "vector.eps": "EPS is not supported",
        "two\\nlines.png": "is not a readable picture",
        "pipe.png": "must be a regular file, but is a FIFO", "bomb.png": "cannot be read: ",
        "large.png": "more than 90,000,000 pixels",
        "nothing.png": "does not exist", ".": "is a directory",
    }  # fmt: skip


def test_incomplete_pictures_are_refused_in_one_line_that_names_them(tmp_path):
    for name, said in write_broken_files(tmp_path).items():
        with pytest.raises(InputError) as refusal:
            decoding.read(tmp_path / name.replace("\\n", "\n"), (32, 32))
        message = str(refusal.value)
        assert said in message and "\n" not in message and (name == "." or name in message), message


def test_threads_read_the_same(tmp_path):
    paths = [
        write(tmp_path / f"{i}.{ending}", Image.fromarray(np.roll(PIXELS, i, axis=0)), quality=90)
        for i in range(24) for ending in ("png", "jpg")
    ]  # fmt: skip
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda path: decoding.read(path, (24, 24)), paths))
    np.testing.assert_array_equal(together, [decoding.read(path, (24, 24)) for path in paths])


def test_a_folder_s_pictures_are_found_below_it(tmp_path):
    for name in ("b.png", "a/c.JPG", "a/d.txt", ".hidden.png", "e", ".thumbs/b.png", "a/.f/g/h.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in decoding.find_pictures(tmp_path)] == ["a/c.JPG", "b.png"]


def test_an_unreadable_folder_is_not_reported_as_empty(tmp_path, monkeypatch):
    def refuse(path):  # permissions do not stop root
        raise PermissionError(13, "Permission denied", str(path))

    assert decoding.find_pictures(tmp_path) == []
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=rf"^{tmp_path} cannot be read: Permission denied$"):
        decoding.find_pictures(tmp_path)


def test_reading_starts_no_framework():
    code = "import sys, Training.data.decoding; sys.exit(bool({'keras', 'tensorflow', 'jax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_threads_decode_no_more_than_the_budget_at_a_time(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"{i}.png", Image.fromarray(PIXELS)) for i in range(12)]
    now, most, lock = [0], [0], threading.Lock()
    decode = decoding._decode

    def count(image, size):
        with lock:
            now[0] += image.width * image.height
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        try:
            return decode(image, size)
        finally:
            with lock:
                now[0] -= image.width * image.height

    monkeypatch.setattr(decoding, "_decode", count)
    monkeypatch.setattr(decoding, "_PIXELS", decoding.Budget(3 * 1024))
    with ThreadPoolExecutor(12) as pool:
        assert all((image == PIXELS).all() for image in pool.map(decoding.read, paths))
    assert most == [3 * 1024]
    (tmp_path / "cut.png").write_bytes(paths[0].read_bytes()[:2000])
    with pytest.raises(InputError):
        decoding.read(tmp_path / "cut.png")
    assert decoding._PIXELS.used == 0  # also after a failure


MEASURE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from Training.data import decoding

def measure_peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

decoding.LARGEST_PIXELS = int(sys.argv[1])
decoding._PIXELS = decoding.Budget(decoding.LARGEST_PIXELS)
decoding.read(sys.argv[2])
before = measure_peak()
with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda path: decoding.read(path).shape, sys.argv[3:] * 8))
print(measure_peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux")
@pytest.mark.parametrize("mode, ending", [("F", "tif"), ("RGBA", "webp")])
def test_eight_threads_stay_within_the_stated_memory(tmp_path, mode, ending):
    """Pictures have exactly the limit, which is reduced to a hundredth."""
    options = {"compression": "tiff_deflate"} if ending == "tif" else {"lossless": True} if ending == "webp" else {}
    small = write(tmp_path / f"small.{ending}", Image.new(mode, (10, 10)), **options)
    large = write(tmp_path / f"large.{ending}", Image.new(mode, (1200, 750)), **options)
    pixels = 1200 * 750
    assert 100 * pixels == decoding.LARGEST_PIXELS
    command = [sys.executable, "-c", MEASURE, str(pixels), str(small), str(large)]
    # As for pictures of the real limit: freed memory is returned at once, and 2 MB (a huge page) are little.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": ""}
    peak = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment, timeout=60).stdout)
    # In addition to the pixels, each thread has a stack and buffers.
    assert peak < decoding.BYTES_A_PIXEL * pixels + 8 * 2**20, f"{peak / pixels:.1f} bytes a pixel"


def test_infinite_numbers_are_the_lowest_and_the_highest(tmp_path, recwarn):
    values = np.array([[-np.inf, 0, np.inf, np.nan]], "float32")
    read = decoding.read(write(tmp_path / "a.tif", Image.fromarray(values)))
    assert read[0, :, 0].tolist() == [0, 128, 255, 128] and not recwarn.list
