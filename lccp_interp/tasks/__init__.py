"""Tasks: prompts whose needle and answer stand at token positions known by construction.

`pieces` turns text into tokens piece by piece, `needles` does so for a fact and its question, `haystack` holds filler
text cut at sentence ends, `twins` looks for facts that stand in it already. `niah` and `interference` are grids of
needle-in-a-haystack cases; `grids` says what any grid has to be like to be scored. This package knows tokenizers and
text; it refuses to know models and imports no torch.
"""
