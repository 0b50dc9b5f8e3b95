"""Measurements of time and memory; never part of the tests. `make bench` runs them and rewrites README.md.

Every part is a module with `measure(say, quick=...)`, which returns records that JSON can hold, and `table(records)`,
which writes them as Markdown. `run` keeps the records of the parts it ran; `gpu` is the part that needs a CUDA device.
"""
