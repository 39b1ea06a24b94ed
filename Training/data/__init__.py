"""Data sets: read, split, decoded and batched."""
