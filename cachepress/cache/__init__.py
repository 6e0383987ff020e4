"""The compressed cache, whose heads hold part of a text's key-value pairs, and operations on it.

A ``CompressedLayer`` is a transformers cache layer. What was compressed is in immutable segments,
which forks share; what came since is in a tail. Which pairs stay is not decided here.
"""
