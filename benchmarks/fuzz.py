"""Feed mutated archives and recipes to their readers: each must be read or refused in one line, and do nothing else.

    python benchmarks/fuzz.py --archives 20000 --recipes 5000

Counts what was read, what was refused, and what went wrong (another exception than `InputError`, a message of several
lines, more than `SLOW_S` seconds, or an audited event: a command, an import by pickle, a file written, a connection).
Exit code 1 if anything went wrong.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402

from Training import archives  # noqa: E402
from Training.recipe import InputError, Recipe  # noqa: E402

SLOW_S = 5.0
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


def mutated(raw, chance):
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
            raw[at:at] = chance.choice(HOSTILE)
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
    started = time.perf_counter()
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
    return f"wrong: {SLOW_S} s" if time.perf_counter() - started > SLOW_S else verdict


def fuzz(archive_count, recipe_count, seed=0):
    """Run the cases; returns `{"archives": Counter, "recipes": Counter}` of verdicts."""
    chance, audit = random.Random(seed), Audit()
    archive, files = small_archive()
    verdicts = {"archives": Counter(), "recipes": Counter()}
    original = archives.ARCHIVES["cifar10"]
    archives.ARCHIVES["cifar10"] = archive
    try:
        with tempfile.TemporaryDirectory() as place:
            for _ in range(archive_count):
                verdicts["archives"][judge(archive_case(chance, Path(place), archive, files), audit)] += 1
        for _ in range(recipe_count):
            verdicts["recipes"][judge(recipe_case(chance), audit)] += 1
    finally:
        archives.ARCHIVES["cifar10"] = original
    return verdicts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--archives", type=int, default=20_000)
    parser.add_argument("--recipes", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    verdicts = fuzz(words.archives, words.recipes, words.seed)
    for kind, counts in verdicts.items():
        print(kind, ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    return int(any(verdict.startswith("wrong") for counts in verdicts.values() for verdict in counts))


if __name__ == "__main__":
    sys.exit(main())
