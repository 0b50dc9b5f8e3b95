"""Tasks: prompts whose needle and answer stand at token positions known by construction.

`pieces` turns text into tokens piece by piece, `haystack` holds filler text cut at sentence ends, `niah` builds the
grid of needle-in-a-haystack cases. This package knows tokenizers and text; it refuses to know models and imports no
torch.
"""
