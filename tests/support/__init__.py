"""Shared by tests and benchmarks: small networks, generated archives, a second implementation of the network."""
