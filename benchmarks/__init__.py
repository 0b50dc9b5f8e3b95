"""Measurements of time and memory; never part of the tests. `make bench` runs them and rewrites README.md."""
