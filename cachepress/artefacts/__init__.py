"""Artefacts: files of what a method learned of a model, and digests that tell models apart."""
