"""Computes CRC-32C, the checksum of TFRecord files, in NumPy.

The CRC is linear over GF(2): with a start value of zero, the checksum of a message is the XOR of the contributions of
its bytes. Each depends only on the byte and its distance from the end. Rows of `ROW` bytes are looked up in one table
for all distances; then the checksums of the rows are combined in pairs.

Source: RFC 3720, appendix B.4 (polynomial and test values);
https://www.tensorflow.org/tutorials/load_data/tfrecord (the mask).
"""

import functools

import numpy as np

POLYNOMIAL = 0x82F63B78  # Castagnoli's, with its bits reversed
ROW = 256


def _advance(states, table):
    """Return the states after one more zero byte."""
    return table[states & 255] ^ (states >> 8)


@functools.cache
def _make_tables():
    """Return the contribution of each byte at each place in a row, uint32 `(ROW, 256)`."""
    table = np.arange(256, dtype="uint32")
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, POLYNOMIAL, 0).astype("uint32")
    rows = [table]
    for _ in range(ROW - 1):
        rows.append(_advance(rows[-1], table))
    return np.stack(rows[::-1])


def _lookup(states, tables):
    """Apply a linear map of 32 bits, given by its values for each of the four bytes, uint32 `(4, 256)`."""
    return functools.reduce(np.bitwise_xor, (tables[i][(states >> 8 * i) & 255] for i in range(4)))


@functools.cache
def _make_shift(power):
    """Return the linear map that advances a state by `ROW * 2**power` zero bytes, uint32 `(4, 256)`."""
    if power:
        before = _make_shift(power - 1)
        return _lookup(before, before)
    table = _make_tables()[-1]
    states = np.arange(256, dtype="uint32") << (8 * np.arange(4, dtype="uint32"))[:, None]
    for _ in range(ROW):
        states = _advance(states, table)
    return states


def compute_crc32c(raw):
    """Return the CRC-32C of bytes as an int."""
    if len(raw) < 4:
        state, table = 0xFFFFFFFF, _make_tables()[-1]
        for byte in raw:
            state = int(table[(state ^ byte) & 255]) ^ (state >> 8)
        return state ^ 0xFFFFFFFF
    # Leading zeros change nothing; a start value of all ones is the same as inverting the first four bytes.
    padding = -len(raw) % ROW
    message = np.zeros(padding + len(raw), "uint8")
    message[padding:] = np.frombuffer(raw, "uint8")
    message[padding : padding + 4] ^= 255
    states = np.bitwise_xor.reduce(_make_tables()[np.arange(ROW), message.reshape(-1, ROW)], axis=1)
    power = 0
    while len(states) > 1:
        if len(states) % 2:
            states = np.concatenate([np.zeros(1, "uint32"), states])
        states = _lookup(states[::2], _make_shift(power)) ^ states[1::2]
        power += 1
    return int(states[0]) ^ 0xFFFFFFFF


def compute_masked_crc32c(raw):
    """Return the checksum as TFRecord files store it: rotated by 15 bits, plus a constant."""
    crc = compute_crc32c(raw)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
