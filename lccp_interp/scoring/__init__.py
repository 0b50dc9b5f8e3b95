"""Scoring: from attention rows to per-head numbers.

`metrics` holds pure functions of one case's rows in one layer, `engine` streams a model's cases through them, `types`
sorts heads by what they do on repeated random tokens. This package knows rows, spans and token ids; it refuses to know
files, trajectories and statistics over cases.
"""
