"""What tests and benchmarks share: small networks, generated archives, a second implementation of the network."""
