"""The compressed cache: layers that hold some pairs of a text, and what can be done with them.

A ``CompressedLayer`` is a transformers cache layer. What was compressed is in immutable segments,
which forks share; what came since is in a tail. Which pairs stay is not decided here.
"""
