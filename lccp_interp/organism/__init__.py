"""The embedded default: a small model trained from scratch, so that every question has a real trajectory to ask.

The organism is a small Llama trained on a synthetic language in two stages: *pretrain* on short contexts, then *lccp*
(long-context continual pre-training) with a raised RoPE base and contexts up to 4096 tokens. It is not a stand-in for a
large model: it is a subject whose heads are few enough to look at one by one, whose training data are known to the
token, and which anybody can grow again from a seed.

Rooms: :mod:`~lccp_interp.organism.language` (what is said, with a loss weight per token; no torch),
:mod:`~lccp_interp.organism.tokenizer` (words first, bytes as fallback, lossless),
:mod:`~lccp_interp.organism.recipe` (sizes and schedules, as data), :mod:`~lccp_interp.organism.train` (the loop).

Importing this package imports none of them; ask for the room you need.
"""
