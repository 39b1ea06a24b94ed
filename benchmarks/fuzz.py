"""Feed mutated files to their readers. Each file must be read, or refused in one line; nothing else may happen.

    python -m benchmarks.fuzz --archives 20000 --recipes 5000 --pictures 20000 --shards 5000 --checkpoints 2000 \\
        --results 2000

It counts what was read, what was refused, and what went wrong: an exception other than `InputError`, a message of
several lines, more than `SLOW_S` seconds or `LARGEST_GROWTH` bytes of memory, or an audited event (a command, a file
that is written or removed, a connection). A case is stopped after `HANGS_S` seconds. The exit code is 1 if anything
went wrong.
"""

import argparse
import hashlib
import io
import json
import random
import resource
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support import tiny
from Training.console import entry_point, run_program
from Training.data import archives, decoding, shards
from Training.errors import InputError
from Training.recipe import Recipe
from Training.runs import checkpoint, history

ROOT = Path(__file__).resolve().parent.parent

COUNTS = {
    "archives": 20_000,
    "recipes": 5_000,
    "pictures": 20_000,
    "shards": 5_000,
    "checkpoints": 2_000,
    "results": 2_000,
}
SLOW_S = 5.0
HANGS_S = 60
LARGEST_GROWTH = 2**30  # bytes of memory that one case may add to the peak
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


def mutate(raw, chance, hostile=HOSTILE):
    """Return the bytes with a few random changes: flips, cuts, copies, repeats, hostile pieces."""
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


def make_archive():
    """Return an archive like CIFAR-10's with four images per file, and the bytes of its files."""
    archive = archives.ARCHIVES["cifar10"]._replace(rows=(ROWS, ROWS))
    files = {name: tiny.make_batch(archive, ROWS, i) for i, name in enumerate((*archive.train, *archive.test))}
    files[archive.meta] = tiny.pickle_as_python_2({archive.names: [b"class %d" % i for i in range(10)]})
    return archive, files


def make_archive_case(chance, place, archive, files):
    """Return a case that reads a mutated file, alone or in a folder, or a mutated archive."""
    name = chance.choice(list(files))
    kind = chance.randrange(3)
    if kind == 0:
        return lambda: archives.read_batch(mutate(files["test_batch"], chance), "test_batch", archive, ROWS)
    for old in sorted(place.rglob("*"), reverse=True):
        old.rmdir() if old.is_dir() else old.unlink()
    if kind == 1:
        tiny.write_folder(place, "cifar10", {**files, name: mutate(files[name], chance)})
    else:
        path = tiny.write_tar(place, "cifar10", files)
        path.write_bytes(mutate(path.read_bytes(), chance))
    return lambda: archives.read("cifar10", str(place))


def make_recipe_case(chance):
    """Return a case that reads a recipe with changed bytes or changed values."""
    if chance.random() < 0.5:
        raw = mutate(Recipe().to_json().encode(), chance)
    else:
        values = json.loads(Recipe().to_json())
        for _ in range(chance.randrange(1, 4)):
            odd = [None, [], {}, "", "x" * 10_000, -1, 0, 1, 10**400, 1e308, float("nan"), True, chance.random(), "sgd"]
            values[chance.choice([*values, "no field"])] = chance.choice(odd)
        raw = json.dumps(values).encode()
    return lambda: Recipe.from_json(raw.decode("utf-8", "replace"))


def make_pictures():
    """Return pictures of 24x16 pixels in the usual formats and modes, as pairs of extension and bytes."""
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


