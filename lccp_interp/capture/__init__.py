"""Capture: run a model on a prompt and see, per layer and head, where its copy events attend.

`rows` taps the attention of any decoder that transformers routes through its attention interface; `model` loads a
checkpoint and hands the tap out as a `HookedModel`. What is captured is never the T x T pattern but only the rows of
the query positions asked for. `lens` and `nnsight_view` show the same weights to TransformerLens and nnsight, and
`views` holds what they see against the tap. This package knows models; it refuses to know needles, metrics and files
of results.
"""
