"""Reads, splits, decodes and batches data sets."""
