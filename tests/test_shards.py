"""Damaged or malicious shards and indexes give one line, take little memory, and never a wrong picture."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from Training.data import datasets, shards
from Training.data.crc32c import compute_crc32c
from Training.errors import InputError
from Training.tools import shards as shards_tool


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of twelve training and four validation pictures, five per shard."""
    root = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for i in range(count):
            path = root / "pictures" / part / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    shards_tool.write(root / "pictures", root / "shards", per_shard=5)
    return root / "shards"


@pytest.fixture(scope="module")
def index(folder):
    """The columns of its index."""
    with np.load(folder / "index.npz") as file:
        return dict(file)


def expect_refusal(folder, said):
    """Read the shards, and check and return the error."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=said) as refusal:
            shards.read("shards", folder)
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600
    return str(refusal.value)


@pytest.fixture
def own(folder, tmp_path):
    """Links to the same shards, and a copy of the index."""
    for path in folder.glob("*.tfrecord"):
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.mark.parametrize(
    "column, value, said",
    [
        ("train_shard", -1, "train_shard must be from 0 to 11, received -1"),
        ("train_shard", 10**9, "train_shard must be from 0 to 11, received 1000000000"),
        ("val_shard", 4, "val_shard must be from 0 to 3, received 4"),
        ("train_offset", -5, "train_offset must be from 0 to .*, received -5"),
        ("train_offset", 2**62, "train_offset must be from 0 to .*, received 4611686018427387904"),
        ("train_offset", 2**40, r"train-\d+-of-00003.tfrecord is truncated"),
        ("train_length", -1, "train_length must be from 0 to .*, received -1"),
        ("train_length", 2**31, "train_length must be from 0 to .*, received 2147483648"),
        ("val_label", 2, "val_label must be from 0 to 1, received 2"),
        ("val_label", -1, "val_label must be from 0 to 1, received -1"),
    ],
)
def test_a_number_out_of_range_is_refused(own, index, column, value, said):
    values = index[column].copy()
    values[2] = value
    np.savez(own / "index.npz", **{**index, column: values})
    expect_refusal(own, said)


@pytest.mark.parametrize(
    "column, change, said",
    [
        ("train_label", lambda a: a.astype(bool), "train_label must be 12 integers, received bool"),
        ("train_label", lambda a: a.astype(str), "train_label must be 12 integers, received <U21"),
        ("train_label", lambda a: a.astype(float), "train_label must be 12 integers, received float64"),
        ("train_shard", lambda a: a.astype(bool), "train_shard must be 12 integers, received bool"),
        ("train_offset", lambda a: a + 0j, "train_offset must be 12 integers, received complex128"),
        ("train_offset", lambda a: a.astype("M8[s]"), "train_offset must be 12 integers, received datetime64"),
        ("train_length", lambda a: a[:-1], r"train_length must be 12 integers, received int64 \(11,\)"),
        ("train_length", lambda a: a[None], r"train_length must be 12 integers, received int64 \(1, 12\)"),
        ("train_length", lambda a: a[0], r"train_length must be 12 integers, received int64 \(\)"),
        ("train_length", lambda a: a.astype("uint64") * 0 + 2**63, "received 9223372036854775808"),
        ("train_label", lambda a: a[:0], "must be some integers"),
        ("train_offset", lambda a: np.array([None] * 12), "Object arrays cannot be loaded"),
        ("classes", lambda a: np.arange(2), "classes must be a vector of strings, received int64"),
        ("classes", lambda a: a[0], "classes must be a vector of strings"),
        ("classes", lambda a: a.astype("S"), "classes must be a vector of strings"),
    ],
)
def test_a_column_of_another_type_or_shape_is_refused(own, index, column, change, said):
    np.savez(own / "index.npz", **{**index, column: change(index[column])})
    expect_refusal(own, said)


def test_a_missing_column_is_named(own, index):
    np.savez(own / "index.npz", **{name: values for name, values in index.items() if name != "val_length"})
    expect_refusal(own, "val_length is not a file in the archive")
    np.savez(own / "index.npz", **{name: values for name, values in index.items() if "train" not in name})
    expect_refusal(own, "has no training pictures")


def write_members(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, pieces in members.items():
            with file.open(name, "w", force_zip64=True) as member:
                for piece in pieces:
                    member.write(piece)


def make_array_header(shape, kind="<i8"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_an_index_that_unpacks_to_more_than_the_limit_is_refused_before_unpacking(own, monkeypatch):
    monkeypatch.setattr(shards, "LARGEST_INDEX", 2**22)
    write_members(own / "index.npz", {"classes.npy": [make_array_header((2**20,)), *[bytes(2**20)] * 8]})
    assert (own / "index.npz").stat().st_size < 10_000
    expect_refusal(own, "unpacks to 8,388,736 bytes, more than 4,194,304")


@pytest.mark.parametrize(
    "shape, kind", [((10**15,), "<i8"), ((2**40, 2**40), "<i8"), ((1,), "<U500000000"), ((-1,), "<i8")]
)
def test_an_array_that_claims_to_be_huge_takes_little_memory(own, shape, kind):
    write_members(own / "index.npz", {"classes.npy": [make_array_header(shape, kind)], "train_label.npy": [b""]})
    with pytest.raises(InputError, match="is not an index of shards"):
        shards.read("shards", own)


def test_every_changed_bit_of_a_record_is_found(folder, index, tmp_path):
    """Bits of the length, its checksum, the picture, the bytes around it, and the checksum at the end are flipped."""
    path = next(iter(sorted(folder.glob("train-00000*"))))
    raw = path.read_bytes()
    (second,) = np.flatnonzero(index["train_shard"] == 0)[1:2]
    offset, length = int(index["train_offset"][second]), int(index["train_length"][second])
    expected = raw[offset : offset + length]
    assert shards.read_picture(path, offset, length) == expected
    # The second record starts at the end of the first, which has 12 bytes before its Example and 4 after it.
    start = 12 + int.from_bytes(raw[:8], "little") + 4
    end = start + 12 + int.from_bytes(raw[start : start + 8], "little") + 4
    changed = tmp_path / path.name
    after = offset + length
    for at in (start, start + 8, start + 11, start + 13, offset, offset + 40, after, after + 3, end - 4, end - 1):
        damaged = bytearray(raw)
        damaged[at] ^= 16
        changed.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"{path.name}, byte {offset}: .*checksum"):
            shards.read_picture(changed, offset, length)
    for at in (start - 1, end):  # bytes of the neighbouring records
        damaged = bytearray(raw)
        damaged[at] ^= 16
        changed.write_bytes(damaged)
        assert shards.read_picture(changed, offset, length) == expected
    changed.write_bytes(raw[: offset + 5])
    with pytest.raises(InputError, match="is truncated: it ends inside the picture"):
        shards.read_picture(changed, offset, length)
    for wrong in ((offset + 40, length), (offset, length + 200), (5, 20)):  # an index of other shards
        with pytest.raises(InputError, match="checksum"):
            shards.read_picture(path, *wrong)


def test_a_damaged_record_is_named_and_replaced_by_the_next_of_its_class(folder, own, index, capsys):
    np.savez(own / "index.npz", **index)
    name = shards.name_shard("train", 0, 3)
    raw = bytearray((folder / name).read_bytes())
    raw[int(index["train_offset"][0]) + 60] ^= 1
    (own / name).unlink()
    (own / name).write_bytes(raw)
    images = datasets.load("shards", str(own), size=8).train.images
    following = np.flatnonzero(index["train_label"] == index["train_label"][0])[1]
    np.testing.assert_array_equal(images[0], images[following])
    assert f"{name}, byte {index['train_offset'][0]}: the record's checksum is wrong" in capsys.readouterr().err


def test_checksums_are_those_of_rfc_3720():
    known = {bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E, b"123456789": 0xE3069283}
    for raw, value in known.items():
        assert compute_crc32c(raw) == value
    assert compute_crc32c(b"") == 0


@pytest.mark.parametrize("length", [1, 3, 4, 255, 256, 257, 511, 513, 5000, 65_536])
def test_checksums_do_not_depend_on_rows(length):
    """Compare with the definition, bit by bit."""
    raw = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8).tobytes()
    state = 0xFFFFFFFF
    for byte in raw[-600:] if length > 600 else raw:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    assert compute_crc32c(raw[-600:] if length > 600 else raw) == state ^ 0xFFFFFFFF
