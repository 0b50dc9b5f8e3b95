"""Behaviour: what a checkpoint says when it is asked, and how often it is right.

`sampling` draws tokens that depend on nothing but their item, `decoding` writes the answers of many prompts together,
`evaluate` grades them and makes tables. This package knows models and items; it refuses to know how items are made and
what attention heads do.
"""
