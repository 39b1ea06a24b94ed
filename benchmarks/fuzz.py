"""Feed mutated archives, recipes and pictures to their readers: each must be read or refused in one line, no more.

    python -m benchmarks.fuzz --archives 20000 --recipes 5000 --pictures 20000

Counts what was read, what was refused, and what went wrong (another exception than `InputError`, a message of several
lines, more than `SLOW_S` seconds or `LARGEST_GROWTH` of memory, or an audited event: a command, an import by pickle, a
file written, a connection).
Exit code 1 if anything went wrong.
"""

import argparse
import io
import json
import random
import resource
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support import tiny
from Training.data import archives, decoding
from Training.errors import InputError
from Training.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent

SLOW_S = 5.0
LARGEST_GROWTH = 2**30  # bytes that one case may take
FORBIDDEN = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
    "shutil.rmtree",
    "os.remove",
)
ROWS = 4
LARGE = (b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\x00\x00\xff\xff", b"\xff\xff\x00\x00", b"\x00\x00\x00\x00")
HOSTILE = (
    b"cos\nsystem\n(S'true'\ntR.",
    b"c__builtin__\neval\n(S'1'\ntR.",
    b"cnumpy.core.multiarray\n_reconstruct\n",
    b"\x8c\x02os\x8c\x06system\x93",
    b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"(" * 5000,
    b"\x80\x05",
    b"i__main__\nmain\n",
)


def mutated(raw, chance, hostile=HOSTILE):
    """A few random changes of bytes: flips, cuts, copies, repeats, hostile pieces."""
    raw = bytearray(raw)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        at = chance.randrange(len(raw)) if raw else 0
        kind = chance.randrange(7)
        if kind == 0 and raw:
            raw[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and raw:
            raw[at] = chance.randrange(256)
        elif kind == 2:
            del raw[at : at + chance.choice((1, 4, 64, 4096))]
        elif kind == 3:
            raw[at:at] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 4, 32))))
        elif kind == 4:
            raw[at:at] = chance.choice(hostile)
        elif kind == 5:
            other = chance.randrange(len(raw)) if raw else 0
            raw[at:at] = raw[other : other + chance.choice((4, 64, 600))]
        else:
            del raw[at:]
    return bytes(raw)


def small_archive():
    """An archive like CIFAR-10's, with four images a file, and the bytes of its files."""
    archive = archives.ARCHIVES["cifar10"]._replace(rows=(ROWS, ROWS))
    files = {name: tiny.batch(archive, ROWS, i) for i, name in enumerate((*archive.train, *archive.test))}
    files[archive.meta] = tiny.pickled({archive.names: [b"class %d" % i for i in range(10)]})
    return archive, files


def archive_case(chance, place, archive, files):
    """A mutated file in a whole archive or folder, or a mutated archive."""
    name = chance.choice(list(files))
    kind = chance.randrange(3)
    if kind == 0:
        return lambda: archives.read_batch(mutated(files["test_batch"], chance), "test_batch", archive, ROWS)
    for old in sorted(place.rglob("*"), reverse=True):
        old.rmdir() if old.is_dir() else old.unlink()
    if kind == 1:
        tiny.write_folder(place, "cifar10", {**files, name: mutated(files[name], chance)})
    else:
        path = tiny.write_tar(place, "cifar10", files)
        path.write_bytes(mutated(path.read_bytes(), chance))
    return lambda: archives.read("cifar10", str(place))


def recipe_case(chance):
    """A recipe with changed bytes or changed values."""
    if chance.random() < 0.5:
        raw = mutated(Recipe().to_json().encode(), chance)
    else:
        values = json.loads(Recipe().to_json())
        for _ in range(chance.randrange(1, 4)):
            odd = [None, [], {}, "", "x" * 10_000, -1, 0, 2**70, 1e308, float("nan"), True, chance.random(), "sgd"]
            values[chance.choice([*values, "no field"])] = chance.choice(odd)
        raw = json.dumps(values).encode()
    return lambda: Recipe.from_json(raw.decode("utf-8", "replace"))


