"""Tries every causal model type of transformers under a press; ``docs/models.md`` is made of it."""
