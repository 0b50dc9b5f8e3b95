"""Interventions on heads: what a model still does when some of them are silenced, amplified, patched or blinded.

`hooks` holds the context managers, `paths` path patching to the logits, `causal` the check of a run's retrieval heads.
What makes a head work stands in `circuits` (which earlier heads feed it, over `frozen` passes, as a `graph`), `weights`
(what its weights alone would do) and `tracing` (from a run and the name of a head to all that). The room knows models
and runs; it refuses to know statistics beyond the interval of an edge: `dynamics.causal` makes them of the tables
written here.
"""
