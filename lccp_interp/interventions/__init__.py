"""Interventions on heads: what a model still does when some of them are silenced, amplified, patched or blinded.

`hooks` holds the context managers, `paths` path patching, `causal` the check of a run's retrieval heads. The room knows
models and runs; it refuses to know statistics, which `dynamics.causal` makes of the tables written here.
"""