def fix_checksums(raw):
    """Return the bytes of a PNG file with correct checksums, so that the reader gets past them."""
    raw, at = bytearray(raw), 8
    while at + 12 <= len(raw):
        end = at + 8 + int.from_bytes(raw[at : at + 4], "big")
        if end + 4 > len(raw):
            break
        raw[end : end + 4] = zlib.crc32(raw[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(raw)


def make_picture_case(chance, place, files):
    """Return a case that reads a mutated picture, in its own size or fitted to 32x32."""
    ending, raw = chance.choice(files)
    raw = mutate(raw, chance, LARGE)
    path = place / f"picture{chance.choice((ending, ending, '.jpg', ''))}"
    path.write_bytes(fix_checksums(raw) if ending == ".png" and chance.random() < 0.8 else raw)
    return lambda: decoding.read(path, chance.choice((None, (32, 32))))


def end_case(*_):
    raise TimeoutError(f"not finished within {HANGS_S} s")


class Audit:
    """Records audit events that a reader must not cause."""

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
    """Run one case; return "read", "refused", or what went wrong."""
    started, memory = time.perf_counter(), measure_peak_memory()
    audit.seen.clear()
    audit.on = True
    signal.signal(signal.SIGALRM, end_case)
    signal.alarm(HANGS_S)
    try:
        case()
        verdict = "read"
    except InputError as error:
        verdict = "refused" if "\n" not in str(error) and len(str(error)) < 1000 else f"wrong: long message {error}"
    except BaseException as error:  # anything else is what the fuzzer looks for
        verdict = f"wrong: {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        audit.on = False
    if audit.seen:
        return f"wrong: {audit.seen[0]}"
    if measure_peak_memory() - memory > LARGEST_GROWTH:
        return f"wrong: more than {LARGEST_GROWTH >> 20} MB"
    return f"wrong: {SLOW_S} s" if time.perf_counter() - started > SLOW_S else verdict


def measure_peak_memory():
    """Return the largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def make_shard_case(chance, place, originals):
    """Return a case that reads shards: the bytes of the index or a shard, or the columns of the index, are changed."""
    index, shard, *_ = originals
    changed = chance.choice((index, index, shard))
    if changed == index and chance.random() < 0.6:
        raw = change_columns(originals[index], chance)
    else:
        raw = mutate(originals[changed], chance, LARGE)
    for name, content in {**originals, changed: raw}.items():
        (place / name).write_bytes(content)

    def read():
        parts, _ = shards.read("shards", place)
        for listing in parts.values():
            listing.fetch(0)

    return read


def change_columns(raw, chance):
    """Return the bytes of an index in which a number, or the type or shape of a column, is changed."""
    with np.load(io.BytesIO(raw)) as file:
        columns = dict(file)
    name = chance.choice(list(columns))
    values, kind = columns[name], chance.randrange(6)
    if kind == 0 and values.dtype.kind == "i":
        values = values.copy()
        values[chance.randrange(len(values))] = chance.choice((-1, 0, 1, 7, 2**31, 2**62, -(2**63), 10**9))
    elif kind == 1:
        texts = ("U", "S", "O")
        kinds = texts if name == "classes" else (*texts, "?", "f2", "f8", "c16", "u1", "u8", "V8", "M8[s]")
        values = values.astype(chance.choice(kinds))
    elif kind == 2:
        values = chance.choice((values[:-1], values[:0], values[0], values[None], np.repeat(values, 3), values[::-1]))
    elif kind == 3:
        columns["no column"] = values
    elif kind == 4:
        values = np.array(chance.choice((1, -1, 10**18, "x", b"x", float("nan"), [[]], [["a"]])))
    columns[name] = values
    if kind == 5:
        del columns[name]
    file = io.BytesIO()
    np.savez(file, **columns)
    return file.getvalue()


def write_shards(place):
    """Write two small shards and their index; return their folder."""
    from Training.tools import shards as tool

    pixels = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = place / "pictures" / ("train", "val")[i % 2] / "ab"[i // 2 % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    tool.write(place / "pictures", place / "shards", per_shard=2)
    return place / "shards"


def write_run(place):
    """Write the files of a finished run, with a checkpoint of a few numbers; return its folder."""
    (place / "backup").mkdir(parents=True)
    result = {"test_error_percent": 7.5, "running_time_s": 60.0, "parameters": 1000, "name": "tiny", "git_commit": None}
    (place / "recipe.json").write_text(Recipe().to_json())
    (place / "result.json").write_text(json.dumps(result))
    (place / "history.csv").write_text("epoch,loss,val_accuracy\n0,1.5,0.5\n1,1.25,NA\n")
    state = {"epoch": 1, "step": 0, "stopped": False, "recipe": {}, "callbacks": {}, "metrics": []}
    state |= {"history": "epoch,loss\n0,1.5\n", "events": {"events.out.tfevents.1": 10}}
    checkpoint.write(place, 1, state, {"a": np.arange(6, dtype="float32").reshape(2, 3), "b": np.float32(0.5)})
    return place


def make_checkpoint_case(chance, place, original):
    """Return a case that reads a checkpoint with changed bytes, in most cases with a correct checksum."""
    raw, head = mutate(original, chance, LARGE), len(checkpoint.MAGIC) + 65
    if chance.random() < 0.7:
        content = mutate(original[head:], chance, (*LARGE, b'"x"', b"null", b"-1", b"[1, 2]", b"1e999"))
        raw = checkpoint.MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n" + content
    (place / "backup" / "step-000000001.checkpoint").write_bytes(raw)

    def read():
        reasons = []
        if checkpoint.load_newest(place, reasons.append) is None:
            raise InputError(reasons[0])

    return read


def make_result_case(chance, place, original):
    """Return a case that reads a `result.json` with changed bytes or changed values."""
    raw = mutate(original, chance)
    if chance.random() < 0.7:
        values = json.loads(original)
        odd = [None, [], {}, "", "x" * 10_000, [1, 2], True, -1, 10**400, float("nan"), float("inf"), chance.random()]
        for _ in range(chance.randrange(1, 3)):
            values[chance.choice([*values, "another"])] = chance.choice(odd)
        raw = json.dumps(values).encode()
    (place / "result.json").write_bytes(raw)
    return lambda: history.read_run(place)


RUN_CASES = {
    "checkpoints": (make_checkpoint_case, "backup/step-000000001.checkpoint"),
    "results": (make_result_case, "result.json"),
}


def make_cases(kind, chance, place):
    """Write the files of a kind to a new folder; return a function that changes one and returns the next case."""
    if kind == "archives":
        archive, files = make_archive()
        return lambda: make_archive_case(chance, place, archive, files)
    if kind == "pictures":
        originals = make_pictures()
        return lambda: make_picture_case(chance, place, originals)
    if kind == "shards":
        written = write_shards(place)
        originals = {path.name: path.read_bytes() for path in sorted(written.iterdir())}
        return lambda: make_shard_case(chance, written, originals)
    if kind in ("checkpoints", "results"):
        run = write_run(place / "run")
        case, name = RUN_CASES[kind]
        original = (run / name).read_bytes()
        return lambda: case(chance, run, original)
    return lambda: make_recipe_case(chance)


def fuzz(counts, seed=0):
    """Run the cases.

    Args:
        counts: `{kind: number of cases}`, see `COUNTS`.
        seed: int.

    Returns:
        `{kind: Counter of verdicts}`.
    """
    chance, audit, original = random.Random(seed), Audit(), archives.ARCHIVES["cifar10"]
    verdicts = {kind: Counter() for kind in counts}
    archives.ARCHIVES["cifar10"] = make_archive()[0]
    try:
        for kind, count in counts.items():
            with tempfile.TemporaryDirectory() as place:
                next_case = make_cases(kind, chance, Path(place))
                for _ in range(count):
                    verdicts[kind][judge(next_case(), audit)] += 1
    finally:
        archives.ARCHIVES["cifar10"] = original
    return verdicts


@entry_point("python -m benchmarks.fuzz")
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for kind, count in COUNTS.items():
        parser.add_argument(f"--{kind}", type=int, default=count, help=f"number of cases (default: {count})")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    seed = options.pop("seed")
    before = measure_peak_memory()
    verdicts = fuzz(options, seed)
    for kind, counts in verdicts.items():
        print(kind, ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    print(f"peak memory {measure_peak_memory() >> 20} MB, {before >> 20} MB before the first case")
    return int(any(verdict.startswith("wrong") for counts in verdicts.values() for verdict in counts))


if __name__ == "__main__":
    run_program(main)
