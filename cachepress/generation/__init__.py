"""Generation: from a context to a compressed cache."""
