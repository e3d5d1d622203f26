"""Measurements. Services do not use this package. `python -m benchmarks.NAME --help` describes a
program."""