def small_pictures():
    """Pictures of 24x16 in the usual formats and modes, as bytes by their file's ending."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 4), dtype=np.uint8)
    colour, clear = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels)
    deep = Image.fromarray(pixels[..., :2].copy().view("<u2")[..., 0])
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = {
        ".png": [(colour, {}), (clear, {}), (colour.quantize(16), {"transparency": 3}), (deep, {})],
        ".jpg": [(colour, {"exif": turned}), (colour.convert("CMYK"), {}), (colour, {"progressive": True})],
        ".gif": [(colour, {"save_all": True, "append_images": [colour.rotate(90)]})],
        ".webp": [(colour, {}), (clear, {"lossless": True, "save_all": True, "append_images": [clear.rotate(90)]})],
        ".tif": [(colour, {"compression": how}) for how in ("raw", "tiff_lzw", "tiff_deflate")] + [(deep, {})],
        ".bmp": [(colour, {}), (colour.quantize(16), {})],
    }
    found = []
    for ending, cases in kinds.items():
        for image, options in cases:
            file = io.BytesIO()
            image.save(file, Image.registered_extensions()[ending], **options)
            found.append((ending, file.getvalue()))
    return found


def with_checksums(raw):
    """The bytes of a PNG with the checksums made true again, so that what lies behind them is reached."""
    raw, at = bytearray(raw), 8
    while at + 12 <= len(raw):
        end = at + 8 + int.from_bytes(raw[at : at + 4], "big")
        if end + 4 > len(raw):
            break
        raw[end : end + 4] = zlib.crc32(raw[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(raw)


def picture_case(chance, place, files):
    """A mutated picture, read in its own size or fitted to 32x32."""
    ending, raw = chance.choice(files)
    raw = mutated(raw, chance, LARGE)
    path = place / f"picture{chance.choice((ending, ending, '.jpg', ''))}"
    path.write_bytes(with_checksums(raw) if ending == ".png" and chance.random() < 0.8 else raw)
    return lambda: decoding.read(path, chance.choice((None, (32, 32))))


class Audit:
    """Counts what a reader must not do, while it reads."""

    def __init__(self):
        self.on = False
        self.seen = []
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if not self.on:
            return
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if event in FORBIDDEN or writes:
            self.seen.append(f"{event} {arguments}")


def judge(case, audit):
    """One case: "read", "refused", or what went wrong."""
    started, memory = time.perf_counter(), peak_memory()
    audit.seen.clear()
    audit.on = True
    try:
        case()
        verdict = "read"
    except InputError as error:
        verdict = "refused" if "\n" not in str(error) and len(str(error)) < 1000 else f"wrong: long message {error}"
    except BaseException as error:  # anything else is what the fuzzer looks for
        verdict = f"wrong: {type(error).__name__}: {error}"
    finally:
        audit.on = False
    if audit.seen:
        return f"wrong: {audit.seen[0]}"
    if peak_memory() - memory > LARGEST_GROWTH:
        return f"wrong: more than {LARGEST_GROWTH >> 20} MB"
    return f"wrong: {SLOW_S} s" if time.perf_counter() - started > SLOW_S else verdict


def peak_memory():
    """The most memory that this process has ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fuzz(archive_count, recipe_count, picture_count=0, seed=0):
    """Run the cases; returns `{"archives": Counter, "recipes": Counter, "pictures": Counter}` of verdicts."""
    chance, audit = random.Random(seed), Audit()
    archive, files = small_archive()
    verdicts = {"archives": Counter(), "recipes": Counter(), "pictures": Counter()}
    original = archives.ARCHIVES["cifar10"]
    archives.ARCHIVES["cifar10"] = archive
    try:
        with tempfile.TemporaryDirectory() as place:
            for _ in range(archive_count):
                verdicts["archives"][judge(archive_case(chance, Path(place), archive, files), audit)] += 1
        with tempfile.TemporaryDirectory() as place:
            originals = small_pictures() if picture_count else []
            for _ in range(picture_count):
                verdicts["pictures"][judge(picture_case(chance, Path(place), originals), audit)] += 1
        for _ in range(recipe_count):
            verdicts["recipes"][judge(recipe_case(chance), audit)] += 1
    finally:
        archives.ARCHIVES["cifar10"] = original
    return verdicts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--archives", type=int, default=20_000)
    parser.add_argument("--recipes", type=int, default=5_000)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    verdicts = fuzz(words.archives, words.recipes, words.pictures, words.seed)
    for kind, counts in verdicts.items():
        print(kind, ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    return int(any(verdict.startswith("wrong") for counts in verdicts.values() for verdict in counts))


if __name__ == "__main__":
    sys.exit(main())
